"""What the packed layers share: the buffers of one quantized tensor, and what is derived from them for the kernels.

The buffers are exactly the tensors an artifact stores (`QuantizedTensor.tensors()`), so a state dict *is* the packed
layer. What the kernel wants is derived at first use and kept beside them, never saved; loading or moving the buffers
throws it away. On devices other than the CPU the weight is decoded for each call and multiplied there.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import ArtifactError, FormatError, KernelError
from lowbit.formats import QuantizedTensor, tensor_specs
from lowbit.formats.tensor import matrix_shape
from lowbit.runtime import ops
from lowbit.runtime.direct import Direct
from lowbit.runtime.kernel_weight import (
    Exceptions,
    Int8Weight,
    KernelWeight,
    dense_weight,
    exceptions,
    exceptions_of,
    int8_weight,
    rows_of,
)
from lowbit.runtime.slabs import Slabs
from lowbit.runtime.sparse import Sparse, sparse

ACTIVATIONS = ("float", "int8")


class Prepared(NamedTuple):
    """What a layer derives from its buffers. `source` are the buffers it came from: others mean it is stale."""

    source: "tuple[Tensor | None, ...]"
    weight: "KernelWeight | Slabs"
    int8: "tuple[Any, ...]"  # made when first asked for: Int8Weight or Slabs, one for each group; or one Conv
    exceptions: "Exceptions | None"
    sparse: "Sparse | None" = None  # the exceptions for the kernels
    sparse_int8: "Sparse | None" = None


class Packed(nn.Module):
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
            yield int8_weight(rows_of(weight, slice(n, n + rows)), columns)

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
            weight = weight if rows is None else rows_of(weight, rows)
            y = weight.product(x) if isinstance(weight, Slabs) else ops.linear_float(x, *weight)
        if added is None:
            return y
        if rows is not None:
            assert prepared.exceptions is not None
            return y + ops.sparse_linear(x, *exceptions_of(prepared.exceptions, rows), y.shape[-1])
        return ops.sparse_add(x, y, *added)

    def _kept(self) -> tuple[str, ...]:
        """Names of the buffers that no cast changes."""
        return self._packed

    def _forget(self) -> None:
        self._prepared = self._direct = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
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


def empty_bias(bias: bool, size: int, device: Any, dtype: "torch.dtype | None") -> "nn.Parameter | None":
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype), requires_grad=False) if bias else None
