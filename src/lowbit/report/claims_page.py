"""The report of `lowbit bench claims`: each claim, what was seen, and its curves."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from lowbit.report import svg
from lowbit.report.page import NAME, render, write_page

STYLES = ("c0", "c3", "c2")


def write_claims_report(folder: Path, claims: list[dict[str, Any]]) -> Path:
    """Write FOLDER/report.html; claims as `lowbit.bench.claims` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(folder / NAME, claims_html(claims))


def claims_html(claims: list[dict[str, Any]]) -> str:
    """The page."""
    shown = [c | {"chart": Markup(chart(c))} for c in claims]
    return render("claims.html", claims=shown, seen=sum(c["shown"] for c in claims))


def chart(claim: dict[str, Any]) -> str:
    """One line a series."""
    series = [
        svg.Series(name, points, STYLES[i % len(STYLES)]) for i, (name, points) in enumerate(claim["series"].items())
    ]
    return svg.lines(series, claim["x"], claim["y"])
