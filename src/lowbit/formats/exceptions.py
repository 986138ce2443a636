"""Exceptions: a few weights of a matrix in a part of their own, the dense part fitted without them.

    w_hat = exceptions at the masked places, dense part elsewhere

Outliers stretch the range of a low-bit grid; taking them out costs the index of their places (see `masks`) and their
own codes. They are plain 16- or 32-bit numbers ("raw_fp16"), or codes of any format whose scales are per row, per
group or per tensor; a row has as many exceptions as it has. `with_part` takes codes and grid that a solver has found;
codes as wide as the dense ones may stand among those (ICQuant: a second grid of the same bits costs no codes).

Sources: Dettmers 2023 (SpQR, arXiv:2306.03078) for outliers in 16 bits; Li 2025 (ICQuant, arXiv:2505.00850) for a
second grid.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats.format import TENSOR, Format, Grid, encode, fit
from lowbit.formats.masks import encode_mask
from lowbit.formats.packing import pack
from lowbit.formats.tensor import (
    RAW_DTYPES,
    Part,
    QuantizedTensor,
    block_of_each,
    float_matrix,
    importance_matrix,
    matrix_shape,
    quantize,
    stored_grid,
)


def split_quantize(
    w: Tensor,
    mask: Tensor,
    dense: Format,
    exceptions: "Format | str" = "raw_fp16",
    codec: str = "auto",
    importance: "Tensor | None" = None,
    generator: "torch.Generator | None" = None,
) -> QuantizedTensor:
    """Quantize w in two parts: `dense`, fitted on the unmasked weights, and `exceptions` at the masked places.

    w, mask, importance: one shape, (out, ...); mask is bool. exceptions: a format with blocks channel or tensor, or
    "raw_fp16", "raw_bf16", "raw_fp32". codec: see `masks.encode_mask`. The dense code at a masked place is the
    nearest to 0, so that a kernel may add the exceptions as a correction. Raises FormatError and ShapeError as
    `quantize` does.
    """
    _same_shape(w, mask)
    h = torch.ones(w.shape, dtype=torch.float32, device=w.device) if importance is None else importance
    qt = quantize(float_matrix(w).reshape(w.shape).masked_fill(mask, 0), dense, h.masked_fill(mask, 0), generator)
    if dense.rounding == "stochastic":  # a drawn code need not be the nearest to 0
        qt = _nearest_to_zero(qt, mask.reshape(qt.matrix_shape))
    return with_exceptions(qt, w, mask, exceptions, codec, importance, generator)


def _nearest_to_zero(qt: QuantizedTensor, places: Tensor) -> QuantizedTensor:
    fmt, grid, codes = qt.format, qt.grid(), qt.part_codes()
    at_zero = encode(torch.zeros_like(fmt.blocks.split(codes), dtype=torch.float32), grid, fmt.with_(rounding="even"))
    codes = torch.where(places, fmt.blocks.merge(at_zero, *codes.shape), codes)
    return QuantizedTensor.from_codes(codes, grid, fmt, qt.shape)


def with_exceptions(
    qt: QuantizedTensor,
    w: Tensor,
    mask: Tensor,
    exceptions: "Format | str" = "raw_fp16",
    codec: str = "auto",
    importance: "Tensor | None" = None,
    generator: "torch.Generator | None" = None,
) -> QuantizedTensor:
    """`qt` with one part more: the weights of `w` at the masked places. The dense codes stay as a solver left them.

    Raises FormatError where the mask overlaps an earlier part.
    """
    _same_shape(w, mask)
    places = _places(qt, mask)
    meta, tensors = encode_mask(places, codec)
    matrix = float_matrix(w)
    if isinstance(exceptions, str):
        tensors["values"] = _raw(matrix[places], exceptions)
    else:
        weights = None if importance is None else importance_matrix(importance, w)
        tensors |= _coded(matrix, places, exceptions, weights, generator)
    return QuantizedTensor(qt.shape, (*qt.parts, Part(exceptions, tensors, meta)))


def with_part(
    qt: QuantizedTensor,
    mask: Tensor,
    fmt: "Format | str",
    grid: "Grid | None",
    values: "Tensor | None" = None,
    codec: str = "auto",
) -> QuantizedTensor:
    """`qt` with one part more, of which a solver has found everything.

    mask: (out, in) bool; grid: of every block of fmt, None where fmt is a raw dtype's name; values: (count,) codes
    (uint8) or raw numbers in row-major order, or None for codes that stand among the dense part's. Raises FormatError
    where the mask overlaps an earlier part.
    """
    places = _places(qt, mask)
    meta, tensors = encode_mask(places, codec)
    if isinstance(fmt, str) or grid is None:
        assert isinstance(fmt, str) and values is not None
        return QuantizedTensor(qt.shape, (*qt.parts, Part(fmt, tensors | {"values": _raw(values, fmt)}, meta)))
    if values is not None:
        tensors["codes"] = pack(values, fmt.levels.bits, fmt.levels.packing)
    part = Part(fmt, tensors | stored_grid(grid, fmt, fmt.blocks.grid(*qt.matrix_shape)), meta)
    return QuantizedTensor(qt.shape, (*qt.parts, part))


def _places(qt: QuantizedTensor, mask: Tensor) -> Tensor:
    """The mask as (out, in). Raises ShapeError where it is of another size, FormatError where it overlaps a part."""
    if mask.numel() != qt.numel or len(mask) != qt.shape[0]:
        raise ShapeError(f"the mask is {tuple(mask.shape)}, the quantized tensor {qt.shape}.")
    places = mask.reshape(qt.matrix_shape)
    if any(bool((qt.mask(i) & places).any()) for i in range(qt.n_base, len(qt.parts))):
        raise FormatError("the mask overlaps an earlier part's: parts are disjoint.")
    return places


def _raw(values: Tensor, name: str) -> Tensor:
    if name not in RAW_DTYPES:
        raise FormatError(f"unknown exceptions {name!r}: use a Format, or one of {', '.join(RAW_DTYPES)}.")
    stored = values.to(RAW_DTYPES[name])
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(
            f"an exception of {float(values.abs().max()):.3g} does not fit {name}: use raw_bf16 or raw_fp32."
        )
    return stored


def _coded(
    matrix: Tensor, places: Tensor, fmt: Format, importance: "Tensor | None", generator: "torch.Generator | None"
) -> dict[str, Tensor]:
    """Codes in row-major order, and scales. Rows are padded with weights of importance 0, which no rule sees."""
    if fmt.blocks.rows != 1 and fmt.blocks != TENSOR:
        raise FormatError(
            f"exceptions share scales per row, group or tensor: use {fmt.levels.name}-channel or -tensor."
        )
    rows_cols = fmt.blocks.grid(*matrix.shape)  # places in row-major order are in the order of these blocks
    counts = block_of_each(places, fmt).bincount(minlength=rows_cols[0] * rows_cols[1])
    width = int(counts.max()) if counts.numel() else 0
    here = torch.arange(width, device=matrix.device) < counts[:, None]  # (rows, width): one True per exception
    w = matrix.new_zeros(here.shape).masked_scatter(here, matrix[places])
    h = torch.ones_like(w) if importance is None else w.masked_scatter(here, importance[places])
    grid = fit(w, fmt, h.masked_fill(~here, 0))
    codes = encode(w, grid, fmt, generator)[here]
    packed = pack(codes, fmt.levels.bits, fmt.levels.packing)
    return {"codes": packed} | stored_grid(grid, fmt, rows_cols)


def _same_shape(w: Tensor, mask: Tensor) -> None:
    matrix_shape(tuple(w.shape))
    if mask.shape != w.shape or mask.dtype != torch.bool:
        raise ShapeError(f"the mask is {tuple(mask.shape)} {mask.dtype}, needed {tuple(w.shape)} torch.bool.")
