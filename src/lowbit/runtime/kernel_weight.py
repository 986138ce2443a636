"""A quantized tensor as the kernels take it: rows starting on bytes, float32 scales of shape (N, G), one table.

w_hat = dense part (`dense_weight`, `int8_weight`) + sparse correction at further parts' places (`exceptions`)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats import QuantizedTensor
from lowbit.runtime import ops
from lowbit.runtime.kernels import pack_rows
from lowbit.runtime.slabs import Slabs, slabs
from lowbit.runtime.tiled import left_out, merged


class KernelWeight(NamedTuple):
    """Arguments of `ops`: codes (N, row_bytes), table (1 or N, 2**bits), scale and zero (N, G)."""

    codes: Tensor
    table: Tensor
    scale: Tensor
    zero: Tensor
    bits: int


class Int8Weight(NamedTuple):
    """Arguments of `ops.linear_int8`: the kernel layout, one-dimensional uint8, and its number of rows."""

    packed: Tensor
    out_features: int


class Exceptions(NamedTuple):
    """Places of the further parts in row-major order, and what is to be added there to the dense part."""

    row: Tensor
    col: Tensor
    value: Tensor


def dense_weight(qt: QuantizedTensor) -> "KernelWeight | Slabs":
    """What multiplies with the dense part: one kernel call, or several where every group has a table."""
    if qt.tiles:
        return _tiled_weight(*merged(qt))
    table = qt.grid().table
    several = table is not None and table.ndim == 2 and len(table) > qt.matrix_shape[0]
    return slabs(qt, KernelWeight) if several else kernel_weight(qt)


def _tiled_weight(codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor) -> KernelWeight:
    bits = max(1, (table.shape[1] - 1).bit_length())
    return KernelWeight(pack_rows(codes, bits), _full_table(table, bits), scale, zero, bits)


def kernel_weight(qt: QuantizedTensor) -> KernelWeight:
    """The dense part of a quantized tensor (on the CPU) as kernel arguments."""
    (out, in_), fmt, grid = qt.matrix_shape, qt.format, qt.grid()
    _, block_cols = fmt.blocks.size(out, in_)
    groups = in_ // block_cols
    scale, zero = (
        torch.empty(0, 0, dtype=torch.float32) if t is None else _per_row(t, out, groups)
        for t in (grid.scale, grid.zero)
    )
    if grid.table is None:
        table = fmt.levels.table()[None]
    elif grid.table.ndim == 1:
        table = grid.table[None]
    else:
        table = grid.table if len(grid.table) in (1, out) else grid.table.repeat_interleave(out // len(grid.table), 0)
    return KernelWeight(_row_codes(qt), _full_table(table, fmt.levels.bits), scale, zero, fmt.levels.bits)


def _per_row(blocks: Tensor, out: int, groups: int) -> Tensor:
    """(blocks, 1), row-major over the block matrix -> (out, groups) float32: each row gets its tile's number."""
    grid = blocks.float().reshape(-1, groups)
    return grid.repeat_interleave(out // max(len(grid), 1), 0).contiguous()


def _row_codes(qt: QuantizedTensor) -> Tensor:
    (out, in_), levels = qt.matrix_shape, qt.format.levels
    if levels.packing == "bits" and in_ * levels.bits % 8 == 0:  # rows already start on bytes: no copy
        return qt.parts[0].tensors["codes"].reshape(out, in_ * levels.bits // 8)
    return pack_rows(qt.part_codes(), levels.bits)


def _full_table(table: Tensor, bits: int) -> Tensor:
    """Level sets of fewer than 2**bits levels: codes past the last one never occur; they mean the last level."""
    missing = 2**bits - table.shape[1]
    return torch.cat([table, table[:, -1:].expand(-1, missing)], 1).float().contiguous()


def int8_weight(weight: "KernelWeight | Slabs", columns: int) -> "Int8Weight | Slabs":
    """The kernel layout of a weight (out, columns)."""
    if isinstance(weight, Slabs):
        return Slabs(weight.columns, tuple(int8_weight(part, weight.columns) for part in weight.parts), int8=True)
    return Int8Weight(ops.pack_int8(*weight, columns), len(weight.codes))


def exceptions(qt: QuantizedTensor) -> "Exceptions | None":
    """The sparse correction w_hat - (dense part) at the places of the further parts, or None without any."""
    mask = left_out(qt)
    dense = qt.base().dequantize().reshape(mask.shape).masked_fill(mask, 0) if qt.tiles or len(qt.parts) > 1 else mask
    for i in range(qt.n_base, len(qt.parts)):
        mask = mask | qt.mask(i)
    if not bool(mask.any()):
        return None
    row, col = mask.nonzero(as_tuple=True)
    return Exceptions(row, col, qt.dequantize().reshape(mask.shape)[mask] - dense[mask])


def rows_of(w: "KernelWeight | Slabs", rows: slice) -> "KernelWeight | Slabs":
    """The weight of some outputs only, as a convolution's groups want it."""
    if isinstance(w, Slabs):
        return w._replace(parts=tuple(rows_of(part, rows) for part in w.parts))
    table = w.table if len(w.table) == 1 else w.table[rows]
    return KernelWeight(w.codes[rows], table, w.scale[rows], w.zero[rows] if w.zero.numel() else w.zero, w.bits)


def exceptions_of(e: Exceptions, rows: slice) -> Exceptions:
    mine = (e.row >= rows.start) & (e.row < rows.stop)
    return Exceptions(e.row[mine] - rows.start, e.col[mine], e.value[mine])
