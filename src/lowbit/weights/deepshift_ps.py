"""DeepShift-PS: the shift and the sign are trained numbers.

    w_hat = scale t 2**round(p)         t = sgn(round(u)) in {-1, 0, 1},  p clipped to [-(2**(bits-1) - 2), 0]
    dL/dp = g t 2**p ln 2,  g = scale dL/dw_hat          dL/du = dL/dw_hat, the raw gradient, not times 2**p

One shift fewer than DeepShift-Q, since the sign takes the zero. |u| < 1/2 is the zero. Random start: p uniform over its
range, u uniform in [-1, 1]. The reference recipe needs RAdam. Source: Elhoushi et al. 2021 (arXiv:1905.13298).
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights._planes import Planes, shift_bits

LN2 = log(2)


class _PowerSign(torch.autograd.Function):
    """latent (2, *shape): shift and sign -> level * scale."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, level: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(level, scale)
        return (level * scale).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        level, scale = ctx.saved_tensors
        g = grads[0]
        return torch.stack([g * level * (scale * LN2), g]), None, None


class DeepShiftPS(Planes):
    """bits: 2 to 4; init: "random" or "weights"."""

    planes = 2

    def __init__(self, w: Tensor, bits: int, init: str):
        self.top = 2 ** (shift_bits(bits, "deepshift_ps") - 1) - 2
        super().__init__(w, "ternary" if bits == 2 else f"pot{bits}", init, None)

    def forward(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            level = self.level(latent)
        return _PowerSign.apply(latent, level, self.factor(latent))

    def level(self, latent: Tensor) -> Tensor:
        """0 or +-2**k, k from 0: the shift counted from its lowest."""
        power = latent[0].float().round().clamp(-self.top, 0).add(self.top).exp2()
        return latent[1].float().round().sign() * power

    @torch.no_grad()
    def after_step(self, latent: Tensor) -> None:
        latent[0].clamp_(-self.top, 0)

    def mean_square(self) -> float:
        return sum(4.0**k for k in range(self.top + 1)) / (self.top + 1) / 2

    def random_latent(self, w: Tensor, sigma: float) -> Tensor:
        draw = torch.rand(2, *w.shape, dtype=w.dtype, device=w.device)
        return torch.stack([-self.top * draw[0], 2 * draw[1] - 1])

    def latent_for(self, level: Tensor, sigma: float) -> Tensor:
        return torch.stack([level.abs().clamp(min=1).log2().round() - self.top, level.sign()])


def build(w: Tensor, **options: Any) -> DeepShiftPS:
    return DeepShiftPS(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"bits": 4, "init": "random"}
SPEC = WeightSpec("deepshift_ps", "trained shift and sign", "arXiv:1905.13298", build, OPTIONS)
