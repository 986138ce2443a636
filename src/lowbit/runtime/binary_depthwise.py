"""1-bit and ternary depthwise convolutions: one channel a sum, too few for popcounts, so on the int8 depthwise kernel.

    y = (sum of levels of the weight * levels of the input) * scale + bias + residual

The levels -1, 0 and 1 are int8 numbers on a grid of step 1, so sums are the same integers as those of the bits.
"""

from torch import Tensor
from torch.nn import functional as F

from lowbit.runtime import conv_kernels
from lowbit.runtime.binary_kernels import Geometry
from lowbit.runtime.conv_kernels import ConvWeight, IntGrid


class Depthwise:
    """A layer's constants: levels (C, 1, kh, kw) int8, scale (C,), bias (C,) or None."""

    def __init__(self, levels: Tensor, scale: Tensor, bias: "Tensor | None", geometry: Geometry) -> None:
        channels, _, kh, kw = levels.shape
        taps = levels.reshape(channels, kh * kw).T.contiguous()
        w = ConvWeight([], taps, scale.contiguous(), (channels, channels, channels, kh, kw))
        top, bottom, left, right = geometry.padding
        self._pad, self._pads = geometry.pad, [left, right, top, bottom]
        inside = geometry._replace(pad=0, padding=(0, 0, 0, 0) if geometry.pad else geometry.padding)
        self._plan = conv_kernels.Plan(w, inside, bias, IntGrid(1.0, -1, 1))

    def __call__(self, x: Tensor, residual: "Tensor | None") -> Tensor:
        """x: the levels of the input (B, C, H, W) float32; y (B, C, H', W') float32."""
        y, _ = self._plan.run(F.pad(x, self._pads, value=float(self._pad)) if self._pad else x, residual)
        assert y is not None
        return y


def fits(groups: int, shape: tuple[int, ...]) -> bool:
    """Has every channel its own kernel, and only that?"""
    return len(shape) == 4 and shape[1] == 1 and groups == shape[0] > 1
