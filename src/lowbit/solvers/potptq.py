"""PoTPTQ: powers of two with a sign, scales in two steps.

    levels   s * (+-2^E),  E = 0 .. 2^(b-1) - 1, no zero (+1 at 0);     decoding adds E to the exponent of s
    step 1   s = s0 * beta, s0 = max |w| / (2^q - 1), q = 2^(b-1) - 1;  beta in .01, .02 .. 2.00 of least squared error
    step 2   s <- s (1 + gamma): minimise  tr[(W - Q) H (W - Q)^T] / tr[W H W^T] + ridge / 2 mean gamma^2  with Adam,
             codes taken anew in every step, no gradient through them; the best step of each row is kept

Codes are the nearest level; rounding log2 |w| instead, as published, is up to 6% worse. Step 2 sees the calibration
through the Gram matrix: the same loss as over the tokens, at the cost of one product a step. Without statistics step 1
stands alone.
Bits: b + 16 / group.
Source: Wang 2025 (PoTPTQ, arXiv:2507.11959), abstract; formulas after third-party implementations that cite it, with
lr 5e-3 and ridge 1e-2; the number of steps is ours.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Grid, decode, encode
from lowbit.formats.stores import round_scale
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics, drift_target

BETAS = [i / 100 for i in range(1, 201)]
CHUNK = 1 << 16  # weights searched at a time


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    steps: int = 30,
    lr: float = 5e-3,
    ridge: float = 1e-2,
    drift: bool = True,
) -> Solution:
    """Quantize w (out, in). Raises FormatError for formats that are not powers of two."""
    if not fmt.levels.name.startswith("pot") or fmt.blocks.rows != 1:
        raise FormatError(f"potptq needs powers of two and blocks of one row, not {fmt}: e.g. pot3nz-g128.")
    w = drift_target(w, statistics) if drift and statistics is not None else w
    blocks = fmt.blocks.split(w)
    rows = max(CHUNK // max(blocks.shape[1], 1), 1)
    scale = torch.cat([first_scale(blocks[i : i + rows], fmt) for i in range(0, len(blocks), rows)])
    if statistics is not None:
        scale = refined(w, scale, fmt, statistics.gram, steps, lr, ridge)
    grid = Grid(scale)
    return Solution(fmt.blocks.merge(encode(blocks, grid, fmt), *w.shape), grid, fmt)


def first_scale(w: Tensor, fmt: Format) -> Tensor:
    """Step 1: (blocks, 1), rounded as stored. The scale that fits the largest weight to the largest level is among
    the candidates.
    """
    largest, top = w.abs().amax(1, keepdim=True), fmt.levels.values[-1]
    best = torch.full_like(largest, torch.inf)
    kept = torch.zeros_like(largest)
    for s in (largest / top, *(largest / max(top - 1, 1) * beta for beta in BETAS)):
        stored = round_scale(s, fmt.scale_dtype)
        grid = Grid(stored)
        error = (decode(encode(w, grid, fmt), grid, fmt) - w).square().sum(1, keepdim=True)
        kept = torch.where(error < best, stored, kept)
        best = torch.minimum(error, best)
    return kept


def refined(w: Tensor, scale: Tensor, fmt: Format, gram: Tensor, steps: int, lr: float, ridge: float) -> Tensor:
    """Step 2: scales (blocks, 1) of least output error among those that Adam passes, row by row."""
    out, in_ = w.shape
    groups, start = fmt.blocks.grid(out, in_)[1], scale.reshape(out, -1)
    energy = ((w @ gram) * w).sum().clamp(min=1e-30) / max(out, 1)  # of a row, in the mean
    gamma, best, kept = torch.zeros_like(start), torch.full((out,), torch.inf), start
    first, second = torch.zeros_like(gamma), torch.zeros_like(gamma)
    for step in range(steps + 1):
        s = round_scale((start * (1 + gamma)).clamp(min=0), fmt.scale_dtype)
        level = _levels(w, s, fmt)
        d = (level * s[..., None]).reshape(out, in_) - w
        dh = d @ gram
        error = (dh * d).sum(1)
        kept = torch.where((error < best)[:, None], s, kept)
        best = torch.minimum(error, best)
        slope = 2 * (dh.reshape(out, groups, -1) * level).sum(2) * start / energy + ridge * gamma / groups
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
        unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12
        gamma = gamma - lr * first / (1 - 0.9 ** (step + 1)) / unbiased
    return kept.reshape(-1, 1)


def _levels(w: Tensor, s: Tensor, fmt: Format) -> Tensor:
    """(out, groups, size): the level of each weight, without its scale."""
    grid = Grid(s.reshape(-1, 1))
    codes = encode(fmt.blocks.split(w), grid, fmt)
    return decode(codes, Grid(torch.ones_like(grid.scale)), fmt).reshape(*s.shape, -1)


SPEC = Spec(
    name="potptq",
    title="PoTPTQ: power-of-two levels, scales in two steps",
    source="Wang 2025, arXiv:2507.11959",
    solve=solve,
    uses_gram=True,
    format="pot{bits}nz-{blocks}",
    options={"steps": 30, "lr": 5e-3, "ridge": 1e-2, "drift": True},
    bits=3,
    widths=(2, 3, 4),
)
