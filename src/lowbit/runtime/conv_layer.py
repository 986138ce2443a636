"""2-D convolutions that compute from packed bits: `conv_kernels` where the weight fits them, else unfolded patches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import ShapeError
from lowbit.formats import QuantizedTensor
from lowbit.runtime import conv_kernels, ops
from lowbit.runtime.binary_kernels import Geometry
from lowbit.runtime.kernel_weight import KernelWeight
from lowbit.runtime.packed import Packed, empty_bias
from lowbit.runtime.slabs import Slabs


class PackedConv2d(Packed):
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
            pair(stride),
            pair(dilation),
            groups,
            padding_mode,
        )
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.bias = empty_bias(bias, self.out_channels, device, dtype)

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
        ops.check_floats(x)
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


def pair(v: "int | tuple[int, int]") -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (int(v[0]), int(v[1]))
