"""The kernels as torch operators, so that torch.compile and torch.export see them.

    lowbit::linear_float(x, codes, table, scale, zero, bits)            y = x @ w_hat.T, differentiable in x
    lowbit::linear_int8(x, packed, out_features)                        the same, x rounded to int8 per token and group
    lowbit::embedding(ids, codes, table, scale, zero, bits, columns)    rows of w_hat
    lowbit::sparse_linear(x, row, col, value, out_features)             the correction for exceptions (outliers)
    lowbit::sparse_add(x, y, start, column, value, steps)               y + that correction, as prepared in `sparse`

    w_hat[n, k] = (table[code[n, k]] - zero[n, g]) * scale[n, g]        g = k // (K // G)

x: (..., K) of any float dtype; computed in float32; y: (..., N) in x's dtype. Packed arguments as in `kernels`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.errors import KernelError, ShapeError
from lowbit.runtime import kernels
from lowbit.runtime.sparse import Sparse
from lowbit.runtime.sparse import sparse_linear as sparse_linear_

_PACKED = "Tensor codes, Tensor {table}, Tensor scale, Tensor zero, int bits"


def _operator(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Define an operator of the namespace `lowbit` whose CPU kernel is the decorated function; returns the operator.

    What torch.library.custom_op does, without its import of the compiler at the first call, which takes seconds.
    """

    def register(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = f"lowbit::{kernel.__name__}"
        torch.library.define(name, f"({schema}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "cpu", kernel)
        return getattr(torch.ops.lowbit, kernel.__name__)

    return register


@_operator("Tensor x, " + _PACKED.format(table="table"))
def linear_float(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """y (..., N) = x (..., K) @ w_hat.T. Raises KernelError where sizes contradict each other."""
    return _unflat(kernels.linear_float(_flat(x), codes, table, scale, zero, bits), x)


@_operator("Tensor x, Tensor packed, int out_features")
def linear_int8(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """`linear_float` with x rounded to int8 per token and segment; packed: `pack_int8`. Not differentiable."""
    return _unflat(kernels.linear_int8(_flat(x), packed, out_features), x)


@_operator("Tensor ids, " + _PACKED.format(table="table") + ", int columns")
def embedding(
    ids: Tensor, codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int
) -> Tensor:
    """(..., columns) float32: rows `ids` (any shape, int32 or int64) of w_hat. Raises IndexError on an unknown id."""
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    return kernels.decode(codes, table, scale, zero, bits, columns, flat).reshape(*ids.shape, columns)


@_operator("Tensor x, Tensor row, Tensor col, Tensor value, int out_features")
def sparse_linear(x: Tensor, row: Tensor, col: Tensor, value: Tensor, out_features: int) -> Tensor:
    """y (..., out_features) = x @ E.T, E[row, col] = value (float32), zero elsewhere; entries in row-major order."""
    flat = _flat(x)
    e = torch.sparse_coo_tensor(
        torch.stack([row, col]), value, (out_features, flat.shape[1]), is_coalesced=True, check_invariants=False
    )
    return _unflat(torch.sparse.mm(e, flat.T).T.contiguous(), x)


@_operator("Tensor x, Tensor y, Tensor start, Tensor column, Tensor value, Tensor steps")
def sparse_add(x: Tensor, y: Tensor, start: Tensor, column: Tensor, value: Tensor, steps: Tensor) -> Tensor:
    """y (..., N) + x (..., K) @ S.T; the other arguments are a `sparse.Sparse`. Differentiable in x and y."""
    flat, out = _flat(x), _flat(y)
    out = out.clone() if out.data_ptr() == y.data_ptr() else out
    sparse_linear_(flat, out, Sparse(start, column, value, steps))
    return _unflat(out, y)


@torch.library.register_fake("lowbit::linear_float")
def _(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("lowbit::linear_int8")
def _(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("lowbit::embedding")
def _(ids: Tensor, codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int) -> Tensor:
    return scale.new_empty(*ids.shape, columns)


@torch.library.register_fake("lowbit::sparse_linear")
def _(x: Tensor, row: Tensor, col: Tensor, value: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("lowbit::sparse_add")
def _(x: Tensor, y: Tensor, start: Tensor, column: Tensor, value: Tensor, steps: Tensor) -> Tensor:
    return torch.empty_like(y)


# dL/dx = dL/dy @ w_hat: adapters and input gradients work on a packed model; the packed weight itself is not trained.
def _keep_packed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *packed, ctx.bits = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*packed)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    codes, table, scale, zero = ctx.saved_tensors
    every_row = torch.arange(codes.shape[0], device=codes.device)
    w_hat = torch.ops.lowbit.embedding(every_row, codes, table, scale, zero, ctx.bits, ctx.columns)
    return grad @ w_hat.to(grad.dtype), None, None, None, None, None


def _keep_entries(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.columns = inputs[0].shape[-1]
    ctx.save_for_backward(*inputs[1:4])


def _sparse_backward(ctx: Any, grad: Tensor) -> tuple:
    row, col, value = ctx.saved_tensors
    order = torch.argsort(col, stable=True)  # the transposed entries in row-major order
    dx = torch.ops.lowbit.sparse_linear(grad, col[order], row[order], value[order], ctx.columns)
    return dx, None, None, None, None


def _keep_sparse(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.columns = inputs[0].shape[-1]
    ctx.save_for_backward(*inputs[2:5])


def _sparse_add_backward(ctx: Any, grad: Tensor) -> tuple:
    start, column, value = ctx.saved_tensors
    row = torch.arange(len(start) - 1).repeat_interleave(start.diff())
    order = torch.argsort(column, stable=True)
    dx = torch.ops.lowbit.sparse_linear(grad, column[order].long(), row[order], value[order], ctx.columns)
    return dx, grad, None, None, None, None


def _no_backward(ctx: Any, grad: Tensor) -> tuple:
    raise KernelError('int8 activations have no gradient: call lowbit.runtime.set_activations(model, "float") first.')


torch.library.register_autograd("lowbit::linear_float", _linear_backward, setup_context=_keep_packed)
torch.library.register_autograd("lowbit::sparse_linear", _sparse_backward, setup_context=_keep_entries)
torch.library.register_autograd("lowbit::sparse_add", _sparse_add_backward, setup_context=_keep_sparse)
torch.library.register_autograd("lowbit::linear_int8", _no_backward)


class Int8Levels(NamedTuple):
    """table ~ base + step * levels: levels (T, L) int8, step and base (T, 1) float32.

    error: largest |difference| in units of the largest |table| value: 0 for integers, powers of two up to 64 and FP4;
    at most 1/254 otherwise, as for NF4 and k-means.
    """

    levels: Tensor
    step: Tensor
    base: Tensor
    error: float


def int8_levels(table: Tensor) -> Int8Levels:
    """The level table as int8, exact where the levels are whole multiples of a step over a range of at most 255 steps.

    table: (T, L) float32, finite. Otherwise the step is 1/254 of the range (1/127 of absmax for a symmetric table).
    base is 0 where the levels allow it; `pack_int8` folds it into the zero. Raises KernelError on NaN or infinity.
    """
    if not bool(torch.isfinite(table).all()):
        raise KernelError("the level table holds NaN or infinity: the artifact is damaged.")
    rows = [_int8_row(row.double()) for row in table]
    levels, step, base = (torch.stack(list(column)) for column in zip(*rows))
    error = (base[:, None] + step[:, None] * levels - table.double()).abs().amax() / table.abs().amax().clamp(min=1e-30)
    return Int8Levels(levels.to(torch.int8), step[:, None].float(), base[:, None].float(), float(error))


def pack_int8(codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int) -> Tensor:
    """The kernel layout `linear_int8` reads, for a weight as `linear_float` takes it: 1-D uint8.

    (table - zero) * scale = (levels - (zero - base)/step) * scale * step, with the levels of `int8_levels`.
    """
    of = int8_levels(table)
    if bool(of.base.any()):
        zero = ((zero if zero.numel() else torch.zeros_like(scale)) - of.base) / of.step
    elif zero.numel():
        zero = zero / of.step
    return kernels.pack_int8(codes, of.levels, scale, zero, of.step[:, 0].contiguous(), bits, columns)


def _int8_row(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One table row (float64) -> levels, step, base."""
    low, span = row.min(), row.max() - row.min()
    gaps = row.unique().diff()
    smallest = gaps.min() if gaps.numel() else torch.ones((), dtype=row.dtype)
    whole = []  # the steps of which all distances are multiples: the smallest gap, or a small part of it
    for step in (smallest / divisor for divisor in (1, 2, 3, 4)):
        steps, first = (row - low) / step, low / step
        if bool((steps == steps.round()).all()) and float(span / step) <= 255:
            if bool(first == first.round()) and float(first) >= -128 and float(first + span / step) <= 127:
                return steps + first, step, torch.zeros_like(step)
            whole.append((steps - 128, step, low + 128 * step))
    if whole:
        return whole[0]
    base, step = (low + row.max()) / 2, span / 254
    return ((row - base) / step).round(), step, base


def check_floats(x: Tensor) -> None:
    """Raises ShapeError: whole numbers would come out rounded, and numpy arrays not at all. Raises KernelError for a
    dual tensor, whose tangent would be lost."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"a packed layer takes a tensor of floats, not {kind}: give x.float().")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise KernelError(
            "a packed layer has no forward-mode derivative (jvp, jacfwd): use reverse mode, for example torch.func.vjp"
            " or jacrev."
        )


def _flat(x: Tensor) -> Tensor:
    check_floats(x)
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)
