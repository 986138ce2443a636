"""DenseShift: +-2**S without a zero, every code used, and a surrogate that tames the gradient of the shift.

    w_hat = scale sgn(u_0) 2**S       S_0 = 0, S_i = (S_{i-1} + 1) H(u_i), S = S_N        N = 2**(bits-1) - 1
    backward as if sgn(u_0) sqrt(S + 1) stood there; with g = dL/dw_hat * scale:
    dL/du_0 = g sqrt(S + 1)           dL/dS = g sgn(u_0) / (2 sqrt(S + 1))
    dS/du_i = (S_{i-1} + 1) prod_{j>i} H(u_j)

S is the length of the run of ones that ends at plane N. sgn(0) = +1, H(0) = 0; both pass the gradient unchanged.
surrogate=False differentiates 2**S itself, dL/dS = g W ln 2, which grows with the shift: the paper's ablation.
sigma=1e-3 is its low-variance start for transfer; from scratch it also trained far better here (ResNet-8, 3 bits: 73 %
against 58 %), since latents of the size of Kaiming's rarely change sign. Memory while training: N + 1 numbers a weight
(2, 4, 8).

Source: Li et al. 2023 (arXiv:2208.09708); N = 2**(bits-1) - 1 for other widths than 3 bits is ours, as is the scale,
which networks without BatchNorm need: E[level^2] is 2.5, 11.5 and 191.5 at 2, 3 and 4 bits.
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights._planes import Planes, run_probabilities, shift_bits

LN2 = log(2)


class _DenseShift(torch.autograd.Function):
    """All planes at once: a forward and a backward pass in closed form."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, surrogate: bool) -> Tensor:
        shift = _shift(u)
        ctx.save_for_backward(u, scale, shift)
        ctx.surrogate = surrogate
        power = shift.exp2()
        return (torch.where(u[0] >= 0, power, -power) * scale).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        u, scale, shift = ctx.saved_tensors
        out = torch.empty_like(u)
        g = grads[0] * scale
        value = (shift + 1).sqrt_() if ctx.surrogate else shift.exp2()
        out[0] = g * value
        to_s = torch.where(u[0] >= 0, g, -g)
        to_s = to_s / (2 * value) if ctx.surrogate else to_s * value * LN2
        runs = _runs(u)
        for i in range(len(u) - 1, 0, -1):
            out[i] = to_s * runs[i - 1]
            if i > 1:
                to_s = to_s * (u[i] > 0)
        return out, None, None


def _runs(u: Tensor) -> list[Tensor]:
    """S_{i-1} + 1 for i = 1 .. N, float32."""
    run = torch.ones_like(u[0], dtype=torch.float32)
    runs = [run]
    for i in range(1, len(u) - 1):
        run = run * (u[i] > 0) + 1
        runs.append(run)
    return runs


def _shift(u: Tensor) -> Tensor:
    """S, float32."""
    return _runs(u)[-1] * (u[-1] > 0)


class DenseShift(Planes):
    """bits: 2 to 4; init: "random" or "weights"; sigma: spread of the latents (None: Kaiming's, by fan-out)."""

    def __init__(self, w: Tensor, bits: int, init: str, sigma: "float | None", surrogate: bool):
        self_bits = shift_bits(bits, "denseshift")
        self.planes = 2 ** (self_bits - 1)
        super().__init__(w, f"pot{self_bits}nz", init, sigma)
        self.surrogate = surrogate

    def forward(self, latent: Tensor) -> Tensor:
        return _DenseShift.apply(latent, self.factor(latent), self.surrogate)

    def level(self, latent: Tensor) -> Tensor:
        return torch.where(latent[0] >= 0, 1.0, -1.0) * _shift(latent).exp2_()

    def mean_square(self) -> float:
        return sum(p * 4.0**k for k, p in enumerate(run_probabilities(self.planes - 1)))

    def latent_for(self, level: Tensor, sigma: float) -> Tensor:
        u = torch.randn(self.planes, *level.shape, device=level.device).abs_() * sigma
        u[0] = torch.where(level < 0, -u[0], u[0])
        exponent = level.abs().log2().round()
        for i in range(1, self.planes):  # the last `exponent` planes are ones, the one before them is not
            u[i] = torch.where(exponent >= self.planes - i, u[i], -u[i])
        return u


def build(w: Tensor, **options: Any) -> DenseShift:
    return DenseShift(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"bits": 3, "init": "random", "sigma": None, "surrogate": True}
SPEC = WeightSpec("denseshift", "shifts without a zero", "arXiv:2208.09708", build, OPTIONS)
