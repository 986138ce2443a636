"""Linear layers and embeddings that compute from packed bits; `conv_layer` has the convolution.

y = x @ w_hat.T + bias        w_hat = dense part, decoded by the kernel a few rows at a time, + sparse exceptions

layer = PackedLinear.from_quantized(quantize(w, Format.parse("uint4-g64")), bias)
layer = PackedLinear(meta, bias=True, device="meta")          # empty: a loader fills the buffers
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import ShapeError
from lowbit.formats import QuantizedTensor
from lowbit.runtime import ops
from lowbit.runtime.direct import Direct, is_plain
from lowbit.runtime.kernel_weight import Exceptions
from lowbit.runtime.packed import Packed, empty_bias
from lowbit.runtime.slabs import Slabs


class PackedLinear(Packed):
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
        self.bias = empty_bias(bias, self.out_features, device, dtype)

    @classmethod
    def from_quantized(
        cls, qt: QuantizedTensor, bias: "Tensor | None" = None, activations: str = "float"
    ) -> "PackedLinear":
        """A layer over a quantized tensor's own tensors (no copy); bias (out_features,) or None."""
        layer = cls(qt.meta(), device="meta", activations=activations)
        layer._fill(qt, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not x.ndim or x.shape[-1] != self.in_features:
            found = f"{x.shape[-1]} features" if x.ndim else "no dimension"
            raise ShapeError(f"the input has {found}, the layer needs {self.in_features} features.")
        if is_plain(x):
            direct = self._direct
            if (direct and (y := direct(self, x)) is not None) or (y := self._direct_anew(x)) is not None:
                return y
        ops.check_floats(x)
        y = self._matmul(x)
        return y if self.bias is None else y + self.bias.to(y.device, y.dtype)

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


class PackedEmbedding(Packed):
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
