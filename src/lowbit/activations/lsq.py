"""k-bit inputs with a learned scale.

    x_hat = s * clip(round(x / s), low, high)         low, high: 0 .. 2**b - 1, or -2**(b-1) .. 2**(b-1) - 1 if signed
    dx = dy where low <= x/s <= high, else 0          ds = sum dy (level - x/s inside, level outside) / sqrt(n high)

s starts at 2 mean|x| / sqrt(high) of the first batch that is seen (in training or evaluation). After a ReLU take
signed=False. One scale for the whole tensor, so that it leaves the layer's sum. Source: Esser et al. 2020, LSQ
(arXiv:1902.08153).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.activations._function import InputFunction, InputSpec, OneBit, broadcast_from_first
from lowbit.errors import RecipeError
from lowbit.estimators import estimator as find_estimator
from lowbit.estimators import scaled
from lowbit.formats import levels

TINY = 1e-8


class LearnedScale(InputFunction):
    """One learned scale over integer levels; the first batch starts it.

    bits: 1 to 8; signed: levels on both sides of 0 (one bit: -1 and 1)
    """

    started: Tensor

    def __init__(self, bits: int = 4, signed: bool = False, estimator: Any = "clipped"):
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise RecipeError(f"activations of {bits!r} bits: use 1 to 8.")
        self_levels = levels("binary" if signed and bits == 1 else f"{'int' if signed else 'uint'}{bits}")
        est = find_estimator(estimator).over(self_levels)
        super().__init__(est.schedule, est.start)
        self.levels, self.estimator, self.bits, self.signed = self_levels, est, bits, signed
        self.scale = nn.Parameter(torch.ones(1))  # not (): sharded training takes no scalars
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready:
            self._begin(x)
        low, high = self.levels.values[0], self.levels.values[-1]
        with torch.no_grad():
            s = self.scale.detach().to(x.dtype).clamp(min=TINY)
            steps = x.detach() / s
            level = (
                torch.where(steps >= 0, 1.0, -1.0).to(x.dtype) if low == -1 == -high else steps.round().clamp(low, high)
            )
            slope = self.estimator.slope(steps, self.t)
            to_scale = self.estimator.scale_slope(steps, level, slope) / (x.numel() * high) ** 0.5
        return scaled(x, self.scale.clamp(min=TINY), level, slope, to_scale)

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """Scale from the first batch, unless a checkpoint has brought one."""
        first = (2 * x.detach().float().abs().mean() / self.levels.values[-1] ** 0.5).clamp(min=TINY)
        self.scale.copy_(torch.where(self.started, self.scale, self._first(x, first)))
        self.started.fill_(True)
        broadcast_from_first(self.scale)
        self._ready = True

    def _first(self, x: Tensor, lsq: Tensor) -> Tensor:
        return lsq

    def int_grid(self) -> "tuple[float, int, int] | None":
        low, high = int(self.levels.values[0]), int(self.levels.values[-1])
        if low == -1 == -high or not bool(self.started):
            return None
        return float(self.scale.detach().float().clamp(min=TINY)), low, high

    def one_bit(self) -> "OneBit | None":
        if self.bits > 1 or not bool(self.started):
            return None
        s = self.scale.detach().float().clamp(min=TINY)
        if self.signed:
            return OneBit("sign", 0.0, float(s))
        return OneBit("unit", torch.nextafter(s / 2, s), float(s))  # x / s rounds to even: the tie 1/2 is level 0


def build(channels: int, axis: int, **options: Any) -> LearnedScale:
    return LearnedScale(**options)


OPTIONS = {"bits": 4, "signed": False, "estimator": "clipped"}
SPEC = InputSpec("lsq", "k bits with a learned scale", "arXiv:1902.08153", build, OPTIONS)
