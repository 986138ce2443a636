"""Closed-form scales and levels for fixed codes, under the full Gram matrix.

A row's output error is quadratic in whatever multiplies its codes: scales of groups, levels of a table. With unknowns v
and what each stands for, w_hat = sum_m v_m l_m (l_m: the row's levels in one group, or the places of one code),

    (w - sum_m v_m l_m)^T H (w - sum_m v_m l_m)   ->   A v = b,   A_mn = l_m^T H l_n,   b_m = l_m^T H w

One small system per row, solved in a batch; the best of old and new is kept, so the error cannot rise. Derived.
Memory: `chunk` rows at a time, each unknowns * in floats; at most WORK floats for wide layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, Grid, decode
from lowbit.formats.format import dual_grid
from lowbit.formats.stores import round_scale

WORK = 1 << 21  # floats of the largest intermediate: what the caches hold
LARGEST = {"fp32": torch.finfo(torch.float32).max, "bf16": torch.finfo(torch.bfloat16).max, "fp16": 65504.0}


@dataclass(frozen=True)
class Coded:
    """Weights of one format: mask (out, in) bool or None for all, codes (out, in) uint8, grid (blocks one row high)."""

    codes: Tensor
    grid: Grid
    format: Format
    mask: "Tensor | None" = None

    @property
    def can_refit(self) -> bool:
        """Whether its numbers are free, one by one, and belong to one row."""
        return self.format.blocks.rows == 1 and (self.has_tables or self.format.scale_dtype in LARGEST)

    @property
    def has_tables(self) -> bool:
        return self.format.scale_rule == "kmeans"

    def old(self) -> Tensor:
        """(out, unknowns) the numbers as they are: levels code by code, or scales."""
        out, groups = len(self.codes), self.format.blocks.grid(*self.codes.shape)[1]
        if self.format.scale_rule == "dual":
            ends = self.grid.table[:, [-1, 0]].reshape(out, groups, 2)  # type: ignore[index]
            return ends.transpose(1, 2).reshape(out, -1)
        if self.has_tables:
            return self.grid.table.reshape(out, groups, -1).transpose(1, 2).reshape(out, -1)  # type: ignore[union-attr]
        return self.grid.scale.reshape(out, groups)

    def planes(self, rows: slice) -> Tensor:
        """(planes, rows, in) what the unknowns multiply; a plane holds one unknown for each group of columns."""
        codes, across = self.codes[rows], self.format.blocks.grid(*self.codes.shape)[1]
        if self.format.scale_rule == "dual":
            levels = torch.stack(self._binary_planes(rows, across))
        elif self.has_tables:
            every = torch.arange(2**self.format.levels.bits, dtype=torch.uint8)
            levels = (codes == every[:, None, None]).float()
        else:
            grid = self.grid.take(slice(rows.start * across, rows.stop * across))
            grid = grid._replace(scale=torch.ones_like(grid.scale))
            blocks = self.format.blocks
            levels = blocks.merge(decode(blocks.split(codes), grid, self.format), *codes.shape)[None]
        return levels if self.mask is None else levels * self.mask[rows]

    def with_values(self, new: Tensor) -> "Coded":
        """The same codes with new numbers; tables stay sorted, so codes may be renamed."""
        out, groups = len(self.codes), self.format.blocks.grid(*self.codes.shape)[1]
        if self.format.scale_rule == "dual":
            return self._with_planes(new.reshape(out, 2, groups).transpose(1, 2).reshape(-1, 2))
        if not self.has_tables:
            return Coded(self.codes, self.grid._replace(scale=new.reshape(-1, 1)), self.format, self.mask)
        table, order = new.reshape(out, -1, groups).transpose(1, 2).reshape(out * groups, -1).sort(1)
        renamed = order.argsort(1).to(torch.uint8).gather(1, self.format.blocks.split(self.codes).long())
        codes = self.format.blocks.merge(renamed, *self.codes.shape)
        return Coded(codes, self.grid._replace(table=table), self.format, self.mask)

    def _binary_planes(self, rows: slice, across: int) -> tuple[Tensor, Tensor]:
        """(rows, in) each, 0 or 1: where a1 and where a2 is in the weight."""
        codes = self.format.blocks.split(self.codes[rows])
        table = self.grid.table[rows.start * across : rows.stop * across]  # type: ignore[index]
        both = torch.where(table[:, :1] + table[:, -1:] >= 0, 2, 1)  # the place of a1 + a2 among the sorted levels
        planes = ((codes == end) | (codes == both) for end in (3, 0))
        first, second = (self.format.blocks.merge(p.float(), *self.codes[rows].shape) for p in planes)
        return first, second

    def _with_planes(self, new: Tensor) -> "Coded":
        """New a1 and a2 (blocks, 2); blocks whose signs would turn keep the old ones. Codes follow the levels."""
        old = self.grid.table[:, [-1, 0]]  # type: ignore[index]
        good = (new[:, :1] > 0) & (new[:, 1:] < 0)
        a = torch.where(good, new, old)
        across = self.format.blocks.grid(*self.codes.shape)[1]
        b1, b2 = (self.format.blocks.split(p) for p in self._binary_planes(slice(0, len(self.codes)), across))
        order = torch.where(a.sum(1, keepdim=True) >= 0, torch.tensor([1, 0, 3, 2]), torch.tensor([2, 0, 3, 1]))
        codes = order.gather(1, (2 * b1 + b2).long()).to(torch.uint8)  # order[2 b1 + b2]: the place of that level
        grid = dual_grid(a[:, :1].contiguous(), a[:, 1:].contiguous())
        return Coded(self.format.blocks.merge(codes, *self.codes.shape), grid, self.format, self.mask)


def refit(w: Tensor, parts: list[Coded], gram: Tensor, damping: float, chunk: int = 256) -> list[Coded]:
    """The parts with the numbers that least change the outputs, rounded as stored. w (out, in)."""
    h = gram.clone()
    h.diagonal().add_(damping * gram.diagonal().mean())
    olds = [p.old() for p in parts]
    groups = [p.format.blocks.grid(*w.shape)[1] for p in parts]
    unknowns = sum(o.shape[1] for o in olds)
    chunk = max(min(chunk, WORK // max(unknowns * w.shape[1], 1)), 1)
    w_h = w @ h
    new = []
    for i in range(0, len(w), chunk):
        rows = slice(i, min(i + chunk, len(w)))
        planes = [(plane, g) for p, g in zip(parts, groups) for plane in p.planes(rows)]
        old = torch.cat([o[rows] for o in olds], 1)
        a, b = _normal_equations(w_h[rows], planes, h)
        found = _stored(_solved(a, b, old), old, parts, olds)
        better = _change(a, b, old, found) < 0
        new.append(torch.where(better[:, None], found, old))
    values = torch.cat(new).split([o.shape[1] for o in olds], 1)
    return [p.with_values(v) for p, v in zip(parts, values)]


def refit_scales(
    w: Tensor, codes: Tensor, grid: Grid, fmt: Format, gram: Tensor, damping: float, chunk: int = 256
) -> Tensor:
    """New scales (blocks, 1), rounded as stored. w (out, in), codes (out, in); blocks one row high."""
    return refit(w, [Coded(codes, grid, fmt)], gram, damping, chunk)[0].grid.scale


def _stored(new: Tensor, old: Tensor, parts: list[Coded], olds: list[Tensor]) -> Tensor:
    """Rounded as the file keeps them. Scales stay positive, and where a number does not fit the old one stays."""
    kept = []
    for p, n, o in zip(parts, *(t.split([o.shape[1] for o in olds], 1) for t in (new, old))):
        if p.has_tables or p.format.scale_rule == "dual":
            kept.append(torch.where(n.abs() <= LARGEST["fp16"], n, o).half().float())
        else:
            fits = (n > 0) & (o > 0) & (n <= LARGEST[p.format.scale_dtype])
            kept.append(round_scale(torch.where(fits, n, o), p.format.scale_dtype))
    return torch.cat(kept, 1)


def _normal_equations(w_h: Tensor, planes: list[tuple[Tensor, int]], h: Tensor) -> tuple[Tensor, Tensor]:
    """A (rows, unknowns, unknowns) and b (rows, unknowns) of some rows; w_h (rows, in) = w H."""
    lh = torch.cat([_times(plane, g, h) for plane, g in planes], 1)  # (rows, unknowns, in)
    a = torch.cat([_sums(lh * plane[:, None], g) for plane, g in planes], 2)
    b = torch.cat([_sums((w_h * plane)[:, None], g)[:, 0] for plane, g in planes], 1)
    return a, b


def _solved(a: Tensor, b: Tensor, old: Tensor) -> Tensor:
    """The numbers (rows, unknowns). Those that nothing uses keep the old one."""
    unused = a.diagonal(dim1=1, dim2=2) <= 0
    ridge = a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * 1e-6
    a = a + torch.diag_embed(ridge[:, None].expand(-1, b.shape[1]))
    v = torch.linalg.solve(a, b)
    return torch.where(torch.isfinite(v) & ~unused, v, old)


def _change(a: Tensor, b: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """(rows,) error(new) - error(old), from the step alone: the errors themselves nearly cancel."""
    step = (new - old)[:, :, None]
    downhill = b[:, :, None] - a @ old[:, :, None]
    return (step * (a @ step - 2 * downhill)).sum((1, 2))


def _times(plane: Tensor, groups: int, h: Tensor) -> Tensor:
    """(rows, groups, in): each group's part of the plane, times H."""
    parts = plane.reshape(len(plane), groups, -1).transpose(0, 1)
    return torch.bmm(parts, h.reshape(groups, -1, len(h))).transpose(0, 1)


def _sums(x: Tensor, groups: int) -> Tensor:
    """(rows, unknowns, groups): sums over the columns of each group."""
    return x.reshape(*x.shape[:2], groups, -1).sum(3)
