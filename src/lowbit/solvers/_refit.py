"""Closed-form scales for fixed codes, under the full Gram matrix.

A row's output error is quadratic in its group scales s: with l_g the row's levels in group g (zero elsewhere),

    (w - sum_g s_g l_g)^T H (w - sum_g s_g l_g)   ->   A s = b,   A_gh = l_g^T H l_h,   b_g = l_g^T H w

One small system per row, solved in a batch; the best of old and new is kept, so the error cannot rise. Derived.
Memory: `chunk` rows at a time, each groups * in floats; at most WORK floats for wide layers.
"""

import torch
from torch import Tensor

from lowbit.formats import Format, Grid, decode
from lowbit.formats.stores import round_scale

WORK = 1 << 25  # floats of the largest intermediate
LARGEST = {"fp32": torch.finfo(torch.float32).max, "bf16": torch.finfo(torch.bfloat16).max, "fp16": 65504.0}


def refit_scales(
    w: Tensor, codes: Tensor, grid: Grid, fmt: Format, gram: Tensor, damping: float, chunk: int = 256
) -> Tensor:
    """New scales (blocks, 1), rounded as stored. w (out, in), codes (out, in); blocks one row high."""
    out, in_ = w.shape
    groups = fmt.blocks.grid(out, in_)[1]
    levels = decode(fmt.blocks.split(codes), Grid(torch.ones_like(grid.scale), grid.zero), fmt).reshape(out, groups, -1)
    h = gram.clone()
    h.diagonal().add_(damping * gram.diagonal().mean())
    old = grid.scale.reshape(out, groups)
    chunk = max(min(chunk, WORK // max(groups * in_, 1)), 1)
    new = torch.cat(
        [_solve_rows(w[i : i + chunk], levels[i : i + chunk], h, old[i : i + chunk]) for i in range(0, out, chunk)]
    )
    new = round_scale(torch.where(new <= LARGEST[fmt.scale_dtype], new, old), fmt.scale_dtype)
    better = _errors(w, levels, new, h) < _errors(w, levels, old, h)
    return torch.where(better[:, None], new, old).reshape(-1, 1)


def _solve_rows(w: Tensor, levels: Tensor, h: Tensor, old: Tensor) -> Tensor:
    """The scales (rows, groups) of some rows.

    Groups whose solution is not positive, or whose levels are all 0, keep the old one.
    """
    rows, groups, size = levels.shape
    hl = torch.einsum("rgi,gihj->rghj", levels, h.reshape(groups, size, groups, size))
    a = torch.einsum("rghj,rhj->rgh", hl, levels)
    b = torch.einsum("rghj,rhj->rg", hl, w.reshape(rows, groups, size))
    ridge = a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * 1e-6
    a = a + torch.diag_embed(ridge[:, None].expand(-1, groups))
    s = torch.linalg.solve(a, b)
    return torch.where(torch.isfinite(s) & (s > 0) & (old > 0), s, old)


def _errors(w: Tensor, levels: Tensor, scale: Tensor, h: Tensor) -> Tensor:
    d = w - (levels * scale[..., None]).reshape(w.shape)
    return ((d @ h) * d).sum(1)
