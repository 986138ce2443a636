"""Ternary by a threshold rule: one function with a statistic, a cut and a level is every rule of the papers.

    m = mean|w| or median|w| of a block, at least 1e-5
    w_hat = sign(w) level   where |w| > cut m, else 0          level = factor m, or the mean of what is kept ("kept")
    dL/dw = dL/dw_hat

    name              statistic   cut    level       on N(0, 1): zeros, squared error
    BitNet b1.58      mean        1/2    m           0.310       0.2636
    Reloaded          median      1/2    m           0.264       0.3181
    TBT               mean        2/3    4/3 m       0.405       0.1996
    TWN               mean        0.7    kept        0.424       0.1918
    least squares     mean        0.767  kept        0.460       0.1903

Sources: arXiv:2402.17764, arXiv:2407.09527, arXiv:2306.01841 and Li et al. 2016 (arXiv:1605.04711).
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.estimators import through
from lowbit.estimators._schedule import linear
from lowbit.formats import Format, Grid
from lowbit.weights._function import WeightFunction, WeightSpec, as_matrix, stored

SMALLEST = 1e-5  # of the statistic
STATISTICS = ("mean", "median", "max")


class TernaryRule(WeightFunction):
    """blocks: "tensor", "channel" or "g64"; statistic, cut, level as above.

    strength: (from, to) of the share of rounding in training, linear in the position; 1 rounds fully
    stochastic: while training a weight is kept with probability |w| / m instead of by the cut
    """

    def __init__(
        self,
        blocks: str = "tensor",
        statistic: str = "mean",
        cut: float = 0.5,
        level: "float | str" = 1.0,
        strength: "tuple[float, float]" = (1.0, 1.0),
        stochastic: bool = False,
    ):
        super().__init__()
        if statistic not in STATISTICS or not (level == "kept" or isinstance(level, (int, float))):
            raise RecipeError(
                f'statistic={statistic!r}, level={level!r}: use one of {STATISTICS}, and a factor or "kept".'
            )
        self.format = Format.parse(f"ternary-{blocks}")
        self.statistic, self.cut, self.level, self.stochastic = statistic, float(cut), level, stochastic
        self.t = float(strength[0])
        if strength[0] != strength[1]:
            self.follow(linear(*map(float, strength)))

    def forward(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            matrix = as_matrix(w.detach())
            blocks = self.format.blocks.split(matrix)
            level, scale = self._ternary(blocks, self.stochastic and self.training)
            w_hat = level.mul_(scale)
            if self.training and (self.schedule is not None or self.t != 1):
                w_hat = blocks + (w_hat - blocks) * self.t
            w_hat = self.format.blocks.merge(w_hat, *matrix.shape).reshape(w.shape)
        return through(w, w_hat)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        matrix = as_matrix(latent)
        level, scale = self._ternary(self.format.blocks.split(matrix))
        return self.format.blocks.merge((level + 1).to(torch.uint8), *matrix.shape), Grid(scale), self.format

    def _ternary(self, blocks: Tensor, stochastic: bool = False) -> tuple[Tensor, Tensor]:
        """-1, 0, 1 of each weight, and the stored scale of each block."""
        size = blocks.abs()
        m = self._measure(size).clamp(min=SMALLEST)
        keep = size / m >= torch.rand_like(size) if stochastic else size > self.cut * m
        if self.level == "kept":
            scale = (size * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        else:
            scale = m * float(self.level)
        return blocks.sign() * keep, stored(scale, self.format.scale_dtype)

    def _measure(self, size: Tensor) -> Tensor:
        if self.statistic == "median":
            return size.median(1, keepdim=True).values
        return size.mean(1, keepdim=True) if self.statistic == "mean" else size.amax(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"{str(self.format)!r}, {self.statistic} of |w|, cut={self.cut:g}, level={self.level}"


def build(w: Tensor, **options: Any) -> TernaryRule:
    return TernaryRule(**options)


OPTIONS: dict[str, Any] = {
    "blocks": "tensor", "statistic": "mean", "cut": 0.5, "level": 1.0, "strength": (1.0, 1.0), "stochastic": False,
}  # fmt: skip
SPEC = WeightSpec("ternary_rule", "ternary: any statistic, cut and level", "arXiv:2402.17764", build, OPTIONS)
