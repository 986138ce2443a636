"""A packed linear layer's call without torch's dispatcher, which would take longer than one token's product.

    y = direct(x)        None where torch has to see the operators, or where what was derived is no longer the layer's

The plan holds what the kernel reads, checked once; a call passes addresses. Left to the operators of `ops`: anything
that watches (autograd, torch.compile, tracing, functorch, dispatch modes), subclasses of Tensor, other dtypes and
devices, strides. Both ways give the same bits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowbit.runtime import kernels
from lowbit.runtime.sparse import Sparse
from lowbit.runtime.sparse import checked_isa as checked_sparse_isa

_modes, _functorch, _traced = (
    torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active, torch._C._is_tracing
)  # fmt: skip


def is_plain(x: Tensor) -> bool:
    """Bare float32 memory on the CPU, and nothing that watches it."""
    return (
        not torch.compiler.is_compiling()  # first: torch.compile follows this no further
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_neg()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _modes()
        and not _functorch()
        and forward_ad._current_level < 0
        and not _traced()
    )


class Direct:
    """The call of one layer: of its weight, its exceptions and its bias as they are now."""

    __slots__ = ("_bias", "_bias_at", "_out", "_run")

    def __init__(self, layer: nn.Module, shape: tuple[int, int], weight: Any, added: "Sparse | None") -> None:
        """weight: what the kernel takes after x, of `ops.linear_float` or, the buffer alone, `ops.linear_int8`."""
        extension = kernels._extension()
        isa = kernels.active_isa() if added is None else checked_sparse_isa()
        sparse = None if added is None else kernels._call(extension.Exceptions, *added)
        columns = () if len(weight) == 1 else (shape[1],)
        self._run = kernels._call(extension.LinearPlan, *weight, *columns, sparse, isa, layer._buffers).run
        self._out = shape[0]
        self._bias = layer._parameters.get("bias")
        self._bias_at = 0 if self._bias is None else self._bias.data_ptr()

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Is the bias one that the kernel can read, and nothing to differentiate?"""
        b = layer._parameters.get("bias")
        return b is None or (b.dtype is torch.float32 and b.is_cpu and b.is_contiguous() and not b.requires_grad)

    def __call__(self, layer: nn.Module, x: Tensor) -> "Tensor | None":
        """x (..., in) that `is_plain`. None where the layer's tensors or LOWBIT_ISA are no longer those of the plan."""
        bias = self._bias
        if layer._parameters.get("bias") is not bias:
            return None
        if bias is not None and (bias.data_ptr() != self._bias_at or bias.requires_grad):
            return None
        *leading, columns = x.shape
        y = x.new_empty(*leading, self._out)  # numbers one by one: torch takes microseconds longer over a tuple
        m = leading[0] if len(leading) == 1 else x.numel() // columns
        done = self._run(x.data_ptr(), m, y.data_ptr(), self._bias_at, layer._buffers, torch.get_num_threads())
        return y if done else None
