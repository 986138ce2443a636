"""The report of `lowbit train`: curves, sizes, what the diagnostics saw, the recipe."""

import math
from pathlib import Path
from typing import Any

from lowbit.report import svg
from lowbit.report.page import NAME, render, write_page
from lowbit.report.words import number

STYLES = ("c0", "c1", "c2", "c3", "c5")
HIDDEN = ("title", "seeds")
# field of a layer's record, heading, what it says
MAPS = (
    ("flip_rate", "Flips", "share of a layer's weights whose code changed since the record before"),
    ("distance", "Distance to the levels", "mean |w - w_hat| over mean |w_hat|"),
    ("estimator_error", "Estimator error", "root mean square of T(x) - P(T(x)), in steps"),
    ("zero_fraction", "Zeros", "share of a layer's rounded weights that are 0"),
    ("dead", "Dead inputs", "share of a layer's input channels with one value throughout a batch"),
)


def write_training_report(folder: Path, result: dict[str, Any]) -> Path:
    """Write FOLDER/report.html from what `lowbit.train.run` returned."""
    return write_page(folder / NAME, training_html(result))


def training_html(r: dict[str, Any]) -> str:
    """The page. Charts that would be empty are left out."""
    first = r["rows"][0]
    records = first["diagnostics"]
    return render(
        "training.html",
        r=r,
        rows=r["rows"],
        packed=next((row for row in r["rows"] if "bytes" in row), None),
        layers=first.get("layers", []),
        settings=[(k, str(v)) for k, v in r["recipe"].items() if v not in ("", [], None) and k not in HIDDEN],
        loss_chart=curves(r["rows"], "loss", "training loss"),
        accuracy_chart=curves(r["rows"], "accuracy", "accuracy on test examples, %", 100),
        maps=[m for name, title, words in MAPS if (m := layer_map(records, name, title, words))],
        gradient_chart=gradient_chart(records),
        growth=records[-1]["growth"] if records else None,
    )


def curves(rows: list[dict[str, Any]], name: str, label: str, times: float = 1.0) -> str:
    """One line a seed over epochs."""
    series = [
        svg.Series(
            f"seed {row['seed']}",
            [(p["epoch"], times * p[name]) for p in row["curve"] if p[name] is not None],
            STYLES[i % len(STYLES)],
        )
        for i, row in enumerate(rows)
    ]
    return svg.lines([s for s in series if s.points], "epoch", label, from_zero=False)


def layer_map(records: list[dict[str, Any]], name: str, title: str, words: str) -> "dict[str, Any] | None":
    """Layers down, epochs across: {"title", "words", "chart"}; None where nothing was recorded."""
    layers = list(records[-1]["layers"]) if records else []
    values = [[rec["layers"].get(la, {}).get(name) for rec in records] for la in layers]
    if all(v is None for row in values for v in row):
        return None
    places = [f"{rec['at']:g}" for rec in records]
    titles = [[f"{la}, epoch {at}: {number(v)}" for at, v in zip(places, row)] for la, row in zip(layers, values)]
    return {"title": title, "words": words, "chart": svg.heatmap(layers, places, values, titles)}


def gradient_chart(records: list[dict[str, Any]]) -> str:
    """log10 of the second moment of each layer's gradient, by place in the network, of the first and last record."""
    chosen = {"first record": records[0], "last record": records[-1]} if len(records) > 1 else {}
    series = []
    for (words, rec), style in zip(chosen.items(), ("c5", "c0")):
        moments = [row["gradient"] for row in rec["layers"].values()]
        points = [(i + 1, math.log10(m)) for i, m in enumerate(moments) if m]
        series.append(svg.Series(words, points, style))
    if not series or min(len(s.points) for s in series) < 2:
        return ""
    return svg.lines(series, "layer, from the input", "log10 of the gradient's second moment", from_zero=False)
