"""`lowbit demo`: quick on every run, in full where time is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.demo import VARIANTS, run_demo
from lowbit.errors import ArtifactError
from tests.cli.helpers import refused, run_json


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_json("demo", "--quick", "--out", tmp_path_factory.mktemp("demo") / "d")


@pytest.mark.slow
def test_every_variant_is_packed_and_learns(quick: dict[str, Any]) -> None:
    assert [r["name"] for r in quick["rows"]] == [v.name for v in VARIANTS]
    assert quick["float"]["accuracy"] > 0.9 and all(r["accuracy"] > 0.85 for r in quick["rows"])
    assert all(r["logit_difference"] < 1e-5 for r in quick["rows"])


@pytest.mark.slow
def test_bits_and_bytes_are_counted(quick: dict[str, Any]) -> None:
    bits = [r["bits_per_weight"] for r in quick["rows"]]
    for found, wanted in zip(bits, (8, 4, 3, 2, 1.6, 1)):
        assert wanted < found < wanted + 0.2  # and a scale of 16 bits for each row of at least 128 weights
    sizes = [r["bytes"] for r in (quick["float"], *quick["rows"])]
    assert sizes == sorted(sizes, reverse=True)
    assert all(r["bytes"] == (Path(r["folder"]) / "model.safetensors").stat().st_size for r in quick["rows"])


@pytest.mark.slow
def test_the_report_stands_alone(quick: dict[str, Any]) -> None:
    html = Path(quick["report"]).read_text("utf-8")
    assert html.count("<svg") == 3 and "<script" not in html and "binary-channel" in html
    assert json.loads((Path(quick["out"]) / "demo.json").read_text())["seed"] == 0


def test_it_overwrites_only_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "earlier demo" in refused("demo", "--out", tmp_path)
    with pytest.raises(ArtifactError):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_threads_and_random_numbers_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.demo.VARIANTS", VARIANTS[-1:])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run_demo(tmp_path / "d", quick=True)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    result = run_json("demo", "--out", tmp_path / "d")
    assert result["float"]["accuracy"] > 0.97 and all(r["accuracy"] > 0.96 for r in result["rows"])
