"""`python -m lowbit.bench.methods` from data to packed networks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowbit.bench import methods
from lowbit.bench.method_table import markdown, table
from lowbit.bench.pool import read_rows
from lowbit.bench.rows import PROTOCOLS
from lowbit.cli import app
from lowbit.train.images import Images

SMALL = ["--depth", "8", "--width", "4", "--batch", "16", "--epochs", "1", "--rows", "w1-ste,w1a1-bnn"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 8, 8, 3), generator=draw, dtype=torch.uint8)
    images = Images(x, torch.arange(40) % 10)
    monkeypatch.setattr(methods, "read_images", lambda source: (images, images))
    return ["--data", "any", "--out", str(tmp_path), *SMALL]


def test_train_then_again_then_pack(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(command) == 0
    assert methods.main(command) == 0
    assert "0 networks to train, 2 done before" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert methods.main([*command, "--pack"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "packed.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rows] == ["w1-ste", "w1a1-bnn"]
    for packed, trained in zip(rows, read_rows(tmp_path)):
        assert packed["same_class"] == 1.0
        assert packed["accuracy"] == pytest.approx(trained["accuracy"])
        assert 1 < packed["bits_per_weight"] < 2


def test_no_time_leaves_checkpoints(command: list[str], tmp_path: Path) -> None:
    assert methods.main([*command, "--minutes", "0"]) == 3
    assert methods.main(command) == 0


def test_smoke_runs_every_row(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([*command, "--smoke"]) == 0
    assert "2 of 2 rows ran" in capsys.readouterr().out


def test_errors_are_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([*command, "--rows", "w1-stee"]) == 1
    assert "Did you mean 'w1-ste'" in capsys.readouterr().err
    assert methods.main([*command, "--device", "cuda"]) == 1 or torch.cuda.is_available()


def test_the_command_trains_times_packs_and_reports(command: list[str], tmp_path: Path) -> None:
    def run(*more: str) -> Any:
        done = CliRunner().invoke(app, ["bench", "methods", *command, *more, "--json"])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    run()
    run("--cost", "1", "--rows", "w1-ste,w1a1-bnn")
    run("--corrupt", "20")
    found = run("--pack")
    rows = {r["row"]: r for r in found["rows"]}
    assert list(rows) == ["w1-ste", "w1a1-bnn"] and found["whole"]
    for r in rows.values():
        assert 1 < r["bits_per_weight"] < 2 < r["bits_per_weight_file"] and r["same_class"] == 1
        assert r["seeds"] == 1 and r["spread"] is None and r["to_fp32"] is None and r["cost"] > 0
        assert r["corrupted"] >= 0
    page = Path(found["report"]).read_text("utf-8")
    assert "w1a1-bnn" in page and "binary-channel" in page


def test_the_command_says_when_time_was_up(command: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", "methods", *command, "--minutes", "1e-9"])
    assert done.exit_code == 3 and "2 checkpoints" not in done.stdout


def test_a_failed_row_shows_as_failed(tmp_path: Path) -> None:
    protocol = PROTOCOLS["small"]
    runs = [
        {"row": "fp32", "seed": 0, "status": "done", "accuracy": 0.9},
        {"row": "fp32", "seed": 1, "status": "done", "accuracy": 0.8},
        {"row": "w1-ste", "seed": 0, "status": "failed", "error": "ArithmeticError: the loss is nan"},
        {"row": "w4-lsq", "seed": 0, "status": "done", "accuracy": 0.7},
        {"row": "w4-lsq", "seed": 1, "status": "failed", "error": "RuntimeError: out of memory"},
    ]
    lines = [json.dumps(r | {"protocol": vars(protocol)}) for r in runs]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    base, failed, half = table(tmp_path, protocol)
    assert (base["accuracy"], base["spread"]) == (pytest.approx(0.85), pytest.approx(0.0707, abs=1e-4))
    assert (failed["accuracy"], failed["failed"], failed["errors"]) == (None, 1, [runs[2]["error"]])
    assert half["to_fp32"] == pytest.approx(-0.15) and half["failed"] == 1
    text = markdown([base, failed, half])
    assert "| w1-ste | failed |" in text and "| w4-lsq | 70.00 |  | -15.00 | 1 | 1 |" in text
    from lowbit.report.methods_page import methods_html

    page = methods_html(vars(protocol), [base, failed, half])
    assert "failed" in page and "the loss is nan" in page and "-15.00" in page
