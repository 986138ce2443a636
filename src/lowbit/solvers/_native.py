"""A block of columns in C++ (csrc/columns.cpp): what the loops of `_columns` and `_descent` do on plain grids.

The same formulas on the same numbers as the Python loops, strip by strip in the cache. Without the compiled extension,
and for grids it does not know (tables of their own, other roundings, blocks of several rows), the Python loops run.
"""

import torch
from torch import Tensor

from lowbit.formats import Format, Grid
from lowbit.formats._native import extension
from lowbit.formats.levels import thresholds

NONE = torch.empty(0, 0, dtype=torch.float32)
LIFT = 64  # times the largest level


class NativeGrids:
    """The grids of a layer as the extension reads them: one row per group, transposed to (groups, out).

    group_of: (in,) group of each visited column
    """

    def __init__(self, grid: Grid, fmt: Format, group_of: Tensor, out: int) -> None:
        def across(t: Tensor) -> Tensor:
            return t.reshape(out, -1).T.contiguous()

        self.group_of = group_of.to(torch.int32)
        self.scale = across(grid.scale)
        self.divisor = torch.where(self.scale > 0, self.scale, 1.0)
        self.zero = NONE if grid.zero is None else across(grid.zero)
        self.values = fmt.levels.table() if grid.table is None else grid.table
        integer = fmt.levels.is_integer_range
        self.thresholds = torch.empty(0, dtype=torch.float32) if integer else thresholds(self.values, fmt.rounding)
        self.real_zero = grid.zero is not None and fmt.zero != "int"

    def feedback(self, columns: Tensor, errors: Tensor, u: Tensor, codes: Tensor, start: int) -> None:
        """Round columns (n, out), write errors and codes; u (n, n) upper."""
        self._run(columns, errors, NONE, u, codes, start)

    def descend(self, columns: Tensor, gradient: Tensor, moved: Tensor, h: Tensor, codes: Tensor, start: int) -> None:
        """Move rounded columns (n, out) to the levels nearest to their optimum, with h (n, n)."""
        self._run(columns, gradient, moved, h, codes, start)

    def _run(self, columns: Tensor, other: Tensor, moved: Tensor, u: Tensor, codes: Tensor, start: int) -> None:
        tensors = columns, other, moved, u.contiguous(), codes, self.group_of[start : start + len(columns)]
        grids = self.scale, self.divisor, self.zero, self.thresholds, self.values
        arrays = (t.numpy() for t in (*tensors, *grids))
        extension().solve_columns(*arrays, self.real_zero, torch.get_num_threads())


class NativePair(NativeGrids):
    """Two shared tables as one: the second's levels stand `lift` above the first's, and so do its weights, by their
    zero. One "group" a column, so that each weight has the scale of its own part. Levels come back to 1e-5. A weight
    that error feedback has driven half a lift away would take a level of the wrong table: `strayed` says so, and the
    block must be done again in Python.

    scale, other_scale, masked: (in, out) in visiting order; masked where the second table counts
    """

    def __init__(self, scale: Tensor, other_scale: Tensor, masked: Tensor, table: Tensor, other_table: Tensor) -> None:
        self.strayed, lift = False, LIFT * float(torch.cat([table, other_table]).abs().max().clamp(min=1e-30))
        self.group_of = torch.arange(len(masked), dtype=torch.int32)
        self.scale = torch.where(masked, other_scale, scale).contiguous()
        self.divisor = torch.where(self.scale > 0, self.scale, 1.0)
        self.zero = masked.float() * lift
        self.values = torch.cat([table, other_table + lift])
        between = torch.tensor([lift / 2])
        self.thresholds = torch.cat([thresholds(table), between, thresholds(other_table) + lift])
        self.real_zero = True
        self.first, self.second = len(table), masked.to(torch.uint8) * len(table)

    def _run(self, columns: Tensor, other: Tensor, moved: Tensor, u: Tensor, codes: Tensor, start: int) -> None:
        super()._run(columns, other, moved, u, codes, start)
        codes.sub_(self.second[start : start + len(columns)])
        self.strayed = bool((codes >= self.first).any())  # unsigned: too small wraps around to large


def knows(fmt: Format) -> bool:
    """Whether the extension can round on this format's grids."""
    one_table = bool(fmt.levels.values) or fmt.scale_rule == "shared"
    plain = fmt.blocks.rows == 1 and one_table and fmt.rounding == "even"
    return plain and extension() is not None
