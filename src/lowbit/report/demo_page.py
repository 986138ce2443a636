"""The report of `lowbit demo`: one table, three drawings, and what to type next."""

from pathlib import Path
from typing import Any

from lowbit.report import svg
from lowbit.report.page import NAME, render, write_page
from lowbit.report.view import natural
from lowbit.report.words import size_words

STYLES = ("c5", "c0", "c4", "c1", "c3", "c2", "c0")


def write_demo_report(folder: Path, result: dict[str, Any]) -> Path:
    """Write FOLDER/report.html from what `lowbit.demo.run_demo` returned."""
    return write_page(folder / NAME, demo_html(result))


def demo_html(r: dict[str, Any]) -> str:
    variants = [r["float"], *r["rows"]]
    smallest = min(r["rows"], key=lambda v: v["bytes"])
    layers = sorted(r["rows"][-1]["layers"], key=lambda la: natural(la["name"]))
    return render(
        "demo.html",
        r=r,
        variants=variants,
        smallest=smallest,
        layers=layers,
        one_image=100 / r["test_images"],
        size_chart=svg.bars([(v["name"], v["bytes"], size_words(v["bytes"])) for v in variants]),
        accuracy_chart=svg.points(
            [
                svg.Series(v["name"], [(v["bytes"] / 1000, 100 * v["accuracy"])], STYLES[i % 7])
                for i, v in enumerate(variants)
            ],
            "file, kB",
            "accuracy on test images, %",
            log_x=True,
            y_range=(94, 100),
        ),
        speed_chart=svg.bars(
            [(v["name"], v["images_per_second"], f"{v['images_per_second']:,.0f}") for v in variants], "c4"
        ),
    )
