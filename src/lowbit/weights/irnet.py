"""IR-Net: standardized weights, a power-of-two scale, and the error decay estimator.

    v = (w - mean w) / std w            a row (std unbiased); the gradient flows through both
    w_hat = s sign(v)                   s = 2**round(log2 mean|v|), a constant in the backward pass; usually 1
    dL/dv = s dL/dw_hat k t (1 - tanh^2(t v))

t follows a schedule, so call lowbit.step. A constant row becomes v = 0, not NaN. Source: Qin et al. 2020
(arXiv:1909.10788).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

TINY = 1e-12


class _Standardized(torch.autograd.Function):
    """(w - mean) / std of each row; dw = (g - mean g - v sum(g v) / (n - 1)) / std."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        std, mean = torch.std_mean(rows, 1, keepdim=True)
        std = std.clamp(min=TINY)
        v = (rows - mean) / std
        ctx.save_for_backward(v, std)
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        v, std = ctx.saved_tensors
        g = grads[0]
        along = (g * v).sum(1, keepdim=True) / max(v.shape[1] - 1, 1)
        return (g - g.mean(1, keepdim=True) - v * along) / std


class Standardize(nn.Module):
    """Parametrization: mean 0 and standard deviation 1 in each row of the weight seen as (out, everything else)."""

    def forward(self, w: Tensor) -> Tensor:
        if w[0].numel() < 2:
            return w
        return _Standardized.apply(w.reshape(len(w), -1)).reshape(w.shape)


def build(w: Tensor, **options: Any) -> list[nn.Module]:
    standardize = Standardize()
    function = Quantize("binary-channel-e8m0", **{"estimator": "ede", "unit": "raw"} | options, w=standardize(w))
    return [standardize, function]


OPTIONS = {"estimator": "ede", "unit": "raw"}
SPEC = WeightSpec("irnet", "standardized weights, shift scale, EDE", "arXiv:1909.10788", build, OPTIONS)
