"""Weights on two grids: a dense one, and a second one at masked places (outliers, salient weights).

    w_hat = decode_2(codes) where the mask says so, decode_1(codes) elsewhere

Both grids are found once, on the original weights, and stay; codes are the nearest ones, or those of the column loop
with error feedback. Methods differ in the mask and in the two grids only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Blocks, Format, Grid, decode, encode, fit
from lowbit.solvers._columns import GridHooks, inverse_cholesky, solve_columns
from lowbit.solvers._descent import descend
from lowbit.solvers._native import NativePair, extension
from lowbit.solvers._refit import Coded, refit
from lowbit.solvers._spec import Exceptions, Solution
from lowbit.statistics import LayerStatistics


@dataclass(frozen=True)
class Split:
    """mask (out, in) bool and the two grids; the second one's blocks are one row high.

    shared: the second part's codes stand among the dense ones (both formats then have as many bits)
    """

    mask: Tensor
    format: Format
    grid: Grid
    other_format: Format
    other_grid: Grid
    shared: bool = False


MakeSplit = Callable[["Tensor | None"], Split]  # importance of each input (in,), or None -> the split


def solve_split(
    w: Tensor,
    make: MakeSplit,
    statistics: "LayerStatistics | None" = None,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refitted: bool = True,
    sweeps: int = 0,
) -> Solution:
    """Quantize w (out, in) on the grids that `make` finds.

    With statistics by the column loop: `make` is given 1 / U_jj^2, what a unit of rounding error costs in column j
    when the columns after it make up for it as well as they can. Then closed-form scales and levels, and `sweeps` of
    coordinate descent over the codes, each with a refit. Without statistics each code is the nearest one.
    """
    if statistics is None:
        split = make(None)
        return _solution(w, split, _nearest(w, split), {})
    gram, hooks = statistics.gram, SplitHooks(make)
    loop = solve_columns(w, gram, hooks, damping=damping, act_order=act_order)
    notes = {"damping": loop.damping, "dead": loop.dead}
    split, codes = _refitted(w, hooks.split, hooks.result_codes(), gram, loop.damping, refitted)
    for _ in range(sweeps):
        hooks.use_split(split)
        descend(w, _solution(w, split, codes, notes).w_hat(), gram, hooks, damping=loop.damping)
        split, codes = _refitted(w, split, hooks.result_codes(), gram, loop.damping, refitted)
    return _solution(w, split, codes, notes)


def _nearest(w: Tensor, split: Split) -> Tensor:
    def codes(fmt: Format, grid: Grid) -> Tensor:
        return fmt.blocks.merge(encode(fmt.blocks.split(w), grid, fmt), *w.shape)

    dense = codes(split.format, split.grid)
    return torch.where(split.mask, codes(split.other_format, split.other_grid), dense)


def _solution(w: Tensor, split: Split, codes: Tensor, notes: dict[str, Any]) -> Solution:
    if not bool(split.mask.any()):
        return Solution(codes, split.grid, split.format, notes)
    values = None if split.shared else codes[split.mask]
    if not split.shared:  # what stands at the masked places of the dense part must be codes of its own
        zeros = torch.zeros_like(split.format.blocks.split(w))
        idle = split.format.blocks.merge(encode(zeros, split.grid, split.format), *w.shape)
        codes = torch.where(split.mask, idle, codes)
    exceptions = Exceptions(split.mask, split.other_format, split.other_grid, values)
    return Solution(codes, split.grid, split.format, notes, (exceptions,))


def _refitted(
    w: Tensor, split: Split, codes: Tensor, gram: Tensor, damping: float, wanted: bool
) -> tuple[Split, Tensor]:
    """The closed-form scales and levels of both parts for the codes that were found; tables stay sorted."""
    parts = [
        Coded(codes, split.grid, split.format, ~split.mask),
        Coded(codes, split.other_grid, split.other_format, split.mask),
    ]
    if not wanted or not all(p.can_refit for p in parts):
        return split, codes
    dense, other = refit(w, parts, gram, damping)
    return replace(split, grid=dense.grid, other_grid=other.grid), torch.where(split.mask, other.codes, dense.codes)


class SplitHooks(GridHooks):
    """The column loop's hooks for two static grids."""

    def __init__(self, make: MakeSplit) -> None:
        self.make = make

    def block_size(self, wanted: int) -> int:
        return wanted

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None:
        importance = torch.empty(len(order))
        importance[order] = u.diagonal() ** -2
        split = self.make(importance)
        super().__init__(split.format, *w.shape, static=True)
        self.order, self.group_of = order, (order // self.cols).tolist()
        self.other_of = (order // split.other_format.blocks.size(*w.shape)[1]).tolist()
        self.masked = split.mask[:, order].T.contiguous()
        self.use_split(split)

    def use_split(self, split: Split) -> None:
        """Round on these grids from now on; the mask stays."""
        self.split = split
        self.use(split.grid)
        self.other = columns_of(split.other_grid, split.other_format, *split.mask.shape)
        formats = (split.format, split.other_format)
        if all(f.scale_rule == "shared" and f.blocks.rows == 1 for f in formats) and extension() is not None:
            self.native = self._pair()

    def _pair(self) -> NativePair:
        scale = torch.stack([self.per_group[g].scale[:, 0] for g in self.group_of])
        other = torch.stack([self.other[g].scale[:, 0] for g in self.other_of])
        tables = self.split.grid.table, self.split.other_grid.table
        return NativePair(scale, other, self.masked, *tables)  # type: ignore[arg-type]

    def group(self, j: int, columns: Tensor) -> None: ...

    def feedback(self, i1: int, i2: int, columns: Tensor, errors: Tensor, u: Tensor) -> bool:
        before = columns[i1:i2].clone()
        done = super().feedback(i1, i2, columns, errors, u)
        return done and not self._strayed((columns[i1:i2], before))

    def descend(self, i1: int, i2: int, columns: Tensor, gradient: Tensor, moved: Tensor, h: Tensor) -> bool:
        before = columns[i1:i2].clone(), gradient[i1:i2].clone()
        done = super().descend(i1, i2, columns, gradient, moved, h)
        return done and not self._strayed((columns[i1:i2], before[0]), (gradient[i1:i2], before[1]))

    def _strayed(self, *changed: tuple[Tensor, Tensor]) -> bool:
        """Whether the compiled loop has mixed up the tables; what it changed is then as it was."""
        if not (isinstance(self.native, NativePair) and self.native.strayed):
            return False
        for now, before in changed:
            now.copy_(before)
        return True

    def quantize(self, j: int, column: Tensor) -> Tensor:
        q, dense, mask = super().quantize(j, column), self.codes[j].clone(), self.masked[j]
        grid, fmt = self.other[self.other_of[j]], self.split.other_format
        codes = encode(column[:, None], grid, fmt)
        self.codes[j] = torch.where(mask, codes[:, 0], dense)
        return torch.where(mask, decode(codes, grid, fmt)[:, 0], q)


def columns_of(grid: Grid, fmt: Format, out: int, in_: int) -> list[Grid]:
    """The grid of every group of columns: one entry a row."""
    (down, across), rows = fmt.blocks.grid(out, in_), fmt.blocks.size(out, in_)[0]
    spread = grid.map(lambda t: t.reshape(down, across, -1).repeat_interleave(rows, 0))
    return [spread.map(lambda t, g=g: t[:, g].contiguous()) for g in range(across)]  # type: ignore[misc]


def row_importance(importance: "Tensor | None", w: Tensor) -> Tensor:
    """(out, in): importance of the inputs for every row; ones without any."""
    return torch.ones_like(w) if importance is None else importance.expand_as(w)


def fit_masked(w: Tensor, mask: Tensor, fmt: Format, h: Tensor) -> Grid:
    """The grid of fmt for the masked weights only, weighted with h (out, in)."""
    blocks = fmt.blocks
    return fit(blocks.split(w.masked_fill(~mask, 0)), fmt, blocks.split(h.masked_fill(~mask, 0)))


def saliency(w: Tensor, gram: Tensor, damping: float) -> Tensor:
    """(out, in) w^2 / U_jj^2: what it costs to lose a weight when the columns after it make up for it."""
    return w.square() / inverse_cholesky(gram, damping)[0].diagonal().square()


def top(score: Tensor, count: int) -> Tensor:
    """(rows, n) bool: the `count` largest of each row; of equal ones the first."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :count], True)


ROW = Blocks(1, -1)
