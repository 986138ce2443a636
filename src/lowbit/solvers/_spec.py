"""The row a solver adds to the table of methods, and what it returns.

    solver: (w (out, in) float32, statistics or None, format, options) -> Solution

Rows of w are independent under one Gram matrix, so layers that share their input are solved stacked, and the solution
is cut by rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Grid, QuantizedTensor, decode
from lowbit.statistics import LayerStatistics


@dataclass(frozen=True)
class Solution:
    """codes (out, in) uint8, the grid of its blocks in row-major order, the format, and what the report should know."""

    codes: Tensor
    grid: Grid
    format: Format
    notes: dict[str, Any] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> "Solution":
        """The solution of w[start:stop]; only for formats whose blocks are one row high."""
        across = self.format.blocks.grid(*self.codes.shape)[1]
        grid = self.grid.take(slice(start * across, stop * across))
        return Solution(self.codes[start:stop], grid, self.format, self.notes)

    def quantized(self, shape: "tuple[int, ...] | None" = None) -> QuantizedTensor:
        return QuantizedTensor.from_codes(self.codes, self.grid, self.format, shape)

    def w_hat(self) -> Tensor:
        """The dequantized matrix (out, in), float32."""
        blocks = self.format.blocks
        return blocks.merge(decode(blocks.split(self.codes), self.grid, self.format), *self.codes.shape)


Solver = Callable[..., Solution]


@dataclass(frozen=True)
class Spec:
    """One method.

    format:  template of the default format
    options: the keyword defaults that `--set` and recipes may change
    """

    name: str
    title: str
    source: str
    solve: Solver
    format: str  # e.g. "uint{bits}-{blocks}-search"
    needs_data: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    smooth: "Callable[[list[Tensor], LayerStatistics, Format], Tensor] | None" = None  # AWQ: per-input-channel scaling
    kind: str = "solver"

    def default_format(self, bits: int, group: int) -> Format:
        """The method's own format at a width and group size (-1: one group per row)."""
        return Format.parse(self.format.format(bits=bits, blocks="channel" if group == -1 else f"g{group}"))


def empty_grid(n: int, fmt: Format) -> Grid:
    """A grid of n blocks to be filled in place."""
    zero = torch.zeros(n, 1, dtype=torch.float32) if fmt.zero != "none" else None
    return Grid(torch.zeros(n, 1, dtype=torch.float32), zero)
