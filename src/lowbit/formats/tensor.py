"""Quantized tensors: packed codes, scales and format; possibly a sum of disjoint parts.

    w_hat = dense part everywhere, except where a later part's mask says "mine"

The first part covers the whole matrix. Every further part (exceptions: outliers, salient weights) has a mask, stored by
a mask codec, and values at the masked places in row-major order: codes with scales per tensor, per row or per group,
or plain fp16, bf16 or fp32 numbers. A part of as many bits as the dense one may keep its codes in the dense part's,
where they would else lie idle (`"codes": "dense"`): it then adds a mask and a grid only. Instead of one dense part,
several tile parts (mask codec "tiles", see `tiles`) may come first: each owns some tiles of the matrix, with a format
of its own. `tensors()` is exactly what a file holds, so `nbytes` and `bits_per_weight` are counted, not estimated.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats.format import TENSOR, Format, Grid, decode, dual_grid, encode, fit
from lowbit.formats.masks import decode_mask, decode_tiles, mask_specs
from lowbit.formats.packing import pack, packed_bytes, unpack
from lowbit.formats.stores import (
    BILEVEL,
    bilevel_specs,
    load_bilevel,
    load_scale,
    scale_specs,
    store_bilevel,
    store_scale,
)

RAW_DTYPES = {"raw_fp16": torch.float16, "raw_bf16": torch.bfloat16, "raw_fp32": torch.float32}
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Part:
    """One part: its format (or a raw dtype's name), the stored tensors, and for exceptions the mask's meta."""

    format: "Format | str"
    tensors: dict[str, Tensor]
    mask: "dict[str, Any] | None" = None

    @property
    def shares_codes(self) -> bool:
        """Whether its codes stand among the dense part's."""
        return isinstance(self.format, Format) and "codes" not in self.tensors

    def meta(self) -> dict[str, Any]:
        meta = {"format": str(self.format)} | ({} if self.mask is None else {"mask": self.mask})
        return meta | ({"codes": "dense"} if self.shares_codes else {})


@dataclass(frozen=True)
class QuantizedTensor:
    """shape: that of the float weight; parts[0] is dense, or the first of the tile parts. Immutable."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def format(self) -> Format:
        """The dense part's format; that of the first part where there are tiles."""
        assert isinstance(self.parts[0].format, Format)
        return self.parts[0].format

    @property
    def tiles(self) -> "tuple[int, int] | None":
        """Rows and columns of a tile where tile parts make up the matrix; None with a dense part."""
        mask = self.parts[0].mask
        return None if mask is None else (mask["rows"], mask["cols"])

    @property
    def n_base(self) -> int:
        """How many parts come before the exceptions: one dense part, or all tile parts."""
        return sum(_is_tiles(p.mask) for p in self.parts) or 1

    def base(self) -> "QuantizedTensor":
        """This tensor without its exceptions."""
        return QuantizedTensor(self.shape, self.parts[: self.n_base])

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
    def from_codes(
        cls, codes: Tensor, grid: Grid, fmt: Format, shape: "tuple[int, ...] | None" = None
    ) -> "QuantizedTensor":
        """From codes (out, in) uint8 and the grid of the blocks, as `fit(fmt.blocks.split(w), fmt)` gives it.

        The grid's scales are rounded to how they are stored: choose codes for `fit`'s, which already are.
        """
        packed = pack(codes.contiguous(), fmt.levels.bits, fmt.levels.packing)
        tensors = {"codes": packed} | stored_grid(grid, fmt, fmt.blocks.grid(*codes.shape))
        return cls(tuple(shape or codes.shape), (Part(fmt, tensors),))

    @classmethod
    def from_tensors(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> "QuantizedTensor":
        """Rebuild from a file. Believes nothing: FormatError (or ShapeError) on a missing, superfluous, misshapen or
        impossible tensor, or on a description that `meta` could not have written.
        """
        specs = tensor_specs(meta)
        if set(specs) != set(tensors):
            raise FormatError(f"tensors {sorted(tensors)} do not match the format, which needs {sorted(specs)}.")
        for key, (want, dtype) in specs.items():
            t = tensors[key]
            if not isinstance(t, Tensor) or tuple(t.shape) != want or t.dtype != dtype:
                found = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
                raise FormatError(f"tensor {key!r} is {found}, the format needs {want} {dtype}.")
        shape = tuple(meta["shape"])
        parts = tuple(
            Part(_parse_part(p["format"]), {k: tensors[part_key(i, k)] for k in _part_specs(p, shape)}, p.get("mask"))
            for i, p in enumerate(meta["parts"])
        )
        result = cls(shape, parts)
        result.check()
        return result

    def check(self) -> None:
        """Raise FormatError where a stored number cannot be: a code past the last level, a negative or infinite
        scale, a damaged mask, parts that overlap.
        """
        owned = None
        for i, part in enumerate(self.parts):
            owned = None if i == self.n_base else owned  # exceptions replace what the parts before them say
            for key, t in part.tensors.items():
                if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                    raise FormatError(f"tensor {part_key(i, key)!r} holds NaN or infinity.")
            if isinstance(part.format, Format):
                self._check_numbers(i, part.format)
            if part.mask is not None:
                mask = self.mask(i)
                if owned is not None and bool((owned & mask).any()):
                    raise FormatError(f"part {i} overlaps an earlier part.")
                owned = mask if owned is None else owned | mask

    def _check_numbers(self, i: int, fmt: Format) -> None:
        part, n_levels = self.parts[i], len(fmt.levels.values)
        if "scale" in part.tensors:
            scale = part.tensors["scale"] if fmt.scale_rule == "dual" else self.grid(i).scale
            if not bool(((scale >= 0) & (scale < torch.inf)).all()):
                raise FormatError(f"tensor {part_key(i, 'scale')!r} holds a negative, infinite or NaN scale.")
        if 0 < n_levels < 2**fmt.levels.bits:  # else every code is a level
            codes = self.part_codes(i)
            if codes.numel() and int(codes.max()) >= n_levels:
                raise FormatError(
                    f"tensor {part_key(i, 'codes')!r} holds code {int(codes.max())} of {n_levels} levels."
                )

    def part_codes(self, i: int = 0) -> Tensor:
        """Unpacked codes of part i: (out, in) for the dense part, (count,) for exceptions; for tiles their stack,
        (tiles * rows, cols).
        """
        part = self.parts[i]
        assert isinstance(part.format, Format)
        if part.shares_codes:
            return self.part_codes()[self.mask(i)]
        n = self.numel if part.mask is None else part.mask["count"]
        codes = unpack(part.tensors["codes"], part.format.levels.bits, n, part.format.levels.packing)
        if part.mask is not None and not _is_tiles(part.mask):
            return codes
        return codes.reshape(_coded_shape(part.mask, self.matrix_shape))

    def grid(self, i: int = 0) -> Grid:
        """Scale, zero and table of part i, one row per block, as float32."""
        part = self.parts[i]
        fmt = part.format
        assert isinstance(fmt, Format)
        table = part.tensors["table"].float() if "table" in part.tensors else None
        if table is not None and fmt.scale_rule == "kmeans":
            return Grid(torch.ones(len(table), 1, dtype=torch.float32, device=table.device), None, table)
        if fmt.scale_dtype == BILEVEL:
            shape = fmt.blocks.grid(*_coded_shape(part.mask if _is_tiles(part.mask) else None, self.matrix_shape))
            names = ("scale",) if fmt.zero == "none" else ("scale", "zero")
            return Grid(*(load_bilevel(part.tensors, n, shape).reshape(-1, 1) for n in names))
        scale = load_scale(part.tensors, fmt.scale_dtype).reshape(-1, 1)
        if fmt.scale_rule == "dual":
            return dual_grid(scale, part.tensors["zero"].float().reshape(-1, 1))
        if fmt.zero == "none":
            return Grid(scale, None, None if table is None else table[0])
        zero = part.tensors["zero"]
        zero = unpack(zero, fmt.levels.bits, scale.numel()) if fmt.zero == "int" else zero
        return Grid(scale, zero.reshape(-1, 1).float())

    def stack(self, i: int) -> "QuantizedTensor":
        """Part i, the dense one or one of tiles, as a quantized tensor of its own: tiles one below the other."""
        part = self.parts[i]
        tensors = {k: t for k, t in part.tensors.items() if k != "mask"}
        return QuantizedTensor(_coded_shape(part.mask, self.matrix_shape), (Part(part.format, tensors),))

    def owned_tiles(self, i: int) -> Tensor:
        """(out / rows, in / cols) bool: the tiles part i owns, in the order of its stack."""
        mask = self.parts[i].mask
        assert mask is not None
        return decode_tiles(mask, self.parts[i].tensors, self.matrix_shape)

    def mask(self, i: int) -> Tensor:
        """(out, in) bool: the places part i owns; not of a dense part."""
        part = self.parts[i]
        assert part.mask is not None
        tensors = {k: t for k, t in part.tensors.items() if k.startswith("mask")}
        return decode_mask(part.mask, tensors, self.matrix_shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, in its own shape."""
        w_hat = self._tiled() if self.tiles else self._decoded(0)
        for i in range(self.n_base, len(self.parts)):
            mask = self.mask(i)
            w_hat[mask] = self._exceptions(i, mask)
        return w_hat.reshape(self.shape).to(dtype)

    def _decoded(self, i: int) -> Tensor:
        """The dense part, or a stack of tiles, as float32."""
        fmt = self.parts[i].format
        assert isinstance(fmt, Format)
        codes = self.part_codes(i)
        return fmt.blocks.merge(decode(fmt.blocks.split(codes), self.grid(i), fmt), *codes.shape)

    def _tiled(self) -> Tensor:
        """All tile parts in their places; a tile that nobody owns is 0."""
        out, in_ = self.matrix_shape
        rows, cols = self.tiles or (out, in_)
        device = self.parts[0].tensors["mask"].device
        w_hat = torch.zeros(out // rows, in_ // cols, rows, cols, dtype=torch.float32, device=device)
        for i in range(self.n_base):
            w_hat[self.owned_tiles(i)] = self._decoded(i).reshape(-1, rows, cols)
        return w_hat.transpose(1, 2).reshape(out, in_)

    def _exceptions(self, i: int, mask: Tensor) -> Tensor:
        """The float32 values of part i at its places, in row-major order."""
        part = self.parts[i]
        if isinstance(part.format, str):
            return part.tensors["values"].float()
        grid, codes = self.grid(i), self.part_codes(i)
        return decode(codes.reshape(-1, 1), grid.take(block_of_each(mask, part.format)), part.format).reshape(-1)


def quantize(
    w: Tensor, fmt: Format, importance: "Tensor | None" = None, generator: "torch.Generator | None" = None
) -> QuantizedTensor:
    """Round-to-nearest of a float tensor.

    w: (out, ...) any float dtype; generator: for stochastic rounding
    importance: same shape, non-negative: weighs the errors of searched scales; every rule leaves out weights of
    importance 0

    Raises FormatError on NaN or infinity, ShapeError where blocks do not divide. Cost: a pass over w; 80 with a
    searched scale.
    """
    matrix = float_matrix(w)
    blocks = fmt.blocks.split(matrix)
    weights = None if importance is None else fmt.blocks.split(importance_matrix(importance, w))
    grid = fit(blocks, fmt, weights)
    codes = fmt.blocks.merge(encode(blocks, grid, fmt, generator), *matrix.shape)
    return QuantizedTensor.from_codes(codes, grid, fmt, tuple(w.shape))


def float_matrix(w: Tensor) -> Tensor:
    """w as (out, in) float32. Raises FormatError where it is not finite there."""
    matrix = w.detach().reshape(matrix_shape(tuple(w.shape))).float()
    if not bool(torch.isfinite(matrix).all()):
        n_bad = int((~torch.isfinite(matrix)).sum())
        raise FormatError(
            f"{n_bad} of {w.numel()} weights are NaN or infinite and cannot be quantized: repair the model first."
        )
    return matrix


def importance_matrix(importance: Tensor, w: Tensor) -> Tensor:
    """Importance as (out, in) float32. Raises ShapeError, or FormatError where an entry is negative or not finite."""
    if importance.shape != w.shape:
        raise ShapeError(f"importance is {tuple(importance.shape)}, needed one per weight, {tuple(w.shape)}.")
    matrix = importance.detach().reshape(matrix_shape(tuple(w.shape))).float()
    if not bool(((matrix >= 0) & (matrix < torch.inf)).all()):
        raise FormatError(
            "importance holds a negative, infinite or NaN entry: squared gradients or input norms are none of these."
        )
    return matrix


def stored_grid(grid: Grid, fmt: Format, rows_cols: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a grid: "table", or "scale" (and what its store adds) and "zero"."""
    if grid.table is not None and fmt.scale_rule == "kmeans":
        return {"table": grid.table.half()}
    if grid.table is not None and fmt.scale_rule == "dual":
        ends = grid.table.half()
        return {"scale": ends[:, -1].reshape(rows_cols), "zero": ends[:, 0].reshape(rows_cols)}
    if fmt.scale_dtype == BILEVEL:
        named = (("scale", grid.scale), ("zero", grid.zero))
        return {k: t for n, x in named if x is not None for k, t in store_bilevel(x.reshape(rows_cols), n).items()}
    tensors = store_scale(grid.scale.reshape(rows_cols), fmt.scale_dtype)
    if grid.zero is not None:
        zero = grid.zero.reshape(rows_cols)
        tensors["zero"] = pack(zero.to(torch.uint8), fmt.levels.bits) if fmt.zero == "int" else zero.half()
    return tensors if grid.table is None else {"table": grid.table.half().reshape(1, -1)} | tensors


def block_of_each(mask: Tensor, fmt: Format) -> Tensor:
    """(count,) int64: the block of a format, row-major, in which each masked place lies."""
    row, column = mask.nonzero().unbind(1)
    size, across = fmt.blocks.size(*mask.shape), fmt.blocks.grid(*mask.shape)[1]
    return torch.div(row, size[0], rounding_mode="floor") * across + torch.div(column, size[1], rounding_mode="floor")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, everything else). Raises ShapeError for scalars and vectors."""
    if len(shape) < 2:
        raise ShapeError(
            f"a tensor of shape {tuple(shape)} has no rows of weights; only matrices and kernels are quantized."
        )
    return shape[0], prod(shape[1:])


def part_key(i: int, key: str) -> str:
    """The stored name of a part's tensor."""
    return key if i == 0 else f"part{i}_{key}"


def tensor_specs(meta: dict[str, Any]) -> Specs:
    """Name -> (shape, dtype) of every tensor a meta implies, without reading one. Raises FormatError on a bad meta."""
    try:
        shape, parts = tuple(meta["shape"]), list(meta["parts"])
        if set(meta) != {"shape", "parts"} or any(set(p) - {"format", "mask", "codes"} for p in parts):
            raise FormatError(f"a tensor's description has unknown fields: {sorted(meta)}.")
        if any(type(s) is not int or s < 0 for s in shape) or prod(max(s, 1) for s in shape) > 2**40:
            raise FormatError(f"impossible shape {shape}.")
        _check_order(parts)
        for p in parts:
            if "codes" in p:
                _check_shared_codes(p, parts[0])
        return {part_key(i, k): s for i, p in enumerate(parts) for k, s in _part_specs(p, shape).items()}
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise FormatError(f"a tensor's description is damaged: {e!r}") from e


def _is_tiles(mask: "dict[str, Any] | None") -> bool:
    return mask is not None and mask.get("codec") == "tiles"


def _check_order(parts: list[dict[str, Any]]) -> None:
    """One dense part or tile parts of one size, coded; then exceptions."""
    base = [p for p in parts if p.get("mask") is None or _is_tiles(p["mask"])]
    tiled = parts[0].get("mask") is not None
    sizes = {(p["mask"]["rows"], p["mask"]["cols"]) for p in base} if tiled else {()}
    good = (
        base and base == parts[: len(base)] and len(sizes) == 1 and all(_is_tiles(p.get("mask")) == tiled for p in base)
    )
    if not good or (not tiled and len(base) > 1) or any(p["format"] in RAW_DTYPES for p in base):
        raise FormatError(
            "the first part is dense and coded, or the first ones own tiles of one size; every further one has a mask "
            "of places; these are not."
        )


def _coded_shape(mask: "dict[str, Any] | None", matrix: tuple[int, int]) -> tuple[int, int]:
    """Of the codes of a base part: the whole matrix, or its tiles one below the other."""
    return matrix if mask is None else (mask["count"] // mask["cols"], mask["cols"])


def _parse_part(text: str) -> "Format | str":
    return text if text in RAW_DTYPES else Format.parse(text)


def _check_shared_codes(part: dict[str, Any], dense: dict[str, Any]) -> None:
    """Codes among the dense ones: of the same width, and every code of that width a level in both parts."""
    widths = {_full_width(p["format"]) for p in (part, dense)}
    if part["codes"] != "dense" or part is dense or dense.get("mask") is not None or len(widths) > 1 or None in widths:
        raise FormatError(f"a part of {part['format']} cannot keep its codes among the dense {dense['format']} ones.")


def _full_width(text: str) -> "int | None":
    """The bits of a format in which every code of that width is a level, else None."""
    fmt = _parse_part(text)
    whole = isinstance(fmt, Format) and len(fmt.levels.values) in (0, 2**fmt.levels.bits)
    return fmt.levels.bits if isinstance(fmt, Format) and whole else None


def _part_specs(part: dict[str, Any], shape: tuple[int, ...]) -> Specs:
    out, in_ = matrix_shape(shape)
    mask, fmt = part.get("mask"), _parse_part(part["format"])
    specs: Specs = {} if mask is None else dict(mask_specs(mask, (out, in_)))
    n = out * in_ if mask is None else mask["count"]
    if isinstance(fmt, str):
        return specs | {"values": ((n,), RAW_DTYPES[fmt])}
    if "codes" not in part:
        specs["codes"] = ((packed_bytes(n, fmt.levels.bits, fmt.levels.packing),), torch.uint8)
    if mask is not None and not _is_tiles(mask) and fmt.blocks.rows != 1 and fmt.blocks != TENSOR:
        raise FormatError("exceptions share scales per row, per group or per tensor, not per tile.")
    grid = fmt.blocks.grid(*(_coded_shape(mask, (out, in_)) if _is_tiles(mask) else (out, in_)))
    if fmt.scale_rule == "dual":
        return specs | {"scale": (grid, torch.float16), "zero": (grid, torch.float16)}
    if not fmt.levels.values:
        tables = 1 if fmt.scale_rule == "shared" else grid[0] * grid[1]
        specs["table"] = ((tables, 2**fmt.levels.bits), torch.float16)
    if fmt.scale_rule == "kmeans":
        return specs
    if fmt.scale_dtype == BILEVEL:
        return specs | bilevel_specs(grid, "scale") | (bilevel_specs(grid, "zero") if fmt.zero == "real" else {})
    specs |= scale_specs(grid, fmt.scale_dtype)
    if fmt.zero == "int":
        specs["zero"] = ((packed_bytes(grid[0] * grid[1], fmt.levels.bits),), torch.uint8)
    elif fmt.zero == "real":
        specs["zero"] = (grid, torch.float16)
    return specs
