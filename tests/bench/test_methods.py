"""`python -m lowbit.bench.methods` from data to packed networks."""

import json
from pathlib import Path

import pytest
import torch

from lowbit.bench import methods
from lowbit.bench.pool import read_rows
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
