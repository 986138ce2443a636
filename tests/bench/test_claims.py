"""The papers' claims on toys: quick ones always, those that train with the slow tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowbit.bench.claims import CLAIMS
from lowbit.cli import app

QUICK = ("random_bias", "reste_equilibrium", "biper_error")
REFUTED = ("prox_midpoints",)  # at this scale: as many weights stay near the midpoint
NOISE = ("random_bias_convolutions",)  # a batch-norm learns its biases whatever they begin with: either sign is seen
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CLAIMS]


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_shows(name: str) -> None:
    claim: dict[str, Any] = CLAIMS[name]()
    assert all(len(points) > 1 for points in claim["series"].values())
    if name in NOISE:
        right = [y for points in claim["series"].values() for _, y in points]
        assert min(right) > 85 and max(right) - min(right) < 3, claim["seen"]
    else:
        assert claim["shown"] is (name not in REFUTED), claim["seen"]


def test_the_command_writes_a_page_with_a_plot_each(tmp_path: Path) -> None:
    words = [w for name in QUICK for w in ("--only", name)]
    done = CliRunner().invoke(app, ["bench", "claims", "-o", str(tmp_path), *words, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [c["name"] for c in found["claims"]] == list(QUICK)
    page = Path(found["report"]).read_text("utf-8")
    assert page.count("<svg") == 3 and page.count("Shown") == 3
    assert json.loads((tmp_path / "claims.json").read_text("utf-8"))[0]["name"] == "random_bias"


def test_an_unknown_claim() -> None:
    done = CliRunner().invoke(app, ["bench", "claims", "--only", "random_bia"])
    assert done.exit_code == 1 and "Did you mean 'random_bias'" in done.stderr
