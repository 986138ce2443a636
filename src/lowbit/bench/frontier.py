"""Rows that no other row beats in both bytes and perplexity, and their picture."""

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 900, 560, 60, 20


def frontier(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other row beats in both bytes and perplexity, by bytes."""
    best, kept = math.inf, []
    for row in sorted((r for r in found if not r.get("error")), key=lambda r: (r["bytes"], r["ppl"])):
        if row["ppl"] < best:
            best = row["ppl"]
            kept.append(row)
    return kept


def frontier_svg(found: Sequence[dict[str, Any]], most: float = 4.0) -> str:
    """Perplexity (log) against megabytes; rows beyond `most` times the least perplexity are left out.

    Names stand where there is room for them, those of the frontier first.
    """
    good = [r for r in found if not r.get("error")]
    floor = min((r["ppl"] for r in good), default=1.0)
    shown = [r for r in good if r["ppl"] <= most * floor and r["bits"] < 8]
    if not shown:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>'
    low, high = min(r["bytes"] for r in shown) / 1e6 - 1, max(r["bytes"] for r in shown) / 1e6 + 6

    def at(row: dict[str, Any]) -> tuple[float, float]:
        x = LEFT + (row["bytes"] / 1e6 - low) / (high - low) * (WIDTH - LEFT - 20)
        return x, TOP + (math.log(most * floor) - math.log(row["ppl"])) / math.log(most) * (HEIGHT - TOP - 50)

    edge = frontier(shown)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for factor in (f for f in (1, 1.1, 1.2, 1.5, 2, 3, 5, 8) if f <= most):
        y = at({"bytes": low * 1e6, "ppl": factor * floor})[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{factor * floor:.0f}", 12, anchor="end"))
    for mb in range(math.ceil(low / 5) * 5, int(high) + 1, 5):
        parts.append(_text(at({"bytes": mb * 1e6, "ppl": floor})[0], HEIGHT - 28, str(mb), 12, anchor="middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 8, "MB of tensors", 13, anchor="middle"))
    parts.append(_text(LEFT, 14, f"perplexity, logarithmic; least {floor:.2f}", 13))
    points = " ".join("{:.1f},{:.1f}".format(*at(r)) for r in edge)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#0a6" stroke-width="2"/>')
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(at, shown)]
    for row in [*edge, *(r for r in shown if r not in edge)]:
        (x, y), on = at(row), row in edge
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if on else 3}" fill="{"#0a6" if on else "#999"}"/>')
        if (place := _room(x, y, 5.2 * len(row["name"]), taken)) is not None:
            parts.append(_text(place[0], place[1], row["name"], 10, "#064" if on else "#777"))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, words: str, size: int, fill: str = "black", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{words}</text>'


def _room(
    x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]
) -> "tuple[float, float] | None":
    """Where a name beside (x, y) meets no box that is taken, or None; its own box is taken then."""
    for left, base in ((x + 6, y + 3), (x + 3, y - 6), (x + 3, y + 13), (x - width - 6, y + 3)):
        box = (left, base - 9, left + width, base + 2)
        inside = left > LEFT and left + width < WIDTH and base < HEIGHT - 44
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return left, base
    return None
