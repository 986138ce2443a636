"""Layers that compute from packed bits: PackedLinear, PackedConv2d, PackedEmbedding.

    y = x @ w_hat.T + bias        w_hat = dense part, decoded by the kernel a few rows at a time, + sparse exceptions

The buffers are exactly the tensors an artifact stores (`QuantizedTensor.tensors()`), so a state dict *is* the packed
layer. What the kernel wants (rows starting on bytes, float32 scales of shape (N, G), one table) is derived at first use
and kept beside them, never saved; loading or moving the buffers throws it away. On devices other than the CPU the
weight is decoded for each call and multiplied there.

    layer = PackedLinear.from_quantized(quantize(w, Format.parse("uint4-g64")), bias)
    layer = PackedLinear(meta, bias=True, device="meta")          # empty: a loader fills the buffers
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import ArtifactError, FormatError, KernelError, ShapeError
from lowbit.formats import QuantizedTensor, tensor_specs
from lowbit.formats.tensor import matrix_shape
from lowbit.runtime import conv_kernels, ops
from lowbit.runtime.binary_kernels import Geometry
from lowbit.runtime.direct import Direct, is_plain
from lowbit.runtime.kernels import pack_rows
from lowbit.runtime.slabs import Slabs, slabs
from lowbit.runtime.sparse import Sparse, sparse
from lowbit.runtime.tiled import left_out, merged

ACTIVATIONS = ("float", "int8")


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


class Prepared(NamedTuple):
    """What a layer derives from its buffers. `source` are the buffers it came from: others mean it is stale."""

    source: "tuple[Tensor | None, ...]"
    weight: "KernelWeight | Slabs"
    int8: "tuple[Any, ...]"  # made when first asked for: Int8Weight or Slabs, one for each group; or one Conv
    exceptions: "Exceptions | None"
    sparse: "Sparse | None" = None  # the exceptions for the kernels
    sparse_int8: "Sparse | None" = None


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


class _Packed(nn.Module):
    """What the packed layers share: the buffers of one quantized tensor, their meta, and what is derived from them."""

    bias: "nn.Parameter | None"
    _direct: "Direct | None" = None  # the call of what is prepared

    def __init__(self, meta: dict[str, Any], device: Any = None, activations: str = "float") -> None:
        super().__init__()
        self.meta = meta
        self.shape = tuple(int(s) for s in meta["shape"])
        self._packed = tuple(specs := tensor_specs(meta))
        for key, (shape, dtype) in specs.items():
            self.register_buffer(key, torch.empty(shape, dtype=dtype, device=device))
        self.activations = activations
        self._prepared: Prepared | None = None

    @property
    def activations(self) -> str:
        """ "float" (exact) or "int8" (rounded per token and group; integer arithmetic inside)."""
        return self._activations

    @activations.setter
    def activations(self, kind: str) -> None:
        if kind not in ACTIVATIONS:
            raise FormatError(f'activations={kind!r} is unknown. Use "float" or "int8".')
        self._activations = kind
        self._direct = None

    def quantized(self) -> QuantizedTensor:
        """The quantized tensor these buffers hold, checked anew.

        Raises ArtifactError where they were never filled, FormatError where they are impossible.
        """
        tensors = {key: getattr(self, key) for key in self._packed}
        if any(t.is_meta for t in tensors.values()):
            raise ArtifactError(
                "a packed layer was used before its tensors were loaded: load the artifact's state dict first."
            )
        return QuantizedTensor.from_tensors(self.meta, tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its own shape, decoded by the plain formula (not by the kernels)."""
        return self.quantized().dequantize(dtype)

    def prepare(self) -> Prepared:
        """Derive the kernel's arguments now rather than at the first call; a no-op where they are fresh.

        torch.compile and torch.export cannot trace this: run the model once, or `prepare(model)`, before them.
        """
        kept = self._prepared
        if (
            torch.compiler.is_compiling()
        ):  # the traced buffers are stand-ins: what was derived from the real ones counts
            if kept is None:
                raise KernelError(
                    "the packed layers are not prepared: call lowbit.runtime.prepare(model) before tracing."
                )
            return kept
        source = tuple(self._buffers[key] for key in self._packed)  # getattr takes a microsecond for each
        if kept is None or not all(a is b for a, b in zip(kept.source, source)):
            qt = self.quantized()
            found = exceptions(qt)
            kernel = None if found is None else sparse(*found, qt.matrix_shape)
            kept = self._prepared = Prepared(source, dense_weight(qt), (), found, kernel)
        if self._activations == "int8" and not kept.int8:
            found = kept.exceptions
            kernel = None if found is None else sparse(*found, matrix_shape(self.shape), integer=True)
            kept = self._prepared = kept._replace(int8=tuple(self._int8_parts(kept.weight)), sparse_int8=kernel)
        return kept

    def _int8_parts(self, weight: "KernelWeight | Slabs") -> "Iterator[Int8Weight | Slabs]":
        """One for all rows; of a convolution one for each group's rows."""
        out, columns = matrix_shape(self.shape)
        rows = out // getattr(self, "groups", 1)
        for n in range(0, out, max(rows, 1)):
            yield int8_weight(_rows_of(weight, slice(n, n + rows)), columns)

    def _matmul(self, x: Tensor, part: int = 0, parts: int = 1) -> Tensor:
        """x (..., K) @ w_hat.T; of one part only of the rows, cut in equal parts, if asked (a convolution's groups)."""
        size = self.shape[0] // parts
        rows = None if parts == 1 else slice(part * size, (part + 1) * size)
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], size)
        if x.device.type != "cpu":
            w = self.dequantize(x.dtype).reshape(matrix_shape(self.shape))
            return F.linear(x, w if rows is None else w[rows])
        prepared = self.prepare()
        weight, added = prepared.weight, prepared.sparse
        if self._activations == "int8" and prepared.int8:
            int8, added = prepared.int8[part], prepared.sparse_int8
            y = int8.product(x) if isinstance(int8, Slabs) else ops.linear_int8(x, *int8)
        else:
            weight = weight if rows is None else _rows_of(weight, rows)
            y = weight.product(x) if isinstance(weight, Slabs) else ops.linear_float(x, *weight)
        if added is None:
            return y
        if rows is not None:
            assert prepared.exceptions is not None
            return y + ops.sparse_linear(x, *_exceptions_of(prepared.exceptions, rows), y.shape[-1])
        return ops.sparse_add(x, y, *added)

    def _kept(self) -> tuple[str, ...]:
        """Names of the buffers that no cast changes."""
        return self._packed

    def _forget(self) -> None:
        self._prepared = self._direct = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        """Moves follow; casts do not: `.half()` or `.to(dtype)` on a model must not round what the artifact stores."""
        packed = {key: self._buffers.pop(key) for key in self._kept() if self._buffers[key] is not None}
        try:
            super()._apply(fn, recurse)
            for key, t in packed.items():
                assert t is not None
                moved = fn(t)
                packed[key] = moved if moved.dtype == t.dtype else t.to(moved.device)
        finally:
            self._buffers.update(packed)
            self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None, "_direct": None}

    def _fill(self, qt: QuantizedTensor, bias: "Tensor | None") -> None:
        self._buffers.update(qt.tensors())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        parts = " + ".join(p["format"] for p in self.meta["parts"])
        stored = sum(getattr(self, key).nbytes for key in self._packed)
        bits = 8 * stored / max(prod(self.shape), 1)
        bias = "" if not hasattr(self, "bias") else f", bias={self.bias is not None}"
        return f"{self._sizes()}{bias}, format={parts}, bits_per_weight={bits:.3f}, activations={self.activations}"

    def _sizes(self) -> str:
        return "shape=" + "x".join(map(str, self.shape))


def _rows_of(w: "KernelWeight | Slabs", rows: slice) -> "KernelWeight | Slabs":
    if isinstance(w, Slabs):
        return w._replace(parts=tuple(_rows_of(part, rows) for part in w.parts))
    table = w.table if len(w.table) == 1 else w.table[rows]
    return KernelWeight(w.codes[rows], table, w.scale[rows], w.zero[rows] if w.zero.numel() else w.zero, w.bits)


def _exceptions_of(e: Exceptions, rows: slice) -> Exceptions:
    mine = (e.row >= rows.start) & (e.row < rows.stop)
    return Exceptions(e.row[mine] - rows.start, e.col[mine], e.value[mine])


def _empty_bias(bias: bool, size: int, device: Any, dtype: "torch.dtype | None") -> "nn.Parameter | None":
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype), requires_grad=False) if bias else None


class PackedLinear(_Packed):
    """x (..., in_features), any float dtype -> (..., out_features) in x's dtype."""

    def __init__(
        self,
        meta: dict[str, Any],
        bias: bool = False,
        device: Any = None,
        dtype: "torch.dtype | None" = None,
        activations: str = "float",
    ) -> None:
        """Empty, for a loader: meta as `QuantizedTensor.meta()`; dtype is the bias's."""
        super().__init__(meta, device, activations)
        if len(self.shape) != 2:
            raise ShapeError(
                f"a linear layer's weight has two dimensions, not {self.shape}. Use PackedConv2d for convolutions."
            )
        self.out_features, self.in_features = self.shape
        self.bias = _empty_bias(bias, self.out_features, device, dtype)

    @classmethod
    def from_quantized(
        cls, qt: QuantizedTensor, bias: "Tensor | None" = None, activations: str = "float"
    ) -> "PackedLinear":
        """A layer over a quantized tensor's own tensors (no copy); bias (out_features,) or None."""
        layer = cls(qt.meta(), device="meta", activations=activations)
        layer._fill(qt, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"input has {x.shape[-1]} features, the layer needs {self.in_features}.")
        if is_plain(x):
            direct = self._direct
            if (direct and (y := direct(self, x)) is not None) or (y := self._direct_anew(x)) is not None:
                return y
        y = self._matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _direct_anew(self, x: Tensor) -> "Tensor | None":
        """y as one call of the kernel, of what the layer holds now; None where that cannot be had."""
        prepared, self._direct = self.prepare(), None
        int8 = self._activations == "int8"
        weight: Any = prepared.int8[0] if int8 else prepared.weight
        if isinstance(weight, Slabs) or not Direct.fits(self):
            return None
        shape = (self.out_features, self.in_features)
        if int8:
            self._direct = Direct(self, shape, (weight.packed,), prepared.sparse_int8)
        else:
            self._direct = Direct(self, shape, weight, prepared.sparse)
        return self._direct(self, x)

    def _sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedEmbedding(_Packed):
    """ids (...) int -> (..., embedding_dim): rows of w_hat, decoded on demand, in `dtype`."""

    def __init__(
        self,
        meta: dict[str, Any],
        padding_idx: "int | None" = None,
        device: Any = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        """Empty, for a loader. dtype: of the output; default float32."""
        super().__init__(meta, device)
        if len(self.shape) != 2:
            raise ShapeError(f"an embedding's weight has two dimensions, not {self.shape}.")
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx, self.dtype = padding_idx, dtype or torch.float32

    @classmethod
    def from_quantized(
        cls, qt: QuantizedTensor, padding_idx: "int | None" = None, dtype: "torch.dtype | None" = None
    ) -> "PackedEmbedding":
        layer = cls(qt.meta(), padding_idx, device="meta", dtype=dtype)
        layer._fill(qt, None)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        probe = fn(torch.empty(0, dtype=self.dtype))  # `.half()` on a model asks embeddings for half outputs
        self.dtype = probe.dtype if probe.is_floating_point() else self.dtype
        super()._apply(fn, recurse)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_meta:
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device="meta")
        if ids.device.type != "cpu":
            return F.embedding(ids, self.dequantize(self.dtype))
        prepared = self.prepare()
        w = prepared.weight
        if isinstance(w, Slabs):
            out = torch.cat([ops.embedding(ids, *part, w.columns) for part in w.parts], -1)
        else:
            out = ops.embedding(ids, *w, self.embedding_dim)
        if prepared.exceptions is not None:
            out = out + self._exception_rows(ids, prepared.exceptions)
        return out.to(self.dtype)

    def _exception_rows(self, ids: Tensor, e: Exceptions) -> Tensor:
        """(..., embedding_dim) float32 correction of the rows asked for; entries are sorted by row."""
        flat = ids.reshape(-1).to(torch.int64)
        first, last = torch.searchsorted(e.row, flat), torch.searchsorted(e.row, flat, right=True)
        count = last - first
        token = torch.arange(len(flat)).repeat_interleave(count)
        at = torch.arange(len(token)) - (count.cumsum(0) - count)[token] + first[token]
        out = torch.zeros(len(flat), self.embedding_dim, dtype=torch.float32)
        out[token, e.col[at]] = e.value[at]
        return out.reshape(*ids.shape, self.embedding_dim)

    def _sizes(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


class PackedConv2d(_Packed):
    """x (B, in_channels, H, W) or without B -> (B, out_channels, H', W').

    Float activations: patches (unfold) times the packed kernel. int8: `conv_kernels`, one scale for an image, where the
    weight has one scale a row and zeros are padded.
    """

    def __init__(
        self,
        meta: dict[str, Any],
        bias: bool = False,
        stride: "int | tuple[int, int]" = 1,
        padding: "int | str | tuple[int, int]" = 0,
        dilation: "int | tuple[int, int]" = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: "torch.dtype | None" = None,
        activations: str = "float",
    ) -> None:
        """Empty, for a loader; arguments as nn.Conv2d. Raises ShapeError where groups do not divide the channels."""
        super().__init__(meta, device, activations)
        if len(self.shape) != 4 or groups < 1 or self.shape[0] % groups:
            raise ShapeError(f"a weight of shape {self.shape} cannot be a 2-D convolution with groups={groups}.")
        self.out_channels, per_group, *kernel = self.shape
        self.in_channels, self.kernel_size = per_group * groups, (kernel[0], kernel[1])
        self.stride, self.dilation, self.groups, self.padding_mode = (
            _pair(stride),
            _pair(dilation),
            groups,
            padding_mode,
        )
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.bias = _empty_bias(bias, self.out_channels, device, dtype)

    @classmethod
    def from_quantized(
        cls, qt: QuantizedTensor, bias: "Tensor | None" = None, activations: str = "float", **conv: Any
    ) -> "PackedConv2d":
        """conv: stride, padding, dilation, groups, padding_mode as nn.Conv2d has them."""
        layer = cls(qt.meta(), device="meta", activations=activations, **conv)
        layer._fill(qt, bias)
        return layer

    def _pads(self) -> list[int]:
        """left, right, top, bottom."""
        if isinstance(self.padding, str):
            totals = [d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size)]
            (top, left), (h, w) = (t // 2 for t in totals), totals
            return [left, w - left, top, h - top]
        return [self.padding[1], self.padding[1], self.padding[0], self.padding[0]]

    def _int8_parts(self, weight: "KernelWeight | Slabs") -> "Iterator[Any]":
        """One convolution of the whole where the weight has one scale a row; else one product for each group."""
        qt = self.quantized()
        if self.padding_mode != "zeros" or not conv_kernels.fits(qt):
            yield from super()._int8_parts(weight)
            return
        left, right, top, bottom = self._pads()
        geometry = Geometry(self.stride, (top, bottom, left, right), self.dilation)
        yield conv_kernels.Conv(conv_kernels.weight(qt, self.groups), geometry)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.forward(x[None])[0]
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"input is {tuple(x.shape)}, the layer needs (batch, {self.in_channels}, height, width).")
        if self._activations == "int8" and x.device.type == "cpu":
            whole = self.prepare().int8[0]
            if isinstance(whole, conv_kernels.Conv):
                y = whole(x)
                return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, 1, 1)
        x = F.pad(x, self._pads(), "constant" if self.padding_mode == "zeros" else self.padding_mode)
        h, w = (
            (n - d * (k - 1) - 1) // s + 1
            for n, k, d, s in zip(x.shape[2:], self.kernel_size, self.dilation, self.stride)
        )
        patches = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride).transpose(1, 2)  # (B, H'W', in*kh*kw)
        y = torch.cat(list(self._groups(patches)), -1) if self.groups > 1 else self._matmul(patches)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.transpose(1, 2).reshape(len(x), self.out_channels, h, w)

    def _groups(self, patches: Tensor) -> Iterator[Tensor]:
        for i, part in enumerate(patches.chunk(self.groups, -1)):
            yield self._matmul(part, i, self.groups)


def _pair(v: "int | tuple[int, int]") -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (int(v[0]), int(v[1]))


def set_activations(model: nn.Module, kind: str) -> int:
    """Switch every packed linear and convolution of a model to "float" or "int8" activations; returns their number.

    Raises FormatError on another word.
    """
    layers = [m for m in model.modules() if isinstance(m, (PackedLinear, PackedConv2d))]
    for layer in layers:
        layer.activations = kind
    return len(layers)


def prepare(model: nn.Module) -> int:
    """Derive what the kernels need for every packed layer now (needed before torch.compile and torch.export).

    Returns the number of layers. Raises FormatError or ArtifactError on a layer whose tensors are damaged or missing.
    """
    layers = [m for m in model.modules() if isinstance(m, _Packed)]
    for layer in layers:
        layer.prepare()
    return len(layers)
