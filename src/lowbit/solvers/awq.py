"""AWQ: scale salient input channels up before rounding, fold the scale into the layer before, then clip.

    scale: t = max(a^alpha, 1e-4) / sqrt(max t * min t),  a = mean |x|,  alpha in 0, 1/20 .. 19/20,
           keep the least  tr[(Q_t - W) H (Q_t - W)^T]
    clip:  per group, c = absmax (1 - i/20), i = 0 .. 9,
           keep the least  (Q - W)_g H_gg (Q - W)_g^T

Q_t(W) = RTN(W t) / t. The published search measures the loss at the end of the attention or MLP module. Here it is the
output of the layers that share the input, which the Gram matrix gives exactly and without another forward pass. The
published clip leaves queries and keys out; here every layer is clipped, each row of a group on its own.
Folding divides the weight (and bias) of the norm before, or the rows of the producing linear layer where its shape
allows; where nothing can take the scale, alpha is 0.
Source: Lin 2023 (arXiv:2306.00978), mit-han-lab/llm-awq. Bits as RTN.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics, output_error


def smooth(weights: list[Tensor], statistics: LayerStatistics, fmt: Format, grid: int = 20) -> Tensor:
    """The best input scaling t (in,) for layers that share their input. alpha = 0 (t = 1) is among the candidates."""
    w = torch.cat(weights)
    best, kept = float("inf"), torch.ones(w.shape[1], dtype=torch.float32)
    for i in range(grid):
        t = channel_scale(statistics.abs_mean, i / grid)
        try:
            w_hat = _rtn(w * t, fmt) / t
        except FormatError:  # a scale too large for its dtype: no candidate
            continue
        error = output_error(w, w_hat, statistics.gram)
        if error < best:
            best, kept = error, t
    return kept


def channel_scale(a: Tensor, alpha: float) -> Tensor:
    """a^alpha, normalised so that largest * smallest = 1; ones at alpha = 0 or where all channels are alike."""
    t = a.clamp(min=1e-12).pow(alpha).clamp(min=1e-4)
    return t / (t.max() * t.min()).sqrt()


def solve(w: Tensor, statistics: "LayerStatistics | None", fmt: Format, *, clip: bool = True) -> Solution:
    """Round w (out, in), already scaled, with clipped ranges. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("awq needs calibration text: add --data FILE, or use --method rtn or hqq.")
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    if clip and fmt.blocks.rows == 1:
        grid = _clip(blocks, grid, w.shape[0], fmt, statistics.gram)
    return Solution(fmt.blocks.merge(encode(blocks, grid, fmt), *w.shape), grid, fmt)


def _clip(blocks: Tensor, grid: Grid, out: int, fmt: Format, gram: Tensor) -> Grid:
    """Shrink the range of each group while its own partial output error falls."""
    size = blocks.shape[1]
    across = len(blocks) // out
    h = torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(across)])
    limit = blocks.abs().amax(1, keepdim=True)
    best, kept = _group_error(blocks, grid, fmt, h), grid
    for i in range(1, 10):
        candidate = fit(blocks.clamp(-limit * (1 - i / 20), limit * (1 - i / 20)), fmt)
        error = _group_error(blocks, candidate, fmt, h)
        kept = candidate.where((error < best)[:, None], kept)
        best = torch.minimum(error, best)
    return kept


def _group_error(blocks: Tensor, grid: Grid, fmt: Format, h: Tensor) -> Tensor:
    d = (decode(encode(blocks, grid, fmt), grid, fmt) - blocks).reshape(-1, len(h), blocks.shape[1]).transpose(0, 1)
    return ((d @ h) * d).sum(-1).T.reshape(-1)


def _rtn(w: Tensor, fmt: Format) -> Tensor:
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    return fmt.blocks.merge(decode(encode(blocks, grid, fmt), grid, fmt), *w.shape)


SPEC = Spec(
    name="awq",
    title="AWQ: activation-aware channel scaling and clipping",
    source="Lin 2023, arXiv:2306.00978",
    solve=solve,
    format="uint{bits}-{blocks}",
    needs_data=True,
    options={"clip": True},
    smooth=smooth,
)
