"""Scale rules: how the scale (and zero) of a block is found.

    absmax      s = max|w| / reach                                 nothing clips
    minmax      s = (max - min) / (top - bottom), zero so that the ends meet; an integer zero keeps 0 inside the range
    mean        s = mean|w|          the least-squares scale of {-1, 1}; BitNet's ternary scale (arXiv:2402.17764)
    median      s = median|w|        the L1 optimum; BitNet b1.58 Reloaded (arXiv:2407.09527)
    search      shrink the absmax or min-max range by p = 1.00, 0.99 .. 0.21; keep the least sum |w_hat - w|**2.4   (GPTQ's grid)
    lstsq       search with norm 2, then alternate codes and the closed form  s = sum h w l / sum h l^2   (2x2 system with a real zero)
    mx          s = 2**(floor(log2 max|w|) - floor(log2 top))      OCP MX v1.0

Each rule: (w (blocks, n) float32, format, importance (blocks, n) or None) -> (scale (blocks, 1), zero (blocks, 1) or None), already rounded as
they will be stored. `importance` weighs the squared errors of search and lstsq. An all-zero block gets scale 0, which decodes to 0.
"""

from typing import TYPE_CHECKING, Callable

import torch
from torch import Tensor

from lowbit.formats.levels import nearest, round_integers
from lowbit.formats.stores import round_scale

if TYPE_CHECKING:
    from lowbit.formats.format import Format

Rule = Callable[[Tensor, "Format", "Tensor | None"], "tuple[Tensor, Tensor | None]"]
SHRINKS = [1 - i / 100 for i in range(80)]
GPTQ_NORM = 2.4


def to_codes(w: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", generator=None, table=None) -> Tensor:
    """Codes (uint8) of w for given scales: nearest level of w / scale + zero. Shapes broadcast over blocks."""
    x = w / torch.where(scale > 0, scale, torch.ones_like(scale))
    if fmt.levels.is_integer_range and table is None:
        bottom, top = fmt.levels.values[0], fmt.levels.values[-1]
        if zero is None or fmt.zero == "int":  # round first, then add the integer zero: ties of w/s go to even
            q = round_integers(x, fmt.rounding, generator)
            q = q if zero is None else q + zero
        else:
            q = round_integers(x + zero, fmt.rounding, generator)
        return (q.clamp(bottom, top) - bottom).to(torch.uint8)
    x = x if zero is None else x + zero
    return nearest(x, fmt.levels.table().to(w.device) if table is None else table, fmt.rounding, generator)


def from_codes(codes: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", table: "Tensor | None" = None) -> Tensor:
    """w_hat = (levels[code] - zero) * scale, float32. table: (blocks, L), one row of levels per block, for k-means."""
    if table is not None:
        value = table.gather(-1, codes.long()) if table.ndim > 1 else table[codes.long()]
    elif fmt.levels.is_integer_range:
        value = codes.float() + fmt.levels.values[0]
    else:
        value = fmt.levels.table().to(codes.device)[codes.long()]
    return (value if zero is None else value - zero) * scale


def absmax(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> "tuple[Tensor, Tensor | None]":
    return round_scale(w.abs().amax(1, keepdim=True) / fmt.levels.reach, fmt.scale_dtype), None


def minmax(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> "tuple[Tensor, Tensor | None]":
    return _from_range(*_range(w, fmt), fmt)


def mean(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> "tuple[Tensor, Tensor | None]":
    return round_scale(w.abs().mean(1, keepdim=True), fmt.scale_dtype), None


def median(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> "tuple[Tensor, Tensor | None]":
    return round_scale(w.abs().quantile(0.5, dim=1, keepdim=True), fmt.scale_dtype), None


def mx(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> "tuple[Tensor, Tensor | None]":
    top = int(torch.frexp(torch.tensor(fmt.levels.values[-1]))[1])
    largest = w.abs().amax(1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - top)
    return round_scale(torch.where(largest > 0, scale, torch.zeros_like(scale)), fmt.scale_dtype), None


def search(w: Tensor, fmt: "Format", importance: "Tensor | None" = None, norm: float = GPTQ_NORM) -> "tuple[Tensor, Tensor | None]":
    """The best of 80 shrunken ranges, block by block; the unshrunken range is the first candidate, so the error never grows."""
    low, high = _range(w, fmt)
    best, kept = None, None
    for p in SHRINKS:
        scale, zero = _from_range(low * p, high * p, fmt)
        error = _error(w, scale, zero, fmt, importance, norm)
        if best is None or kept is None:
            best, kept = error, (scale, zero)
            continue
        better = error < best
        best = torch.where(better, error, best)
        kept = (torch.where(better, scale, kept[0]), None if zero is None else torch.where(better, zero, kept[1]))
    assert kept is not None
    return kept


def lstsq(w: Tensor, fmt: "Format", importance: "Tensor | None" = None, rounds: int = 10) -> "tuple[Tensor, Tensor | None]":
    """Search with norm 2, then alternate codes and closed-form scale while the squared error falls (it cannot rise)."""
    scale, zero = search(w, fmt, importance, norm=2.0)
    h = torch.ones_like(w) if importance is None else importance
    error = _error(w, scale, zero, fmt, importance, 2.0)
    for _ in range(rounds):
        level = from_codes(to_codes(w, scale, zero, fmt), torch.ones_like(scale), None, fmt)
        new_scale, new_zero = _closed_form(w, level, h, zero, fmt)
        new_error = _error(w, new_scale, new_zero, fmt, importance, 2.0)
        better = new_error < error
        if not bool(better.any()):
            break
        error, scale = torch.where(better, new_error, error), torch.where(better, new_scale, scale)
        zero = None if zero is None else torch.where(better, new_zero, zero)
    return scale, zero


def _closed_form(w: Tensor, level: Tensor, h: Tensor, zero: "Tensor | None", fmt: "Format") -> "tuple[Tensor, Tensor | None]":
    """argmin over s (and a real zero) of sum h (s (l - z) - w)^2 for fixed levels l."""
    if fmt.zero == "real":  # w = s l + o, o = -s z: weighted linear regression of w on l
        total = h.sum(1, keepdim=True).clamp(min=1e-30)
        w_bar, l_bar = (h * w).sum(1, keepdim=True) / total, (h * level).sum(1, keepdim=True) / total
        s = (h * (w - w_bar) * (level - l_bar)).sum(1, keepdim=True) / (h * (level - l_bar) ** 2).sum(1, keepdim=True).clamp(min=1e-30)
        s = round_scale(s.clamp(min=0), fmt.scale_dtype)
        return s, (l_bar - w_bar / s.clamp(min=1e-30)).half().float()
    level = level if zero is None else level - zero
    s = (h * w * level).sum(1, keepdim=True) / (h * level**2).sum(1, keepdim=True).clamp(min=1e-30)
    return round_scale(s.clamp(min=0), fmt.scale_dtype), zero


def _range(w: Tensor, fmt: "Format") -> tuple[Tensor, Tensor]:
    """The ends that the levels must cover. GPTQ's conventions: an integer zero wants 0 inside; an all-zero block becomes -1 .. 1."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if fmt.zero == "none":
        largest = w.abs().amax(1, keepdim=True)
        return -largest, largest
    if fmt.zero == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    return low, high


def _from_range(low: Tensor, high: Tensor, fmt: "Format") -> "tuple[Tensor, Tensor | None]":
    bottom, top = fmt.levels.values[0], fmt.levels.values[-1]
    if fmt.zero == "none":
        return round_scale(high / fmt.levels.reach, fmt.scale_dtype), None
    scale = round_scale((high - low) / (top - bottom), fmt.scale_dtype)
    if fmt.zero == "real" and bool((scale == 0).any()):  # a constant block: one level, moved onto it
        scale = torch.where(scale > 0, scale, round_scale(high.abs(), fmt.scale_dtype))
    zero = bottom - low / torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, zero.round().clamp(bottom, top) if fmt.zero == "int" else zero.half().float()


def _error(w: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", importance: "Tensor | None", norm: float) -> Tensor:
    error = from_codes(to_codes(w, scale, zero, fmt), scale, zero, fmt).sub_(w).abs_().pow_(norm)
    return (error if importance is None else error * importance).sum(1, keepdim=True)


RULES: dict[str, Rule] = {r.__name__: r for r in (absmax, minmax, mean, median, search, lstsq, mx)}  # type: ignore[misc]
