"""The page: offline, escaped, whole; and the drawings."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lowbit.report import svg, view
from lowbit.report.page import report_html
from tests.report import examples

HOSTILE = '<img/onerror="alert(1)">&"'


def page(manifest: dict[str, Any], run: dict[str, Any] | None = None, name: str = "out") -> str:
    return report_html(manifest, {"evaluations": []} if run is None else run, name)


def hostile() -> dict[str, Any]:
    """Names that would break out of the page if one were not escaped."""
    row = examples.row((8, 16), "int4-channel", 4, 16, error=0.1, sensitivity=1.0)
    layers = {f"{HOSTILE}.{b}.{HOSTILE}": row for b in range(4)} | {HOSTILE: row}
    m = examples.manifest(layers, {f"norm{HOSTILE}": examples.norm(8)})
    m["recipe"] = {"method": HOSTILE, "data": HOSTILE, HOSTILE: HOSTILE}
    m["versions"] = {HOSTILE: HOSTILE}
    m["source"] = {"describe": HOSTILE, "fingerprint": HOSTILE}
    m["tied"] = {HOSTILE: HOSTILE}
    return m


def test_every_name_is_escaped() -> None:
    run = {
        "seconds": 1.0,
        "machine": HOSTILE,
        "evaluations": [{"text": HOSTILE, "perplexity": 3.0, "protocol": HOSTILE}],
    }
    html = page(hostile(), run, HOSTILE)
    assert "<img" not in html and 'onerror="' not in html
    assert html.count("&lt;img/onerror=") > 20


@pytest.mark.parametrize("manifest", [examples.language_model(), hostile()], ids=["language model", "hostile"])
def test_one_offline_file_without_script(manifest: dict[str, Any]) -> None:
    html = page(manifest, examples.RUN)
    assert "<script" not in html and "javascript:" not in html
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", html)) - {"http://www.w3.org/2000/svg"}
    assert not addresses and not re.search(r"<(link|iframe|object|embed|img)\b|@import|url\(", html)


def test_it_says_what_was_measured() -> None:
    html = page(examples.language_model(), examples.RUN)
    for words in (
        "34.91",
        "30.02",
        "1.163",
        "87.1 %",
        "valid.txt[50%:]",
        "SmolLM2-135M-Instruct",
        "2 min 32 s",
        "1.21 GB",
    ):
        assert words in html, words
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert html.count("<svg") == 5  # size, bits, error by block, error map, sensitivity


def test_without_an_evaluation_it_says_so() -> None:
    html = page(examples.language_model(sensitivity=False))
    assert "not measured" in html and "has not been evaluated yet" in html and "lowbit eval out" in html
    assert html.count("<svg") == 4


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 100])
def test_any_number_of_blocks(blocks: int) -> None:
    assert "</html>" in page(examples.language_model(blocks), examples.RUN)


def test_odd_runs_are_shown_and_not_believed() -> None:
    rows = [{}, {"perplexity": None}, {"accuracy": 0.5, "float_accuracy": 0.9}, {"perplexity": 3.0}]
    assert "</html>" in page(examples.language_model(2), {"evaluations": rows})


def test_sizes_add_up() -> None:
    m = examples.language_model()
    s = view.sizes(m, view.layers_of(m))
    assert s.after == m["summary"]["bytes"] and s.embeddings == m["layers"]["model.embed_tokens"]["bytes"]
    inner = [la for la in view.layers_of(m) if not view.is_embedding(la)]
    assert sum(view.bits_by_part(inner).values()) == pytest.approx(m["summary"]["bits_per_weight"])


def test_layers_are_in_natural_order() -> None:
    names = [la.name for la in view.layers_of(examples.language_model(12)) if la.name.endswith("q_proj")]
    assert names == [f"model.layers.{b}.self_attn.q_proj" for b in range(12)]


def test_drawings_are_well_formed() -> None:
    one = svg.Series(HOSTILE, [(1, 2), (2, 2)], "c0")
    drawings = [
        svg.bars([(HOSTILE, 1, HOSTILE), ("zero", 0, "0")]),
        svg.stacked_bars([]),
        svg.lines([one], HOSTILE, HOSTILE),
        svg.points([svg.Series("a", [(3, 5)], "c0")], "x", "y", log_x=True),
        svg.heatmap([HOSTILE], ["0", "1"], [[0.5, None]], [[HOSTILE, ""]]),
    ]
    for drawing in drawings:
        assert ET.fromstring(drawing).tag.endswith("svg") and "nan" not in drawing


def test_bar_lengths_are_in_proportion() -> None:
    widths = [
        float(w) for w in re.findall(r'<rect class="c0"[^>]*? width="([\d.]+)"', svg.bars([("a", 4, ""), ("b", 1, "")]))
    ]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.43), (5, 5), (-3, 1e9), (94, 99.6)])
def test_ticks_enclose(low: float, high: float) -> None:
    marks = svg.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 12
