"""`compress` killed with SIGKILL at random moments: it goes on, and the artifact has the same bytes."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sources import tiny_models as tiny

VOLATILE = {"run.json", "report.html"}  # times and memory of the run


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.iterdir()) if p.name not in VOLATILE)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def command(model: Path, out: Path, text: Path) -> list[str]:
    words = ["compress", str(model), "-o", str(out), "--data", str(text), "--group", "16", "--bits", "3"]
    return [sys.executable, "-m", "lowbit", *words, "--windows", "16", "--context", "32"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama of twelve blocks and a text for it."""
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 12
    import transformers

    model, words = tmp_path / "model", random.Random(0)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{words.randrange(3, tiny.VOCAB)}" for _ in range(20)) for _ in range(100)))
    return model, text


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is POSIX")
def test_killed_at_three_random_moments_it_ends_with_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(command(model, whole, text), check=True, capture_output=True)
    draw = random.Random(1)
    resumed = 0
    for _ in range(3):
        done = len(list(Path(f"{out}.partial").glob("piece-block-*")))
        goal = done + draw.randrange(1, 4)
        run = subprocess.Popen(command(model, out, text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(Path(f"{out}.partial").glob("piece-block-*"))) < goal:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)  # anywhere in the work on a block, or in writing it
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not out.exists()
        resumed += done > 0
    assert resumed == 2, "the runs that were killed went on from each other"
    last = subprocess.run(command(model, out, text), check=True, capture_output=True, text=True)
    assert "Going on from block" in last.stdout + last.stderr
    assert digest(out) == digest(whole)
    assert not Path(f"{out}.partial").exists()
