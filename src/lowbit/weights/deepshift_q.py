"""DeepShift-Q: the weight rounded to a power of two, in the logarithm.

    w_hat = sgn(w) 2**clip(round(log2|w|), top - 2**(bits-1) + 1, top)          dL/dw = dL/dw_hat
    after a step |w| is clamped to the range of the shifts

Rounding the logarithm puts the threshold at sqrt 2 times the lower level, not 1.5 times: 5% more squared error on
Gaussian weights. There is no zero. `top` is the largest shift: the paper has 0; by default it is that of the largest
weight at the start, which is what layers with small weights and no BatchNorm need.

Source: Elhoushi et al. 2021 (arXiv:1905.13298).
"""

from math import log2
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.estimators import through
from lowbit.estimators._project import code_of
from lowbit.formats import Format, Grid
from lowbit.weights._function import TINY, WeightFunction, WeightSpec, as_matrix
from lowbit.weights._planes import shift_bits

LOWEST = -14  # the smallest normal power of two of fp16


class DeepShiftQ(WeightFunction):
    """bits: 2 to 4; top: the largest shift, -20 to 15, or None."""

    scale: Tensor

    def __init__(self, w: Tensor, bits: int, top: "int | None"):
        super().__init__()
        self.bits = shift_bits(bits, "deepshift_q")
        if top is None:
            largest = float(w.detach().float().abs().max()) if w.numel() else 0.0
            top = max(round(log2(largest)) if largest > 0 else 0, LOWEST + 2 ** (self.bits - 1) - 1)
        self.low = top - 2 ** (self.bits - 1) + 1
        if not LOWEST <= self.low <= top <= 15:
            raise RecipeError(f"shifts from {self.low} to {top}: fp16 scales hold {LOWEST} to 15. Give another top.")
        self.format = Format.parse(f"pot{self.bits}nz-tensor")
        self.register_buffer("scale", torch.full((1, 1), 2.0**self.low, device=w.device))

    def forward(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            w_hat = self._level(latent.detach()).mul_(self.scale.reshape(()))
        return through(latent, w_hat)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        return (
            as_matrix(code_of(self._level(latent), self.format.levels)).to(torch.uint8),
            Grid(self.scale),
            self.format,
        )

    @torch.no_grad()
    def after_step(self, latent: Tensor) -> None:
        size = latent.abs().clamp_(2.0**self.low, 2.0 ** (self.low + 2 ** (self.bits - 1) - 1))
        latent.copy_(torch.where(latent >= 0, size, -size))

    def _level(self, w: Tensor) -> Tensor:
        """+-2**k, k from 0 to 2**(bits-1) - 1: the weight over 2**low."""
        shift = w.float().abs().clamp_(min=TINY).log2_().round_().sub_(self.low)
        power = shift.clamp_(0, 2 ** (self.bits - 1) - 1).exp2_()
        return torch.where(w >= 0, power, -power)


def build(w: Tensor, **options: Any) -> DeepShiftQ:
    return DeepShiftQ(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"bits": 4, "top": None}
SPEC = WeightSpec("deepshift_q", "nearest power of two in the logarithm", "arXiv:1905.13298", build, OPTIONS)
