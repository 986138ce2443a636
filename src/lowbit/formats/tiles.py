"""Tiles of different widths within one matrix: every tile of rows x cols weights has one of a few formats.

    w (out, in) -> (out / rows, in / cols) tiles;    choice[i, j] = which format, or -1: the tile is 0 and costs nothing

Each format that occurs becomes one part: its tiles, stacked one below the other in row-major order into a matrix
(tiles * rows, cols), are an ordinary matrix to it, with blocks, scales and packing of its own. A bit a tile and part
says who owns it. Groups do not cross a tile's border, and `tile{rows}x{cols}` gives a tile one scale.

Source: Li 2026 (ScaleBITS, arXiv:2602.17698) for tiles that a matrix product can execute.
"""

from collections.abc import Sequence

from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats.format import Format, Grid, encode, fit
from lowbit.formats.masks import encode_tiles
from lowbit.formats.packing import pack
from lowbit.formats.tensor import (
    Part,
    QuantizedTensor,
    float_matrix,
    importance_matrix,
    matrix_shape,
    stored_grid,
)


def quantize_tiles(
    w: Tensor,
    tile: tuple[int, int],
    choice: Tensor,
    formats: Sequence[Format],
    importance: "Tensor | None" = None,
) -> QuantizedTensor:
    """Round-to-nearest with a format of its own for every tile.

    w, importance: (out, ...); tile: rows, cols; choice: (out / rows, in / cols) integers into formats, -1 for 0 bits.
    Raises ShapeError where tiles or blocks do not divide, FormatError as `quantize` does.
    """
    matrix = float_matrix(w)
    weights = None if importance is None else importance_matrix(importance, w)
    solved = []
    for i, fmt in enumerate(formats):
        owned = choice == i
        blocks = fmt.blocks.split(take_tiles(matrix, owned, tile))
        grid = fit(blocks, fmt, None if weights is None else fmt.blocks.split(take_tiles(weights, owned, tile)))
        n = int(owned.sum()) * tile[0]
        solved.append((fmt.blocks.merge(encode(blocks, grid, fmt), n, tile[1]), grid, fmt))
    return from_tiles(tuple(w.shape), tile, choice, solved)


def from_tiles(
    shape: tuple[int, ...], tile: tuple[int, int], choice: Tensor, solved: Sequence[tuple[Tensor, Grid, Format]]
) -> QuantizedTensor:
    """From what a solver found for each stack of tiles: (codes (tiles * rows, cols) uint8, grid, format).

    choice: as in `quantize_tiles`; formats without a tile leave no part. Raises FormatError where nothing is owned.
    """
    _check_choice(matrix_shape(shape), tile, choice, len(solved))
    parts = []
    for i, (codes, grid, fmt) in enumerate(solved):
        owned = choice == i
        if not bool(owned.any()):
            continue
        if codes.shape != (int(owned.sum()) * tile[0], tile[1]):
            raise ShapeError(f"codes of format {i} are {tuple(codes.shape)}, its {int(owned.sum())} tiles are {tile}.")
        meta, tensors = encode_tiles(owned, *tile)
        tensors["codes"] = pack(codes.contiguous(), fmt.levels.bits, fmt.levels.packing)
        parts.append(Part(fmt, tensors | stored_grid(grid, fmt, fmt.blocks.grid(*codes.shape)), meta))
    if not parts:
        raise FormatError("no tile has a format: choose at least one, or leave the layer out.")
    return QuantizedTensor(tuple(shape), tuple(parts))


def take_tiles(w: Tensor, owned: Tensor, tile: tuple[int, int]) -> Tensor:
    """w (out, in) -> the owned tiles one below the other, (tiles * rows, cols). owned: (out / rows, in / cols) bool."""
    rows, cols = tile
    _check_choice(tuple(w.shape), tile, owned, 2)
    tiles = w.reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols).transpose(1, 2)
    return tiles[owned].reshape(-1, cols)


def put_tiles(w: Tensor, owned: Tensor, tile: tuple[int, int], stack: Tensor) -> None:
    """The inverse of `take_tiles`: writes the stack into the owned tiles of w (contiguous), in place."""
    rows, cols = tile
    _check_choice(tuple(w.shape), tile, owned, 2)
    tiles = w.view(w.shape[0] // rows, rows, w.shape[1] // cols, cols).transpose(1, 2)
    tiles[owned] = stack.reshape(-1, rows, cols)


def _check_choice(matrix: "tuple[int, ...]", tile: tuple[int, int], choice: Tensor, n: int) -> None:
    rows, cols = tile
    if rows < 1 or cols < 1 or matrix[0] % rows or matrix[1] % cols:
        raise ShapeError(f"tiles of {rows} x {cols} do not divide a matrix {tuple(matrix)}: use sides that divide it.")
    want = (matrix[0] // rows, matrix[1] // cols)
    if tuple(choice.shape) != want:
        raise ShapeError(f"a choice for every tile is {want}, not {tuple(choice.shape)}.")
    if choice.numel() and (int(choice.max()) >= n or int(choice.min()) < -1):
        raise FormatError(f"a tile chooses format {int(choice.max())}; there are {n}, and -1 for a tile of zeros.")
