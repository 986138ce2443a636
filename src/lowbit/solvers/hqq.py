"""HQQ: the zero point by half-quadratic splitting, without data.

    minimise over z  |W - W_r|_p^p,  p < 1,   W_q = clamp(round(W / s + z)),  W_r = (W_q - z) s,  s fixed
    E = shrink(W - W_r) = sign(d) relu(|d| - |d|^(p-1) / beta);   z = mean(W_q - (W - E) / s);   beta *= kappa

p = 0.7, beta = 10, kappa = 1.01, 20 iterations; stops when mean |W - W_r| no longer falls, and keeps the best zero seen
(the plain routine returns the one after the last, worse, update). The mean is over the whole matrix handed in, so rows
solved together stop together. The zero is real (fp16): b + 32 / group bits.
Source: Badri & Shaji 2023 (HQQ, mobiusml/hqq).
"""

import torch
from torch import Tensor

from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> Solution:
    """Quantize w (out, in); statistics are not used. The format needs a real zero ("uint4-g64-zreal")."""
    fmt = fmt if fmt.zero == "real" else fmt.with_(zero="real", scale_rule="minmax")
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    best, kept = _error(blocks, grid, fmt), grid
    for _ in range(iterations):
        grid = Grid(grid.scale, half_quadratic_step(blocks, grid, fmt, p, beta))
        beta *= kappa
        error = _error(blocks, grid, fmt)
        if float(error.mean()) >= float(best.mean()):
            break
        best, kept = error, grid
    return Solution(fmt.blocks.merge(encode(blocks, kept, fmt), *w.shape), kept, fmt)


def half_quadratic_step(w: Tensor, grid: Grid, fmt: Format, p: float, beta: float) -> Tensor:
    """One update of the zeros (blocks, 1), rounded to fp16 as stored.

    beta -> 0 gives the least-squares zero of the current codes.
    """
    codes = encode(w, grid, fmt)
    shrunk = shrink(w - decode(codes, grid, fmt), p, beta)
    step = torch.where(grid.scale > 0, grid.scale, torch.ones_like(grid.scale))
    levels = codes.float() + fmt.levels.values[0] if fmt.levels.is_integer_range else fmt.levels.table()[codes.long()]
    return (levels - (w - shrunk) / step).mean(1, keepdim=True).half().float()


def shrink(d: Tensor, p: float, beta: float) -> Tensor:
    """sign(d) relu(|d| - |d|^(p-1) / beta).

    0 at d = 0, where |d|^(p-1) is infinite. p = 1 is the soft threshold 1/beta.
    """
    size = d.abs()
    return torch.where(size > 0, d.sign() * (size - size.clamp(min=1e-30) ** (p - 1) / beta).clamp(min=0), 0.0)


def _error(w: Tensor, grid: Grid, fmt: Format) -> Tensor:
    return (w - decode(encode(w, grid, fmt), grid, fmt)).abs()


SPEC = Spec(
    name="hqq",
    title="Half-quadratic quantization",
    source="Badri & Shaji 2023, mobiusml.github.io/hqq_blog",
    solve=solve,
    format="uint{bits}-{blocks}-zreal",
    options={"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20},
)
