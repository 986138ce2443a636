"""S3: sign, sparsity and shift each have a latent of their own, so that a sign can flip without crossing zero.

    w_hat = scale sgn(u_0) z 2**S     z = H(u_1)     S = H(u_2) (1 + H(u_3) (1 + ... H(u_{n+1})))
                                      n = 2**(bits-1) - 2 shift planes
    with g = dL/dw_hat * scale:       dL/du_0 = g z 2**S     dL/du_1 = g sgn(u_0) 2**S
                                      dL/dS = g W ln 2       dS/du_{k+1} = prod_{j<k} H_j * (1 + H_{k+1} (1 + ...))

sgn(0) = +1, H(0) = 0; both pass the gradient unchanged, without a window. 3 bits: {0, +-1, +-2, +-4}; 2 bits: ternary.
lowbit.penalty adds  sparsity * sum max(-u_1, 0),  which keeps weights away from zero. Weight decay on the latents pulls
them to where they flip: it acts as a temperature. Memory while training: n + 2 numbers a weight.

Source: Li et al. 2021 (arXiv:2107.03453); the recursion for other widths than 3 bits is ours.
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights._planes import Planes, run_probabilities, shift_bits

LN2 = log(2)


class _S3(torch.autograd.Function):
    """All planes at once: a forward and a backward pass in closed form."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor) -> Tensor:
        z, power = u[1] > 0, _shift(u)
        signed = torch.where(u[0] >= 0, power, -power)
        ctx.save_for_backward(u, scale, signed)
        return (signed * z * scale).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        u, scale, signed = ctx.saved_tensors
        z = u[1] > 0
        out = torch.empty_like(u)
        dense = grads[0] * scale * signed  # g s 2**S
        out[1] = dense
        kept = dense * z  # g W
        out[0] = torch.where(u[0] >= 0, kept, -kept)
        if len(u) > 2:
            _shift_gradients(kept * LN2, u, out)
        return out, None


def _shift(u: Tensor) -> Tensor:
    """2**S, float32: S the recursion over the planes from 2 on."""
    s = torch.zeros_like(u[0], dtype=torch.float32)
    for plane in range(len(u) - 1, 1, -1):
        s = (s + 1) * (u[plane] > 0)
    return s.exp2_()


def _shift_gradients(to_s: Tensor, u: Tensor, out: Tensor) -> None:
    """out[k] = to_s * prod_{j<k} H_j * A_k, with A_k = 1 + H_{k+1} A_{k+1}, for planes k from 2 on."""
    ones = [u[k] > 0 for k in range(2, len(u))]
    inner = [torch.ones_like(to_s)]
    for h in reversed(ones[1:]):
        inner.append(inner[-1] * h + 1)
    for k, a in enumerate(reversed(inner)):
        out[k + 2] = to_s * a
        to_s = to_s * ones[k]


class S3(Planes):
    """bits: 2 to 4; init: "random" or "weights"; sigma: spread of the latents (None: Kaiming's, by fan-out).

    dense: a random start without zeros and shifts, as one of the released versions has it
    """

    def __init__(self, w: Tensor, bits: int, init: str, sigma: "float | None", sparsity: float, dense: bool):
        self_bits = shift_bits(bits, "s3")
        self.planes, self.dense = 2 ** (self_bits - 1), dense
        super().__init__(w, "ternary" if self_bits == 2 else f"pot{self_bits}", init, sigma)
        self.sparsity = sparsity

    def forward(self, latent: Tensor) -> Tensor:
        return _S3.apply(latent, self.factor(latent))

    def level(self, latent: Tensor) -> Tensor:
        return torch.where(latent[0] >= 0, 1.0, -1.0) * (latent[1] > 0) * _shift(latent)

    def penalty(self, latent: Tensor) -> Tensor:
        return (-latent[1]).relu().sum() * self.sparsity

    def mean_square(self) -> float:
        if self.dense:
            return 1.0
        return sum(p * 4.0**k for k, p in enumerate(run_probabilities(self.planes - 2))) / 2

    def random_latent(self, w: Tensor, sigma: float) -> Tensor:
        u = super().random_latent(w, sigma)
        if self.dense:
            u[1], u[2:] = u[1].abs(), -u[2:].abs()
        return u

    def latent_for(self, level: Tensor, sigma: float) -> Tensor:
        u = torch.randn(self.planes, *level.shape, device=level.device).abs_() * sigma
        u[0] = torch.where(level < 0, -u[0], u[0])
        u[1] = torch.where(level == 0, -u[1], u[1])
        exponent = level.abs().clamp(min=1).log2().round()
        for k in range(
            2, self.planes
        ):  # plane k is a one where the shift is at least k - 1; beyond the first zero: free
            u[k] = torch.where(exponent >= k - 1, u[k], -u[k])
        return u


def build(w: Tensor, **options: Any) -> S3:
    return S3(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"bits": 3, "init": "random", "sigma": None, "sparsity": 1e-5, "dense": False}
SPEC = WeightSpec("s3", "sign, sparsity and shift latents", "arXiv:2107.03453", build, OPTIONS)
