"""The row a solver adds to the table of methods, and what it returns.

    solver: (w (out, in) float32, statistics or None, format, options) -> Solution

Rows of w are independent under one Gram matrix, so layers that share their input are solved stacked, and the solution
is cut by rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Grid, QuantizedTensor, decode, with_part
from lowbit.statistics import LayerStatistics


@dataclass(frozen=True)
class Exceptions:
    """A further part of a solution: weights in a format of their own.

    mask (out, in) bool; the grid of every block of the format, None where that is a raw dtype's name; values (count,)
    in row-major order: codes (uint8) or raw numbers, None where the codes stand among the dense ones.
    """

    mask: Tensor
    format: "Format | str"
    grid: "Grid | None" = None
    values: "Tensor | None" = None
    codec: str = "auto"

    def rows(self, start: int, stop: int) -> "Exceptions":
        """Those of rows start to stop; only for formats whose blocks are one row high."""
        grid = self.grid
        if grid is not None and isinstance(self.format, Format):
            across = self.format.blocks.grid(*self.mask.shape)[1]
            grid = grid.take(slice(start * across, stop * across))
        before, until = int(self.mask[:start].sum()), int(self.mask[:stop].sum())
        values = None if self.values is None else self.values[before:until]
        return replace(self, mask=self.mask[start:stop], grid=grid, values=values)


@dataclass(frozen=True)
class Solution:
    """codes (out, in) uint8, the grid of its blocks in row-major order, the format, and what the report should know.

    exceptions: further parts, disjoint; the codes at their places are free, or theirs
    """

    codes: Tensor
    grid: Grid
    format: Format
    notes: dict[str, Any] = field(default_factory=dict)
    exceptions: tuple[Exceptions, ...] = ()

    def rows(self, start: int, stop: int) -> "Solution":
        """The solution of w[start:stop]; only for formats whose blocks are one row high."""
        across = self.format.blocks.grid(*self.codes.shape)[1]
        grid = self.grid.take(slice(start * across, stop * across))
        exceptions = tuple(e.rows(start, stop) for e in self.exceptions)
        return Solution(self.codes[start:stop], grid, self.format, self.notes, exceptions)

    def quantized(self, shape: "tuple[int, ...] | None" = None) -> QuantizedTensor:
        qt = QuantizedTensor.from_codes(self.codes, self.grid, self.format, shape)
        for e in self.exceptions:
            qt = with_part(qt, e.mask, e.format, e.grid, e.values, e.codec)
        return qt

    def w_hat(self) -> Tensor:
        """The dequantized matrix (out, in), float32."""
        if self.exceptions:
            return self.quantized().dequantize()
        blocks = self.format.blocks
        return blocks.merge(decode(blocks.split(self.codes), self.grid, self.format), *self.codes.shape)


Solver = Callable[..., Solution]


@dataclass(frozen=True)
class Spec:
    """One method.

    format:  template of the default format
    bits, group: of the default format, where a recipe says nothing
    uses_gram: whether it takes a Gram matrix of another kind (output-adaptive statistics) as well
    widths:  the only bits the method has; empty for all
    options: the keyword defaults that `--set` and recipes may change
    alone: each layer is solved by itself, never stacked with those that share its input
    averages: of its option `average`, those that a goal chooses from; empty for methods whose codes have one width
    reorders: a block's hidden channels are reordered, sensitive ones first, before its layers are solved
    """

    name: str
    title: str
    source: str
    solve: Solver
    format: str  # e.g. "uint{bits}-{blocks}-search"
    needs_data: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    smooth: "Callable[[list[Tensor], LayerStatistics, Format], Tensor] | None" = None  # AWQ: per-input-channel scaling
    tune: "Callable[..., dict[str, Solution]] | None" = None  # a block's solutions against the block's float outputs
    kind: str = "solver"
    bits: int = 4
    group: int = 64
    uses_gram: bool = False
    widths: tuple[int, ...] = ()
    alone: bool = False
    averages: tuple[float, ...] = ()
    reorders: bool = False

    def default_format(self, bits: int, group: int) -> Format:
        """The method's own format at a width and group size (-1: one group per row).

        Raises FormatError for a width that the method does not have.
        """
        if self.widths and bits not in self.widths:
            have = " or ".join(map(str, self.widths))
            raise FormatError(f"{self.name} has codes of {have} bits, not {bits}: leave --bits out.")
        return Format.parse(self.format.format(bits=bits, blocks="channel" if group == -1 else f"g{group}"))


def empty_grid(n: int, fmt: Format) -> Grid:
    """A grid of n blocks to be filled in place."""
    zero = torch.zeros(n, 1, dtype=torch.float32) if fmt.zero != "none" else None
    return Grid(torch.zeros(n, 1, dtype=torch.float32), zero)
