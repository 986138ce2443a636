"""`lowbit train` as typed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.helpers import refused, run, run_json
from tests.test_json_docs import PAGE, documented

SMALL = ("--epochs", 1, "--set", "train_examples=64", "--set", "test_examples=32")


def test_train_prints_the_documented_object_and_writes_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run_json("train", "digits-ternary", "-o", out, *SMALL)
    assert documented("train") == set(found)
    section = PAGE.read_text("utf-8").split("\n## train\n")[1].split("\n## ")[0]
    assert set(found["rows"][0]) <= set(re.findall(r"`(\w+)`", section))
    page = (out / "report.html").read_text("utf-8")
    assert "Distance to the levels" in page and page.count("<svg") >= 4 and "&lt;svg" not in page
    assert "--force" in refused("train", "digits-ternary", "-o", out, *SMALL)


def test_the_list_of_recipes() -> None:
    said = run("train")
    assert said.exit_code == 0 and "digits-ternary" in said.stdout
    assert "digits-ternary" in [r["name"] for r in run_json("train")["recipes"]]


def test_words_for_people(tmp_path: Path) -> None:
    said = run("train", "digits-ternary", "-o", tmp_path / "out", *SMALL, "--weights", "int4-channel").stdout
    assert "Seed 0:" in said and "epoch 1/1" in said and "same class" in said and "\x1b" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_process_goes_on(how: str, tmp_path: Path) -> None:
    """The weights of a killed and resumed process equal those of an undisturbed one, byte for byte."""
    command = [sys.executable, "-c", CODE, "digits-ternary"]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True, timeout=600)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "seed-0" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, how))
    assert process.wait(60) != 0
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, timeout=600)
    name = "seed-0/packed/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


CODE = """
import sys, torch
torch.set_num_threads(1)
from lowbit.train import load_recipe, run
run(load_recipe(sys.argv[1], epochs=12), sys.argv[2], checkpoint_seconds=0.2)
"""
