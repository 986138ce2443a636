"""Small inline SVG charts: stacked bars, plain bars, lines, points, a heat map. No script, no font, no colour of their
own.

Each function returns one <svg> element as text. Colours come from the page's CSS classes (c0 .. c5, axis, grid, heat),
so that light, dark and print need one drawing only. Every text passes through `escape`: layer names come from files.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 720
LABEL = 8.0  # average width of a character at the label size, in drawing units


class Segment(NamedTuple):
    value: float
    style: str  # c0 .. c5
    title: str


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    style: str


def stacked_bars(rows: Sequence[tuple[str, Sequence[Segment], str]], total: "float | None" = None) -> str:
    """One bar a row: (label, segments, words at the end). All rows share one scale; `total` is its end."""
    total = total or max((sum(s.value for s in segments) for _, segments, _ in rows), default=0) or 1
    left = _label_width([label for label, _, _ in rows])
    right = _label_width([end for _, _, end in rows])
    span, step = WIDTH - left - right, 34
    parts = []
    for i, (label, segments, end) in enumerate(rows):
        y, x = i * step + 4, float(left)
        parts.append(_text(left - 10, y + 16, label, "end"))
        for s in segments:
            w = max(span * s.value / total, 0)
            parts.append(
                f'<rect class="{s.style}" x="{x:.1f}" y="{y}" width="{w:.1f}" height="22">{_title(s.title)}</rect>'
            )
            x += w
        parts.append(_text(x + 8, y + 16, end, "start", "strong"))
    return _svg(len(rows) * step + 4, parts)


def bars(rows: Sequence[tuple[str, float, str]], style: str = "c0") -> str:
    """(label, value, words): one horizontal bar each."""
    return stacked_bars([(label, [Segment(value, style, f"{label}: {words}")], words) for label, value, words in rows])


def lines(series: Sequence[Series], x_label: str, y_label: str, height: int = 240, from_zero: bool = True) -> str:
    """Lines with small marks over a grid, legend above."""
    return _plot(series, x_label, y_label, height, joined=True, from_zero=from_zero)


def points(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    height: int = 300,
    log_x: bool = False,
    y_range: Sequence[float] = (),
) -> str:
    """Points labelled by their series' name: one series a point.

    log_x: equal factors are equally far apart; y_range: numbers the y axis must include
    """
    return _plot(series, x_label, y_label, height, joined=False, from_zero=False, log_x=log_x, y_range=y_range)


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: "Sequence[Sequence[float | None]]",
    titles: Sequence[Sequence[str]],
) -> str:
    """One cell a value, from the smallest (faint) to the largest (strong), which are written below; None is left out.

    Column names are thinned to what fits.
    """
    known = [v for row in values for v in row if v is not None] or [0.0]
    low, spread = min(known), (max(known) - min(known)) or 1
    left, step = _label_width(rows), 24
    cell = (WIDTH - left) / max(len(columns), 1)
    parts = [_text(left - 10, i * step + 17, name, "end") for i, name in enumerate(rows)]
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if v is not None:
                shade = 0.12 + 0.88 * (v - low) / spread
                parts.append(
                    f'<rect class="heat" fill-opacity="{shade:.3f}" x="{left + j * cell:.1f}" y="{i * step + 1}" '
                    f'rx="2" width="{max(cell - 1.5, 1):.1f}" height="{step - 2}">{_title(titles[i][j])}</rect>'
                )
    every = max(1, math.ceil(len(columns) * 30 / (WIDTH - left)))
    y = len(rows) * step + 16
    parts += [_text(left + (j + 0.5) * cell, y, columns[j], "middle", "axis") for j in range(0, len(columns), every)]
    parts.append(_text(WIDTH - 2, y + 20, f"faintest {low:.3g}, strongest {max(known):.3g}", "end", "axis"))
    return _svg(y + 26, parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`.

    >>> ticks(0, 0.43)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    if not high > low:
        high = low + (abs(low) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Scale(NamedTuple):
    """Where a number lies on a side of the plot."""

    marks: list[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, v: float) -> float:
        low, high, v = (math.log(n) if self.log else n for n in (self.marks[0], self.marks[-1], v))
        return self.start + (v - low) / (high - low) * (self.end - self.start)


def _plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    height: int,
    joined: bool,
    from_zero: bool,
    log_x: bool = False,
    y_range: Sequence[float] = (),
) -> str:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + list(y_range)
    if not xs:
        return ""
    left, right, top, bottom = 64, WIDTH - 32, 32, height - 44
    px = _Scale(
        _powers(min(xs), max(xs)) if log_x else ticks(0 if from_zero else min(xs), max(xs), 8), left, right, log_x
    )
    py = _Scale(ticks(0 if from_zero else min(ys), max(ys)), bottom, top)
    parts = [f'<line class="grid" x1="{left}" x2="{right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>' for t in py.marks]
    parts += [_text(left - 8, py(t) + 4, f"{t:g}", "end", "axis") for t in py.marks]
    parts += [_text(px(t), bottom + 18, f"{t:g}", "middle", "axis") for t in px.marks]
    parts += [
        _text((left + right) / 2, height - 6, x_label, "middle", "axis"),
        _text(left - 56, 14, y_label, "start", "axis"),
    ]
    for i, s in enumerate(sorted(series, key=lambda s: s.points[0]) if not joined else series):
        parts += _joined(s, px, py) if joined else _named(s, px, py, above=i % 2 == 0)
    return _svg(height, [*parts, *(_legend(series) if joined else ())])


def _joined(s: Series, px: _Scale, py: _Scale) -> list[str]:
    line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
    return [f'<polyline class="line {s.style}" points="{line}"/>', *(_mark(s, x, y, px, py, 2.6) for x, y in s.points)]


def _named(s: Series, px: _Scale, py: _Scale, above: bool) -> list[str]:
    """Neighbours have their names on different sides, so that close points stay readable."""
    side = -12 if above else 22
    return [
        t
        for x, y in s.points
        for t in (_mark(s, x, y, px, py, 6), _text(px(x), py(y) + side, s.name, "middle", "strong"))
    ]


def _mark(s: Series, x: float, y: float, px: _Scale, py: _Scale, radius: float) -> str:
    title = _title(f"{s.name}: {x:.4g}, {y:.4g}")
    return f'<circle class="{s.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius}">{title}</circle>'


def _powers(low: float, high: float) -> list[float]:
    """Powers of two from below `low` to above `high`, both positive."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**i for i in range(first, max(last, first + 1) + 1)]


def _legend(series: Sequence[Series]) -> list[str]:
    parts, x = [], float(WIDTH - 24)
    for s in reversed(series):
        x -= len(s.name) * 7.0
        parts.append(_text(x, 14, s.name, "start"))
        parts.append(f'<rect class="{s.style}" x="{x - 17:.1f}" y="4" width="11" height="11" rx="3"/>')
        x -= 36
    return parts


def _label_width(labels: Sequence[str]) -> int:
    return int(min(max((len(t) for t in labels), default=0), 34) * LABEL) + 16


def _text(x: float, y: float, text: str, anchor: str, style: str = "label") -> str:
    short = text if len(text) <= 34 else text[:15] + "…" + text[-18:]
    inside = escape(short) + (_title(text) if short != text else "")
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{inside}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
