"""Every cell of tasks x architectures x methods runs, is kept, and fails alone."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowbit.bench.cells import METHODS, NETWORKS, Cell, cells, recipe_of, run_cells
from lowbit.cli import app

ALL = list(cells((), (), ()))
FEW = [Cell("digits", "mlp", "ternary"), Cell("digits", "resnet", "w1a1"), Cell("shakespeare", "gpt", "w3-s3")]
EACH = [pytest.param(c, id=c.name, marks=() if c in FEW else pytest.mark.slow) for c in ALL]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A text and, where the libraries are there, eighty small pictures."""
    where = tmp_path_factory.mktemp("data")
    (where / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60, "utf-8")
    found = {"shakespeare": str(where / "text.txt")}
    try:
        found["cifar10"] = _pictures(where / "cifar10")
    except ImportError:
        pass
    return found


def _pictures(folder: Path) -> str:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir()
    for split, n in (("train", 80), ("test", 40)):
        rows = []
        for i in range(n):
            draw = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            file = io.BytesIO()
            Image.fromarray(draw.numpy()).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": ""})
        pq.write_table(pa.table({"img": rows, "label": [i % 10 for i in range(n)]}), folder / f"{split}-0.parquet")
    return str(folder)


def test_the_table_has_every_sensible_cell() -> None:
    assert len(ALL) == len(METHODS) * sum(len(n) for n in NETWORKS.values()) == 77
    assert {c.architecture for c in ALL} == {"resnet", "mlp", "vit", "lstm", "gpt"}
    for cell in ALL:
        recipe_of(cell, "somewhere", 1)  # raises where a recipe does not fit


@pytest.mark.parametrize("cell", EACH)
def test_a_cell_runs(cell: Cell, data: dict[str, str], tmp_path: Path) -> None:
    if cell.task == "cifar10" and cell.task not in data:
        pytest.skip("pyarrow and pillow are not installed")
    (row,) = run_cells(tmp_path, [cell], data, 1, lambda text: None, quick=True, device="cpu")
    assert row["error"] is None
    assert 0 <= row["accuracy"] <= 1 and row["seconds_per_epoch"] > 0
    assert cell.method == "fp32" or (row["same_class"] >= 0.999 and row["bits_per_weight"] < 16)


def test_the_command_keeps_what_is_finished_and_shows_what_failed(tmp_path: Path) -> None:
    words = ["bench", "tasks", "-o", str(tmp_path), "--architecture", "mlp", "--method", "ternary", "--quick", "--json"]
    words += ["--task", "digits", "--task", "shakespeare", "--data", f"shakespeare={tmp_path / 'missing.txt'}"]
    first = json.loads(CliRunner().invoke(app, words).stdout)
    digits, text = first["rows"]
    assert digits["error"] is None and digits["seeds"] == 1
    assert "missing.txt" in text["error"] and text["accuracy"] is None
    stamp = (tmp_path / "digits-mlp-ternary" / "train.json").stat().st_mtime_ns
    again = json.loads(CliRunner().invoke(app, words).stdout)
    assert again["rows"][0] == digits
    assert (tmp_path / "digits-mlp-ternary" / "train.json").stat().st_mtime_ns == stamp
    plain = CliRunner().invoke(app, [w for w in words if w != "--json"]).stdout.splitlines()
    assert plain[-4].split() == ["task", "network", "ternary"] and plain[-2].split()[-1] == "failed"
    page = Path(first["report"]).read_text("utf-8")
    assert page.count("failed") >= 2 and "missing.txt" in page and f"{100 * digits['accuracy']:.2f}" in page


def test_the_page_compares_with_float() -> None:
    from lowbit.report.tasks_page import tasks_html

    row = dict.fromkeys(("bits_per_weight", "bytes", "same_class", "error"))
    row |= {"task": "digits", "architecture": "mlp", "spread": 0.01, "loss": 0.1, "seconds_per_epoch": 1.0, "seeds": 2}
    rows = [row | {"method": "fp32", "accuracy": 0.9}, row | {"method": "w1", "accuracy": 0.85, "same_class": 0.9995}]
    page = tasks_html(rows)
    assert "-5.00" in page and "w1, digits mlp: -5.00 points" in page and "99.95 %" in page


def test_unknown_names() -> None:
    done = CliRunner().invoke(app, ["bench", "tasks", "--method", "w4-lqs"])
    assert done.exit_code == 1 and "Did you mean 'w4-lsq'" in done.stderr
    done = CliRunner().invoke(app, ["bench", "tasks", "--task", "digits", "--architecture", "gpt"])
    assert done.exit_code == 1 and "does not fit" in done.stderr
