"""Scale rules: how the scale (and zero) of a block is found.

    absmax      s = max|w| / reach                          nothing clips (an E8M0 scale is rounded up)
    minmax      s = (max - min) / (top - bottom), zero so that the ends meet; an integer zero keeps 0 inside the range
    mean        s = mean|w|          the least-squares scale of {-1, 1} (XNOR-Net); BitNet's ternary (arXiv:2402.17764)
                with a real zero     mu = mean w, s = mean|w - mu|, the level 0 at mu    (BiLLM, arXiv:2402.04291)
    median      s = median|w|        the L1 optimum; BitNet b1.58 Reloaded (arXiv:2407.09527)
    tbt         s = 4/3 mean|w|      ternary threshold 2/3 mean|w|                       (TBT, arXiv:2306.01841)
    twn         s = mean of the |w| above 0.7 mean|w|                                   (TWN, arXiv:1605.04711)
    search      shrink the absmax or min-max range by 1.00, 0.99 .. 0.21; keep the least sum |w_hat - w|**2.4 (GPTQ);
                unevenly spaced levels also try 1.02 .. 2.00
    lstsq       search with norm 2, then alternate codes and the closed form  s = sum h w l / sum h l**2
    mx          s = 2**(floor(log2 max|w|) - floor(log2 top))                           (OCP MX v1.0)

Each rule: (w (blocks, n) float32, format, importance (blocks, n) or None) -> (scale (blocks, 1), zero (blocks, 1) or
None), rounded as they will be stored. `importance` weighs the errors of search and lstsq, and every rule leaves out the
weights whose importance is 0. An all-zero block gets scale 0 (2**-127 in E8M0), which decodes to 0.

TWN itself also cuts at 0.7 mean|w|; codes here are always the nearest level, so the cut is at half the level, which can
only lower the error (0.1906 for 0.1918 on N(0, 1)). `threshold_codes` gives the codes of a chosen cut.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.formats import _native
from lowbit.formats.levels import nearest, round_integers, thresholds
from lowbit.formats.stores import power_of_two, round_scale

if TYPE_CHECKING:
    from lowbit.formats.format import Format

Found = tuple[Tensor, "Tensor | None"]
Rule = Callable[[Tensor, "Format", "Tensor | None"], Found]
ErrorsOf = Callable[[Tensor, Tensor, "Tensor | None", "Format", "Tensor | None", float], Tensor]
SHRINKS = [1 - i / 100 for i in range(80)]
STRETCHES = [1 + i / 50 for i in range(1, 51)]
GPTQ_NORM = 2.4
TINY = 1e-30
_CHUNK = 1 << 16  # weights searched at a time: what fits the second-level cache
_FARTHEST_ZERO = 1024  # steps from a real zero to the block, at most: beyond, fp16 cannot place it to half a step


def to_codes(
    w: Tensor,
    scale: Tensor,
    zero: "Tensor | None",
    fmt: "Format",
    generator: "torch.Generator | None" = None,
    table: "Tensor | None" = None,
) -> Tensor:
    """Codes (uint8) of w for given scales: nearest level of w / scale + zero. Shapes broadcast over blocks."""
    x = w / _divisor(scale)
    if fmt.levels.is_integer_range and table is None:
        bottom, top = fmt.levels.values[0], fmt.levels.values[-1]
        if zero is None or fmt.zero == "int":  # round first, then add the integer zero: ties of w/s go to even
            q = round_integers(x, fmt.rounding, generator)
            q = q if zero is None else q.add_(zero)
        else:
            q = round_integers(x.add_(zero), fmt.rounding, generator)
        return q.clamp_(bottom, top).sub_(bottom).to(torch.uint8)
    x = x if zero is None else x + zero
    return nearest(x, fmt.levels.table().to(w.device) if table is None else table, fmt.rounding, generator)


def from_codes(
    codes: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", table: "Tensor | None" = None
) -> Tensor:
    """w_hat = (levels[code] - zero) * scale, float32. table: (blocks, L) for k-means, one row of levels per block."""
    if table is not None:
        value = table.gather(-1, codes.long()) if table.ndim > 1 else table[codes.long()]
    elif fmt.levels.is_integer_range:
        value = codes.float() + fmt.levels.values[0]
    else:
        value = fmt.levels.table().to(codes.device)[codes.int()]
    return (value if zero is None else value - zero) * scale


def threshold_codes(w: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary by threshold: sign(w) where |w| > cut, else 0, with the least-squares level.

    w: (blocks, n), cut: (blocks, 1)   ->   codes (blocks, n) uint8, scale (blocks, 1) = mean of the |w| above the cut
    """
    keep = w.abs() > cut
    return (w.sign() * keep + 1).to(torch.uint8), _mean(w.abs(), keep)


# ---------------------------------------------------------------- closed rules


def absmax(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    largest = _only_present(w, importance).abs().amax(1, keepdim=True)
    return round_scale(largest / fmt.levels.reach, fmt.scale_dtype, up=True), None


def minmax(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    return _from_range(*_range(w, fmt, importance), fmt)


def mean(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    if fmt.zero == "none":
        return round_scale(_mean(w.abs(), importance), fmt.scale_dtype), None
    mu = _mean(w, importance)
    return _place(_mean((w - mu).abs(), importance), 0.0, mu, fmt)


def median(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    present = _present(importance)
    if present is None:
        present = torch.ones_like(w, dtype=torch.bool)
    ordered = w.abs().masked_fill(~present, torch.inf).sort(1).values
    n = present.sum(1, keepdim=True)
    middle = torch.lerp(ordered.gather(1, (n - 1) // 2), ordered.gather(1, n // 2), 0.5)
    return round_scale(middle, fmt.scale_dtype), None


def tbt(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    return round_scale(_mean(w.abs(), importance) * (4 / 3), fmt.scale_dtype), None


def twn(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    size = _only_present(w, importance).abs()
    above = size > 0.7 * _mean(size, importance)
    present = _present(importance)
    return round_scale(_mean(size, above if present is None else above & present), fmt.scale_dtype), None


def mx(w: Tensor, fmt: "Format", importance: "Tensor | None" = None) -> Found:
    largest = _only_present(w, importance).abs().amax(1, keepdim=True)
    top = torch.frexp(torch.tensor(fmt.levels.values[-1], dtype=torch.float32))[1].to(w.device)
    scale = power_of_two(torch.frexp(largest)[1] - top)  # frexp's exponents are both floor(log2) + 1
    return round_scale(torch.where(largest > 0, scale, 0.0), fmt.scale_dtype), None


# ---------------------------------------------------------------- searched rules


def search(w: Tensor, fmt: "Format", importance: "Tensor | None" = None, norm: float = GPTQ_NORM) -> Found:
    """The best of 80 shrunken ranges, block by block; the full range is the first candidate, so the error never grows.

    The ends shrink towards 0, and with a real zero towards the block's mean (0 may lie outside such a range). Unevenly
    spaced levels also try 50 stretched ranges: it can pay to leave the wide last gap unused (E3M2 loses 16% less).
    """
    errors_of = _native_errors if _native.knows(w, fmt) else _errors
    rows = max(_CHUNK // max(w.shape[1], 1), 1)
    found = [
        _search_chunk(w[i : i + rows], fmt, None if importance is None else importance[i : i + rows], norm, errors_of)
        for i in range(0, len(w), rows)
    ]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _search_chunk(w: Tensor, fmt: "Format", importance: "Tensor | None", norm: float, errors_of: ErrorsOf) -> Found:
    low, high = _range(w, fmt, importance)
    centre = _mean(w, importance) if fmt.zero == "real" else torch.zeros_like(low)
    shrinks = SHRINKS if fmt.levels.is_even else SHRINKS + STRETCHES
    p = torch.tensor(shrinks, dtype=torch.float32, device=w.device)[:, None, None]
    low, high = (torch.cat([x[None], centre + (x - centre) * p[1:]]) for x in (low, high))
    scale, zero = _from_range(low, high, fmt)  # (candidates, blocks, 1)
    best = errors_of(w, scale, zero, fmt, importance, norm).argmin(0)[None]  # the first of equal ones
    return scale.gather(0, best)[0], None if zero is None else zero.gather(0, best)[0]


def _errors(
    w: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", importance: "Tensor | None", norm: float
) -> Tensor:
    """(candidates, blocks, 1) what each scale (candidates, blocks, 1) of a block costs."""
    zeros = [None] * len(scale) if zero is None else zero
    return torch.stack([_error(w, s, z, fmt, importance, norm) for s, z in zip(scale, zeros)])


def _native_errors(
    w: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", importance: "Tensor | None", norm: float
) -> Tensor:
    """The same from the compiled extension; the power is exact to 1e-6, so near ties may fall otherwise."""
    ends = fmt.levels.values[0], fmt.levels.values[-1]
    return _native.scale_errors(w, importance, scale, zero, *ends, fmt.zero == "real", norm)


def lstsq(w: Tensor, fmt: "Format", importance: "Tensor | None" = None, rounds: int = 10) -> Found:
    """Search with norm 2, then alternate codes and closed-form scale while the squared error falls (it cannot rise)."""
    scale, zero = search(w, fmt, importance, norm=2.0)
    nearest_fmt = fmt.with_(rounding="even")
    h = torch.ones_like(w) if importance is None else importance
    error = _error(w, scale, zero, fmt, importance, 2.0)
    for _ in range(rounds):
        level = from_codes(to_codes(w, scale, zero, nearest_fmt), torch.ones_like(scale), None, fmt)
        new_scale, new_zero = _closed_form(w, level, h, zero, fmt)
        new_error = _error(w, new_scale, new_zero, fmt, importance, 2.0)
        better = new_error < error
        if not bool(better.any()):
            break
        error, scale = torch.where(better, new_error, error), torch.where(better, new_scale, scale)
        zero = _pick(better, new_zero, zero)
    return scale, zero


def _closed_form(w: Tensor, level: Tensor, h: Tensor, zero: "Tensor | None", fmt: "Format") -> Found:
    """argmin over s (and a real zero) of sum h (s (l - z) - w)^2 for fixed levels l."""

    def total(x: Tensor) -> Tensor:
        return (h * x).sum(1, keepdim=True)

    if fmt.zero == "real":  # w = s l + o, o = -s z: weighted linear regression of w on l
        weight = total(torch.ones_like(w)).clamp(min=TINY)
        w_bar, l_bar = total(w) / weight, total(level) / weight
        s = total((w - w_bar) * (level - l_bar)) / total((level - l_bar) ** 2).clamp(min=TINY)
        s = _far_enough(s.clamp(min=0), w_bar, fmt)
        return s, (l_bar - w_bar / _divisor(s)).half().float()
    level = level if zero is None else level - zero
    s = total(w * level) / total(level**2).clamp(min=TINY)
    return round_scale(s.clamp(min=0), fmt.scale_dtype), zero


def _error(
    w: Tensor, scale: Tensor, zero: "Tensor | None", fmt: "Format", importance: "Tensor | None", norm: float
) -> Tensor:
    """sum h |w_hat - w|**norm of each block, for the nearest codes."""
    if fmt.levels.is_integer_range:  # decode(encode(w)) without the codes in between
        bottom, top = fmt.levels.values[0], fmt.levels.values[-1]
        x = w / _divisor(scale)
        if zero is None:
            x.round_().clamp_(bottom, top)
        elif fmt.zero == "int":
            x.round_().clamp_(bottom - zero, top - zero)
        else:
            x.add_(zero).round_().clamp_(bottom, top).sub_(zero)
        x.mul_(scale).sub_(w)
    else:
        table = fmt.levels.table().to(w.device)
        x = w / _divisor(scale) if zero is None else (w / _divisor(scale)).add_(zero)
        x = table[torch.searchsorted(thresholds(table), x, out_int32=True)]
        x = (x if zero is None else x.sub_(zero)).mul_(scale).sub_(w)
    x = x.square_() if norm == 2 else x.abs_().log2_().mul_(norm).exp2_()  # quicker than pow, and 0 stays 0
    return (x if importance is None else x.mul_(importance)).sum(1, keepdim=True)


# ---------------------------------------------------------------- ranges, zeros, and weights left out


def _range(w: Tensor, fmt: "Format", importance: "Tensor | None") -> tuple[Tensor, Tensor]:
    """The ends that the levels must cover. An integer zero wants 0 inside; an all-zero block becomes -1 .. 1 (GPTQ)."""
    w = _only_present(w, importance)
    if fmt.zero == "none":
        largest = w.abs().amax(1, keepdim=True)
        return -largest, largest
    low, high = torch.aminmax(w, dim=1, keepdim=True)
    if fmt.zero == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
        empty = low == high
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    return low, high


def _from_range(low: Tensor, high: Tensor, fmt: "Format") -> Found:
    bottom, top = fmt.levels.values[0], fmt.levels.values[-1]
    if fmt.zero == "none":
        return round_scale(high / fmt.levels.reach, fmt.scale_dtype), None
    scale = (high - low) / (top - bottom)
    if fmt.zero == "real":
        return _place(scale, bottom, low, fmt)
    scale = round_scale(scale, fmt.scale_dtype)
    return scale, (bottom - low / _divisor(scale)).round_().clamp_(bottom, top)


def _place(scale: Tensor, level: float, value: Tensor, fmt: "Format") -> Found:
    """The stored scale and the real zero, in fp16, that put `level` at `value`."""
    scale = _far_enough(scale, value, fmt)
    return scale, (level - value / _divisor(scale)).half().float()


def _far_enough(scale: Tensor, value: Tensor, fmt: "Format") -> Tensor:
    """The stored scale, kept large enough that the zero of an (almost) constant block far from 0 fits fp16."""
    return round_scale(torch.maximum(scale, value.abs() / _FARTHEST_ZERO), fmt.scale_dtype)


def _present(importance: "Tensor | None") -> "Tensor | None":
    """Which weights count; None when all do."""
    return None if importance is None or bool((importance > 0).all()) else importance > 0


def _only_present(w: Tensor, importance: "Tensor | None") -> Tensor:
    """w with the left-out weights of each block replaced by one that counts: ranges do not see them."""
    present = _present(importance)
    if present is None:
        return w
    return torch.where(present, w, w.gather(1, present.to(torch.uint8).argmax(1, keepdim=True)))


def _mean(x: Tensor, importance: "Tensor | None") -> Tensor:
    """The plain mean over the weights that count."""
    present = _present(importance)
    if present is None:
        return x.mean(1, keepdim=True)
    return (x * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)


def _pick(better: Tensor, new: "Tensor | None", old: "Tensor | None") -> "Tensor | None":
    return old if new is None or old is None else torch.where(better, new, old)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, with 1 for 0: an all-zero block divides to 0."""
    return torch.where(scale > 0, scale, 1.0)


RULES: dict[str, Rule] = {r.__name__: r for r in (absmax, minmax, mean, median, tbt, twn, search, lstsq, mx)}
