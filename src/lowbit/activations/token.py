"""8-bit inputs with a scale of their own for each token: BitNet's activations.

    x_hat = clip(round(x s), -128, 127) / s          s = 127 / max(max|x|, 1e-5) over the last axis (channels of a
                                                     convolution's input: over all but the batch)
    dx = dy, and through the normalization

norm="rms" or "layer" normalizes the last axis first, without parameters: with it and weights "bitnet" a linear layer is
BitNet's BitLinear. Source: Ma et al. 2024 (arXiv:2402.17764); "layer" is the Reloaded one (arXiv:2407.09527), whose
scale 128 / max|x| would clip the largest entry.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.activations._function import InputFunction, InputSpec
from lowbit.errors import RecipeError, near_names
from lowbit.estimators import through

NORMS = ("none", "rms", "layer")


class Token(InputFunction):
    """norm: "none", "rms" or "layer"."""

    def __init__(self, axis: int = -1, norm: str = "none"):
        if norm not in NORMS:
            raise RecipeError(f"unknown norm {norm!r}. {near_names(str(norm), NORMS)}")
        super().__init__()
        self.axis, self.norm = axis, norm

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "rms":
            x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        elif self.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:])
        with torch.no_grad():
            axes = (-1,) if self.axis == -1 else tuple(range(x.ndim - 3, x.ndim))
            scale = 127 / x.detach().abs().amax(axes, keepdim=True).clamp(min=1e-5)
            x_hat = (x * scale).round_().clamp_(-128, 127) / scale
        return through(x, x_hat)


def build(channels: int, axis: int, **options: Any) -> Token:
    return Token(axis, **options)


OPTIONS = {"norm": "none"}
SPEC = InputSpec("token", "8 bits, a scale a token", "arXiv:2402.17764", build, OPTIONS)
