"""The report of `lowbit bench methods`: one table, one chart, what failed, the protocol."""

from pathlib import Path
from typing import Any

from lowbit.report import svg
from lowbit.report.page import NAME, render, write_page

STYLES = {1.0: "c0", 1.6: "c1", 2.0: "c2", 3.0: "c3", 4.0: "c4"}  # by nominal bits


def write_methods_report(folder: Path, protocol: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write FOLDER/report.html; rows as `lowbit.bench.method_table.table` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(folder / NAME, methods_html(protocol, rows))


def methods_html(protocol: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page. A row without a finished training says so; the chart leaves it out."""
    finished = [r for r in rows if r["accuracy"] is not None]
    return render(
        "methods.html",
        rows=rows,
        finished=finished,
        base=next((r for r in finished if r["row"] == "fp32"), None),
        seeds=max((r["seeds"] + r["failed"] for r in rows), default=0),
        errors=[(r["row"], e) for r in rows for e in r["errors"]],
        settings=[(k, str(v)) for k, v in protocol.items()],
        gap_chart=gap_chart(finished),
    )


def gap_chart(rows: list[dict[str, Any]]) -> str:
    """Points of accuracy lost to fp32, one bar a row, the best first; "" without fp32."""
    lost = [(r["row"], 100 * max(-r["to_fp32"], 0.0), f"{100 * r['to_fp32']:+.2f}", STYLES.get(r["bits"], "c5"))
            for r in rows if r["to_fp32"] is not None and r["row"] != "fp32"]  # fmt: skip
    bars = [(name, [svg.Segment(value, style, f"{name}: {words} points")], words)
            for name, value, words, style in sorted(lost, key=lambda row: row[1])]  # fmt: skip
    return svg.stacked_bars(bars) if bars else ""
