"""Sign of the input, after a learned shift: RSign.

    x_hat = sign(x + b)          b a channel, starts at 0; sign(0) = +1; no scale: a BatchNorm follows
    dx = dy * T'(x + b)          db = the sum of dx over the channel

After a BatchNorm the shift could be its beta; it helps where blocks have real-valued skips. Exported, it is a
threshold: x_hat = +1 where x >= -b. Without the shift (shift=False) this is BNN's activation (estimator "clipped") and
Bi-Real Net's ("approxsign").

Source: Liu et al. 2020, ReActNet (arXiv:2003.03488); Hubara et al. 2016 (arXiv:1602.02830).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.activations._function import InputFunction, InputSpec, OneBit
from lowbit.estimators import estimator as find_estimator
from lowbit.estimators import through
from lowbit.formats import levels

TINY = torch.finfo(torch.float32).tiny


class Sign(InputFunction):
    """channels: of the layer's input; shift: learn one number a channel; estimator: any that fits two levels."""

    def __init__(self, channels: int, axis: int = -1, shift: bool = True, estimator: Any = "approxsign"):
        est = find_estimator(estimator).over(levels("binary"))
        super().__init__(est.schedule, est.start)
        self.estimator, self.axis = est, axis
        self.shift = nn.Parameter(torch.zeros(channels)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.shift is None else x + self.per_channel(self.shift, x)
        with torch.no_grad():
            at = self.estimator.transform(z, self.t) if self.estimator.periodic else z
            level = torch.where(at > -TINY, 1.0, -1.0)
            slope = self.estimator.slope(z.detach(), self.t)
        return through(z, level, slope)

    def one_bit(self) -> "OneBit | None":
        if self.estimator.periodic:
            return None
        return OneBit("sign", 0.0 if self.shift is None else -self.shift.detach())


def build(channels: int, axis: int, **options: Any) -> Sign:
    return Sign(channels, axis, **options)


OPTIONS = {"shift": True, "estimator": "approxsign"}
SPEC = InputSpec("sign", "sign after a learned shift (RSign)", "arXiv:2003.03488", build, OPTIONS)
