"""Weight functions of grids and of powers of two, for many layers at once (see `lowbit.bench.stacked`)."""

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.bench.stacked import Latents, Method, Parq, layer_mean_abs, mean_abs, sgn_through, step_through
from lowbit.estimators import through
from lowbit.train.networks import sgn

# the smallest level over mean|w| that rounds a normal weight best: +-{1, 2}, +-{1, 2, 4, 8}, +-{1, ..., 128}
SHIFT_STEP = {2: 0.812, 3: 0.340, 4: 0.0428}


class Lsq(Method):
    """round(clip(w / s)) s with s trained per layer, its gradient divided by sqrt(weights * largest level)."""

    source = "LSQ, Esser 2020 (arXiv:1902.08153)"

    def __init__(self, bits: int):
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.format = f"int{bits}-tensor"

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone(), "scale": 2 * layer_mean_abs(w) / math.sqrt(self.high)}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return (p["w"] / p["scale"]).clamp(self.low, self.high).round(), p["scale"]

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        w = p["w"]
        g = 1 / math.sqrt(w[0].numel() * self.high)
        s = p["scale"].detach() + (p["scale"] - p["scale"].detach()) * g
        x = (w / s).clamp(self.low, self.high)
        return through(x, self.nearest(x.detach())) * s

    def nearest(self, x: Tensor) -> Tensor:
        return x.round()

    def after(self, p: Latents) -> None:
        p["scale"].clamp_(min=1e-4)


class DeepShiftQ(Method):
    """sign(w) 2^round(log2|w|), |w| held within its 2^(b-1) powers; their top is fixed at 2 mean|w| of the start."""

    source = "DeepShift, Elhoushi 2021 (arXiv:1905.13298)"

    def __init__(self, bits: int):
        self.depth = 2 ** (bits - 1) - 1
        self.format = f"pot{bits}nz-tensor"

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone(), "fixed_scale": 2 * layer_mean_abs(w) / 2**self.depth}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        x = p["w"] / p["fixed_scale"]
        return sgn(x) * torch.exp2(x.abs().clamp(min=0.5).log2().round().clamp(0, self.depth)), p["fixed_scale"]

    def after(self, p: Latents) -> None:
        w, c = p["w"], p["fixed_scale"]
        w.copy_(sgn(w) * w.abs().maximum(c).minimum(c * 2**self.depth))


def power_below(size: Tensor, depth: int) -> Tensor:
    """The largest 2^i <= size, i from 0 to depth."""
    return torch.exp2(size.clamp(min=0.5).log2().floor().clamp(0, depth))


class LsqShift(Lsq):
    """`Lsq` with the levels +-2^i, i < 2^(b-1), in place of a grid: w / s goes to the nearest one."""

    source = "levels: DenseShift, Li 2023 (arXiv:2208.09708); scale: LSQ, Esser 2020 (arXiv:1902.08153)"

    def __init__(self, bits: int):
        self.depth = 2 ** (bits - 1) - 1
        self.low, self.high = -(2**self.depth), 2**self.depth
        self.format, self.start = f"pot{bits}nz-tensor", SHIFT_STEP[bits]

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone(), "scale": self.start * layer_mean_abs(w)}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return self.nearest(p["w"] / p["scale"]), p["scale"]

    def nearest(self, x: Tensor) -> Tensor:
        return sgn(x) * power_below(x.abs() * (4 / 3), self.depth)  # 1.5 * 2^i lies half way


class ParqShift(Parq):
    """`Parq` with the levels +-2^i, i < 2^(b-1), in units of a fixed share of mean|w| per row."""

    source = "PARQ, Jin 2025 (ICML); levels: DenseShift, Li 2023 (arXiv:2208.09708)"

    def __init__(self, bits: int):
        self.depth, self.unit = 2 ** (bits - 1) - 1, SHIFT_STEP[bits]
        self.format = f"pot{bits}nz-channel"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        a = self.unit * mean_abs(p["w"])
        x = p["w"] / a.clamp(min=1e-12)
        return sgn(x) * power_below(x.abs() * (4 / 3), self.depth), a

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        u = p["w"].detach()
        levels, a = self.hard({"w": u})
        x = u / a.clamp(min=1e-12)
        size = x.abs()
        low = power_below(size, self.depth - 1)
        between = (1.5 * low + (size - 1.5 * low) / t[0]).maximum(low).minimum(2 * low)
        soft = torch.where(size < 1, (x / t[0]).clamp(-1, 1), sgn(x) * between)
        return through(p["w"], torch.where(t[0] < 1e-5, levels, soft) * a)


class SignPlanes(Method):
    """What S3 and DenseShift share: several latents a weight from N(0, 2 / fan out) or N(0, sigma^2), no scale."""

    planes: tuple[str, ...] = ()
    sigma: float | None = None

    def latents(self, w: Tensor) -> Latents:
        std = self.sigma or math.sqrt(2 / (9 * w.shape[1]))  # 3 x 3 convolutions
        return {name: torch.randn(w.shape) * std for name in ("sign", *self.planes)}

    def one(self, p: Latents) -> Tensor:
        return torch.ones_like(p["sign"][:, :1, :1])


class S3(SignPlanes):
    """sgn(u) H(z) 2^S, S = H(u1)(1 + H(u2)(1 + ...)); loss + 1e-5 sum max(-z, 0)."""

    source = "S3, Li 2021 (arXiv:2107.03453)"

    def __init__(self, bits: int):
        self.shifts = tuple(f"u{i}" for i in range(1, 2 ** (bits - 1) - 1))
        self.planes = ("sparse", *self.shifts)
        self.format = "ternary-tensor" if bits == 2 else f"pot{bits}-tensor"

    def _shift(self, p: Latents) -> "Tensor | float":
        s: Any = 0.0
        for name in reversed(self.shifts):
            s = step_through(p[name]) * (s + 1)
        return s

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        w = sgn_through(p["sign"]) * step_through(p["sparse"])
        return w * torch.exp2(self._shift(p)) if self.shifts else w  # type: ignore[arg-type]

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return self.weight(p, ()), self.one(p)

    def penalty(self, p: Latents) -> Tensor:
        return 1e-5 * (-p["sparse"]).clamp(min=0).sum()


class DenseShift(SignPlanes):
    """sgn(u) 2^S forward, sgn(u) sqrt(S + 1) backward; S counts the run of ones that ends at the last plane."""

    source = "DenseShift, Li 2023 (arXiv:2208.09708)"

    def __init__(self, bits: int, sigma: "float | None" = None):
        self.sigma = sigma
        self.planes = tuple(f"t{i}" for i in range(1, 2 ** (bits - 1)))
        self.format = f"pot{bits}nz-tensor"

    def _shift(self, p: Latents) -> Tensor:
        s: Any = 0.0
        for name in self.planes:
            s = (s + 1) * step_through(p[name])
        return s

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        sign, s = sgn_through(p["sign"]), self._shift(p)
        return through(sign * torch.sqrt(s + 1), (sign * torch.exp2(s)).detach())

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(p["sign"]) * torch.exp2(self._shift(p)), self.one(p)
