"""The report of `lowbit bench tasks`: accuracy by network and method, what it costs in bits, what failed."""

from pathlib import Path
from typing import Any

from lowbit.report import svg
from lowbit.report.page import NAME, render, write_page

FLOAT = "fp32"


def write_tasks_report(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write FOLDER/report.html; rows as `lowbit.bench.cells.run_cells` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(folder / NAME, tasks_html(rows))


def tasks_html(rows: list[dict[str, Any]]) -> str:
    """The page. A cell that failed says so; one that was not asked for is empty."""
    networks = list(dict.fromkeys((r["task"], r["architecture"]) for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    cells = {(r["task"], r["architecture"], r["method"]): r for r in rows}
    grid = [(n, [cells.get((*n, m)) for m in methods], cells.get((*n, FLOAT))) for n in networks]
    return render(
        "tasks.html",
        rows=rows,
        methods=methods,
        grid=grid,
        tasks=list(dict.fromkeys(r["task"] for r in rows)),
        seeds=max((r["seeds"] for r in rows), default=0),
        errors=[(f"{r['task']}, {r['architecture']}, {r['method']}", r["error"]) for r in rows if r["error"]],
        agreement=min((r["same_class"] for r in rows if r["same_class"] is not None), default=None),
        gap_chart=loss_chart(rows, methods),
    )


def loss_chart(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """Points lost to float, one bar a network and method, method by method; "" without float cells."""
    base = {(r["task"], r["architecture"]): r["accuracy"] for r in rows if r["method"] == FLOAT}
    bars = []
    for i, method in enumerate(m for m in methods if m != FLOAT):
        for r in (r for r in rows if r["method"] == method and r["accuracy"] is not None):
            wanted = base.get((r["task"], r["architecture"]))
            if wanted is not None:
                gap = 100 * (r["accuracy"] - wanted)
                name, words = f"{method}, {r['task']} {r['architecture']}", f"{gap:+.2f}"
                bars.append((name, [svg.Segment(max(-gap, 0.0), f"c{i % 6}", f"{name}: {words} points")], words))
    return svg.stacked_bars(bars) if bars else ""
