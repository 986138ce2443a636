"""Tiles of different widths as one kernel weight: their level sets united, scale and zero per row and group.

    w_hat[n, k] = (union[code'[n, k]] - zero[n, g]) * scale[n, g]

uint2, uint3 and uint4 tiles are 4-bit codes to the kernel, int2 and int3 3-bit ones, and a tile of nobody has scale 0:
the values are those of the tiles, bit for bit, and the time that of the widest. In memory (not in the file) every tile
takes the width of the union. Tiles whose levels do not fit, because every block has a table of its own or because more
than 256 levels meet, are left to the exceptions.
"""

from math import gcd

import torch
from torch import Tensor

from lowbit.formats import QuantizedTensor, put_tiles

MOST_LEVELS = 256


def fitting(qt: QuantizedTensor) -> list[int]:
    """The tile parts whose levels the union takes, in their order."""
    union = torch.empty(0)
    parts: list[int] = []
    for i in range(qt.n_base):
        levels = _levels(qt, i)
        wider = union if levels is None else torch.cat([union, levels]).unique()
        if levels is not None and len(wider) <= MOST_LEVELS:
            union, parts = wider, [*parts, i]
    return parts


def merged(qt: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes (out, in) uint8, union (1, levels), scale and zero (out, G) float32 of the parts that fit."""
    (out, in_), (rows, cols), parts = qt.matrix_shape, qt.tiles or (1, 1), fitting(qt)
    grids = {i: _per_row(qt, i) for i in parts}
    group = gcd(cols, *(cols // scale.shape[1] for scale, _ in grids.values()))
    tables = [level for i in parts if (level := _levels(qt, i)) is not None]
    union = torch.cat([torch.zeros(1 if not tables else 0), *tables]).unique()
    codes = torch.zeros(out, in_, dtype=torch.uint8)
    scale, zero = torch.zeros(out, in_ // group), torch.zeros(out, in_ // group)
    for i in parts:
        owned, levels = qt.owned_tiles(i), _levels(qt, i)
        assert levels is not None
        put_tiles(
            codes, owned, (rows, cols), torch.searchsorted(union, levels).to(torch.uint8)[qt.part_codes(i).long()]
        )
        for whole, part in zip((scale, zero), grids[i]):
            put_tiles(whole, owned, (rows, cols // group), part.repeat_interleave(cols // group // part.shape[1], 1))
    return codes, union[None], scale, zero if bool(zero.any()) else torch.empty(0, 0)


def left_out(qt: QuantizedTensor) -> Tensor:
    """(out, in) bool: the tiles of parts that do not fit."""
    mask = torch.zeros(qt.matrix_shape, dtype=torch.bool)
    for i in set(range(qt.n_base)) - set(fitting(qt)) if qt.tiles else ():
        mask |= qt.mask(i)
    return mask


def _levels(qt: QuantizedTensor, i: int) -> "Tensor | None":
    """The one table of part i in the order of its codes, or None where blocks have their own."""
    fmt, grid = qt.stack(i).format, qt.grid(i)
    if grid.table is None:
        return fmt.levels.table().float()
    return grid.table if grid.table.ndim == 1 else grid.table[0] if len(grid.table) == 1 else None


def _per_row(qt: QuantizedTensor, i: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of part i for each row of its stack, (tiles * rows, groups in a tile)."""
    stack, grid = qt.stack(i), qt.grid(i)
    down, across = stack.format.blocks.grid(*stack.matrix_shape)
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    repeat = stack.matrix_shape[0] // max(down, 1)
    scale, zero = (t.float().reshape(down, across).repeat_interleave(repeat, 0) for t in (grid.scale, zero))
    return scale, zero
