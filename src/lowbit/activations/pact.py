"""Clipped inputs with a learned ceiling, rounded to k bits.

    y = clip(x, 0, alpha)          x_hat = round(y (2**b - 1) / alpha) alpha / (2**b - 1)
    dx = dy where 0 <= x <= alpha, else 0          dalpha = the sum of dy where x > alpha

alpha starts at 6 and is pulled down by weight decay, which PACT wants. Source: Choi et al. 2018 (arXiv:1805.06085).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.activations._function import InputFunction, InputSpec, OneBit
from lowbit.errors import RecipeError
from lowbit.estimators import scaled


class Pact(InputFunction):
    """bits: 1 to 8; alpha: where the ceiling starts."""

    def __init__(self, bits: int = 4, alpha: float = 6.0):
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise RecipeError(f"activations of {bits!r} bits: use 1 to 8.")
        super().__init__()
        self.bits = bits
        self.alpha = nn.Parameter(torch.tensor([float(alpha)]))

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.bits - 1
        alpha = self.alpha.clamp(min=1e-5)
        with torch.no_grad():
            share = x.detach() / alpha.to(x.dtype)
            level = share.clamp(0, 1).mul_(top).round_().div_(top)
            inside = ((share >= 0) & (share <= 1)).to(x.dtype)
            above = (share > 1).to(x.dtype)
        return scaled(x, alpha, level, inside, above)

    def one_bit(self) -> "OneBit | None":
        if self.bits > 1:
            return None
        alpha = self.alpha.detach().float().clamp(min=1e-5)
        return OneBit("unit", torch.nextafter(alpha / 2, alpha), float(alpha))  # the tie 1/2 rounds to level 0


def build(channels: int, axis: int, **options: Any) -> Pact:
    return Pact(**options)


OPTIONS = {"bits": 4, "alpha": 6.0}
SPEC = InputSpec("pact", "k bits under a learned ceiling", "arXiv:1805.06085", build, OPTIONS)
