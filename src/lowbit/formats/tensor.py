"""Quantized tensors: packed codes, scales and format; possibly a sum of disjoint parts.

    w_hat = dense part everywhere, except where a later part's mask says "mine"

The first part covers the whole matrix. Every further part (exceptions: outliers, salient weights) has a mask, stored by a mask codec,
and values at the masked places in row-major order: codes with scales per tensor or per row, or plain fp16/bf16/fp32 numbers.
`tensors()` is exactly what a file holds, so `nbytes` and `bits_per_weight` are counted, not estimated.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats.blocks import Blocks
from lowbit.formats.format import Format, Grid, decode, encode, fit
from lowbit.formats.masks import decode_mask, mask_specs
from lowbit.formats.packing import pack, packed_bytes, unpack
from lowbit.formats.stores import load_scale, scale_specs, store_scale

RAW_DTYPES = {"raw_fp16": torch.float16, "raw_bf16": torch.bfloat16, "raw_fp32": torch.float32}
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Part:
    """One part: its format (or a raw dtype's name), the stored tensors, and for exceptions the mask's meta."""

    format: "Format | str"
    tensors: dict[str, Tensor]
    mask: "dict[str, Any] | None" = None

    def meta(self) -> dict[str, Any]:
        return {"format": str(self.format)} | ({"mask": self.mask} if self.mask else {})


@dataclass(frozen=True)
class QuantizedTensor:
    """shape: that of the float weight; parts[0] is dense. Immutable; device of the stored tensors."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def format(self) -> Format:
        """The dense part's format."""
        assert isinstance(self.parts[0].format, Format)
        return self.parts[0].format

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in): a convolution's in is in * kh * kw."""
        return matrix_shape(self.shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that would be written: codes, scales, zeros, tables, masks, padding."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / numel."""
        return 8 * self.nbytes / max(self.numel, 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: "codes", "scale", "zero", "table", ...; further parts under "part1_codes" and so on."""
        return {part_key(i, k): t for i, p in enumerate(self.parts) for k, t in p.tensors.items()}

    def meta(self) -> dict[str, Any]:
        """JSON-able description; with `tensors()` it is the whole quantized tensor."""
        return {"shape": list(self.shape), "parts": [p.meta() for p in self.parts]}

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Grid, fmt: Format, shape: "tuple[int, ...] | None" = None) -> "QuantizedTensor":
        """From codes (out, in) uint8 and the grid of its blocks in row-major order (as `fit(fmt.blocks.split(w), fmt)` gives)."""
        shape = tuple(shape or codes.shape)
        rows_cols = fmt.blocks.grid(*codes.shape)
        tensors = {"codes": pack(codes.contiguous(), fmt.levels.bits, fmt.levels.packing)}
        if grid.table is not None:
            return cls(shape, (Part(fmt, tensors | {"table": grid.table.half()}),))
        tensors |= store_scale(grid.scale.reshape(rows_cols), fmt.scale_dtype)
        if grid.zero is not None:
            zero = grid.zero.reshape(rows_cols)
            tensors["zero"] = pack(zero.to(torch.uint8), fmt.levels.bits) if fmt.zero == "int" else zero.half()
        return cls(shape, (Part(fmt, tensors),))

    @classmethod
    def from_tensors(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> "QuantizedTensor":
        """Rebuild from a file. Believes nothing: raises FormatError on a missing, superfluous, misshapen or impossible tensor."""
        shape = tuple(int(s) for s in meta["shape"])
        specs = tensor_specs(meta)
        if set(specs) != set(tensors):
            raise FormatError(f"tensors {sorted(tensors)} do not match the format, which needs {sorted(specs)}.")
        for key, (want, dtype) in specs.items():
            if tuple(tensors[key].shape) != want or tensors[key].dtype != dtype:
                found = f"{tuple(tensors[key].shape)} {tensors[key].dtype}"
                raise FormatError(f"tensor {key!r} is {found}, the format needs {want} {dtype}.")
        parts = tuple(
            Part(_parse_part(p["format"]), {k: tensors[part_key(i, k)] for k in _part_specs(p, shape)}, p.get("mask"))
            for i, p in enumerate(meta["parts"])
        )
        result = cls(shape, parts)
        result.check()
        return result

    def check(self) -> None:
        """Raise FormatError where a stored number cannot be: a code past the last level, a scale that is negative, NaN or infinite."""
        for i, part in enumerate(self.parts):
            for key, t in part.tensors.items():
                if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                    raise FormatError(f"tensor {part_key(i, key)!r} holds NaN or infinity.")
            if isinstance(part.format, Format):
                if "scale" in part.tensors and bool((load_scale(part.tensors, part.format.scale_dtype) < 0).any()):
                    raise FormatError(f"tensor {part_key(i, 'scale')!r} holds a negative scale.")
                codes, n_levels = self.part_codes(i), len(part.format.levels.values)
                if n_levels and codes.numel() and int(codes.max()) >= n_levels:
                    raise FormatError(f"tensor {part_key(i, 'codes')!r} holds code {int(codes.max())} of {n_levels} levels.")

    def part_codes(self, i: int = 0) -> Tensor:
        """Unpacked codes of part i: (out, in) for the dense part, (count,) for exceptions."""
        part = self.parts[i]
        assert isinstance(part.format, Format)
        n = part.mask["count"] if part.mask else self.numel
        codes = unpack(part.tensors["codes"], part.format.levels.bits, n, part.format.levels.packing)
        return codes if part.mask else codes.reshape(self.matrix_shape)

    def grid(self, i: int = 0) -> Grid:
        """Scale, zero and table of part i, one row per block, as float32."""
        part = self.parts[i]
        fmt = part.format
        assert isinstance(fmt, Format)
        if "table" in part.tensors:
            table = part.tensors["table"].float()
            return Grid(torch.ones(len(table), 1, device=table.device), None, table)
        scale = load_scale(part.tensors, fmt.scale_dtype).reshape(-1, 1)
        if fmt.zero == "none":
            return Grid(scale)
        zero = part.tensors["zero"]
        zero = unpack(zero, fmt.levels.bits, scale.numel()) if fmt.zero == "int" else zero
        return Grid(scale, zero.reshape(-1, 1).float())

    def mask(self, i: int) -> Tensor:
        """(out, in) bool: the places part i (i >= 1) owns."""
        part = self.parts[i]
        assert part.mask is not None
        return decode_mask(part.mask, {k: t for k, t in part.tensors.items() if k.startswith("mask")}, self.matrix_shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, in its own shape."""
        out, in_ = self.matrix_shape
        blocks = self.format.blocks
        codes = blocks.split(self.part_codes())
        w_hat = blocks.merge(decode(codes, self.grid(), self.format), out, in_)
        for i in range(1, len(self.parts)):
            mask = self.mask(i)
            w_hat[mask] = self._exceptions(i, mask)
        return w_hat.reshape(self.shape).to(dtype)

    def _exceptions(self, i: int, mask: Tensor) -> Tensor:
        """The float32 values of part i at its places, in row-major order."""
        part = self.parts[i]
        if isinstance(part.format, str):
            return part.tensors["values"].float()
        grid = self.grid(i)
        row = mask.nonzero()[:, 0] if part.format.blocks.rows == 1 else torch.zeros(part.mask["count"], dtype=torch.int64)  # type: ignore[index]
        return decode(self.part_codes(i).reshape(-1, 1), grid[row], part.format).reshape(-1)


def quantize(
    w: Tensor, fmt: Format, importance: "Tensor | None" = None, generator: "torch.Generator | None" = None
) -> QuantizedTensor:
    """Round-to-nearest of a float tensor.

    w: (out, ...) any float dtype; importance: same shape, weighs the errors of searched scales; generator: for stochastic rounding.
    Raises FormatError on NaN or infinity, ShapeError where blocks do not divide. Cost: a pass over w (80 with a searched scale).
    """
    if not bool(torch.isfinite(w).all()):
        raise FormatError("the weight holds NaN or infinity and cannot be quantized: repair the model first.")
    matrix = w.detach().float().reshape(matrix_shape(tuple(w.shape)))
    blocks = fmt.blocks.split(matrix)
    weights = None if importance is None else fmt.blocks.split(importance.float().reshape(matrix.shape))
    grid = fit(blocks, fmt, weights)
    codes = fmt.blocks.merge(encode(blocks, grid, fmt, generator), *matrix.shape)
    return QuantizedTensor.from_codes(codes, grid, fmt, tuple(w.shape))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, everything else). Raises ShapeError for scalars and vectors."""
    if len(shape) < 2:
        raise ShapeError(f"a tensor of shape {tuple(shape)} has no rows of weights; only matrices and kernels are quantized.")
    return shape[0], prod(shape[1:])


def part_key(i: int, key: str) -> str:
    """The stored name of a part's tensor."""
    return key if i == 0 else f"part{i}_{key}"


def tensor_specs(meta: dict[str, Any]) -> Specs:
    """Name -> (shape, dtype) of every tensor a meta dict implies, without reading one. Raises FormatError on a bad meta."""
    try:
        shape = tuple(int(s) for s in meta["shape"])
        parts = list(meta["parts"])
        if any(s < 0 for s in shape) or prod(shape) > 2**40 or not parts or parts[0].get("mask"):
            raise FormatError(f"impossible shape {shape} or parts.")
        return {part_key(i, k): s for i, p in enumerate(parts) for k, s in _part_specs(p, shape).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise e if isinstance(e, (FormatError, ShapeError)) else FormatError(f"a tensor's description is damaged: {e!r}") from e


def _parse_part(text: str) -> "Format | str":
    return text if text in RAW_DTYPES else Format.parse(text)


def _part_specs(part: dict[str, Any], shape: tuple[int, ...]) -> Specs:
    out, in_ = matrix_shape(shape)
    mask, fmt = part.get("mask"), _parse_part(part["format"])
    specs: Specs = dict(mask_specs(mask, (out, in_))) if mask else {}
    n = int(mask["count"]) if mask else out * in_
    if not 0 <= n <= out * in_:
        raise FormatError(f"a part claims {n} of {out * in_} weights.")
    if isinstance(fmt, str):
        return specs | {"values": ((n,), RAW_DTYPES[fmt])}
    specs["codes"] = ((packed_bytes(n, fmt.levels.bits, fmt.levels.packing),), torch.uint8)
    grid = fmt.blocks.grid(out, in_)
    if mask and fmt.blocks not in (Blocks(1, -1), Blocks(-1, -1)):
        raise FormatError("exceptions share scales per row or per tensor: use blocks channel or tensor.")
    if not fmt.levels.values:
        return specs | {"table": ((grid[0], 2**fmt.levels.bits), torch.float16)}
    specs |= scale_specs(grid, fmt.scale_dtype)
    if fmt.zero == "int":
        specs["zero"] = ((packed_bytes(grid[0] * grid[1], fmt.levels.bits),), torch.uint8)
    elif fmt.zero == "real":
        specs["zero"] = (grid, torch.float16)
    return specs
