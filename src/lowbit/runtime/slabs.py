"""Weights with a table for every group of columns: one kernel call a group, each on its slab of columns.

    y = sum_g  x[:, g] @ w_hat[:, g].T          w_hat[n, g] = table_(n, g)[code]

The kernels know one table, or one a row; a slab of columns is a matrix of that kind. Slower than one call: for formats
of research (BiLLM, dual binarization), not for the fast ones.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.formats import QuantizedTensor
from lowbit.runtime import ops
from lowbit.runtime.kernels import pack_rows

SlabWeight = tuple[Tensor, Tensor, Tensor, Tensor, int]  # what a kernel of `ops` takes after x


class Slabs(NamedTuple):
    """parts: kernel arguments of each slab of `columns` columns; int8: whether they are those of the int8 kernel."""

    columns: int
    parts: tuple[Any, ...]
    int8: bool = False

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        kernel = ops.linear_int8 if self.int8 else ops.linear_float
        pieces = x.split(self.columns, -1)
        y = kernel(pieces[0].contiguous(), *self.parts[0])
        for piece, part in zip(pieces[1:], self.parts[1:]):
            y = y + kernel(piece.contiguous(), *part)
        return y


def slabs(qt: QuantizedTensor, kind: type) -> Slabs:
    """The dense part of a quantized tensor whose tables are per group; kind: the tuple of a kernel's arguments."""
    (out, in_), grid, codes = qt.matrix_shape, qt.grid(), qt.part_codes()
    columns = qt.format.blocks.size(out, in_)[1]
    assert grid.table is not None
    tables, none = grid.table.reshape(out, in_ // columns, -1), torch.empty(0, 0, dtype=torch.float32)
    ones, bits = torch.ones(out, 1, dtype=torch.float32), qt.format.levels.bits
    parts = tuple(
        kind(pack_rows(part.contiguous(), bits), tables[:, g].contiguous(), ones, none, bits)
        for g, part in enumerate(codes.split(columns, 1))
    )
    return Slabs(columns, parts)
