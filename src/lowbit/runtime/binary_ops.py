"""Bit-plane products as torch operators, so that torch.compile and torch.export see them.

    lowbit::binarize(x, high, low, groups)                      floats (B, C, H, W) to bits
    lowbit::binary_conv2d(x, high, low, rows, ..., pad)         y, of floats or of bits
    lowbit::binary_conv2d_bits(x, ..., want_y)                  y (or an empty tensor), and the bits for the next layer

Arguments as in `binary_kernels`. A linear layer is a convolution of 1 x 1 images. y is float32 in channels_last memory.
They have no gradient: train the float network, then pack it.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import KernelError
from lowbit.runtime import binary_kernels as bk

_ARGUMENTS = (
    "Tensor x, Tensor? high, Tensor? low, Tensor rows, Tensor fast, Tensor base, Tensor tap_sum, Tensor scale, "
    "Tensor? bias, Tensor? residual, Tensor? prelu, Tensor? next_high, int[] sizes, int[] geometry"
)
NO_GRADIENT = "packed binary layers have no gradient: train the float network (lowbit.prepare), then lowbit.pack it."


def arguments(w: bk.BinaryWeight, g: bk.Geometry) -> tuple[list[int], list[int]]:
    """`sizes` and `geometry` of the operators below."""
    return [w.layout, w.kind, w.channels, w.groups, *w.kernel], [*g.stride, *g.padding, *g.dilation, g.pad]


def _conv2d(
    x: Tensor, high: "Tensor | None", low: "Tensor | None", rows: Tensor, fast: Tensor, base: Tensor, tap_sum: Tensor,
    scale: Tensor, bias: "Tensor | None", residual: "Tensor | None", prelu: "Tensor | None",
    next_high: "Tensor | None", sizes: list[int], geometry: list[int], want_y: bool = True,
) -> tuple["Tensor | None", "Tensor | None"]:  # fmt: skip
    w = bk.BinaryWeight(rows, fast, base, tap_sum, sizes[0], sizes[1], sizes[2], sizes[3], (sizes[4], sizes[5]))
    return bk.conv2d(x, w, _geometry(geometry), bk.Epilogue(scale, bias, residual, prelu, next_high), high, low, want_y)


def _geometry(g: list[int]) -> bk.Geometry:
    return bk.Geometry((g[0], g[1]), (g[2], g[3], g[4], g[5]), (g[6], g[7]), g[8])


def _binary_conv2d(*args: Any) -> Tensor:
    y, _ = _conv2d(*args)
    assert y is not None
    return y


def _binary_conv2d_bits(*args: Any) -> tuple[Tensor, Tensor]:
    y, bits = _conv2d(*args)
    if bits is None:
        raise KernelError("next_high is needed for the next layer's bits; call lowbit::binary_conv2d without it.")
    return (bits.new_empty(0, dtype=torch.float32) if y is None else y), bits


def _fake_y(x: Tensor, scale: Tensor, sizes: list[int], geometry: list[int]) -> tuple[Tensor, list[int]]:
    height, width = (x.shape[2], x.shape[3]) if x.dtype.is_floating_point else (x.shape[1], x.shape[2])
    oh, ow = _geometry(geometry).out_size(height, width, (sizes[4], sizes[5]))
    y = scale.new_empty(x.shape[0], oh, ow, scale.shape[0]).permute(0, 3, 1, 2)
    return y, [x.shape[0], oh, ow, 1, 1, (scale.shape[0] + 31) // 32]


def _fake_conv2d(x: Tensor, *rest: Any) -> Tensor:
    return _fake_y(x, rest[6], rest[11], rest[12])[0]


def _fake_conv2d_bits(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, shape = _fake_y(x, rest[6], rest[11], rest[12])
    return (y if rest[13] else y.new_empty(0)), x.new_empty(shape, dtype=torch.int32)


def _binarize(x: Tensor, high: Tensor, low: "Tensor | None", groups: int) -> Tensor:
    return bk.binarize(x, high, low, groups)


def _fake_binarize(x: Tensor, high: Tensor, low: "Tensor | None", groups: int) -> Tensor:
    b, c, h, w = x.shape
    planes = 1 if low is None else 2
    return x.new_empty(b, h, w, groups, planes, (c // groups + 31) // 32, dtype=torch.int32)


def _define(name: str, schema: str, kernel: Any, fake: Any) -> None:
    torch.library.define(f"lowbit::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"lowbit::{name}", "cpu", kernel)
    torch.library.register_fake(f"lowbit::{name}", fake)


_define("binarize", "(Tensor x, Tensor high, Tensor? low, int groups) -> Tensor", _binarize, _fake_binarize)
_define("binary_conv2d", f"({_ARGUMENTS}) -> Tensor", _binary_conv2d, _fake_conv2d)
_define(
    "binary_conv2d_bits", f"({_ARGUMENTS}, bool want_y) -> (Tensor, Tensor)", _binary_conv2d_bits, _fake_conv2d_bits
)

binarize = torch.ops.lowbit.binarize
binary_conv2d = torch.ops.lowbit.binary_conv2d
binary_conv2d_bits = torch.ops.lowbit.binary_conv2d_bits
