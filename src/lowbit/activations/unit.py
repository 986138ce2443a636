"""One bit without a negative level: {0, 1} times a learned scale, for what a ReLU or a softmax leaves.

    x_hat = alpha where x > alpha / 2, else 0
    dx = dy where 0 <= x <= alpha, else 0          dalpha = sum dy (level - x/alpha inside, level outside) / sqrt(n)

On a softmax's output a sign would give +1 everywhere: no information. alpha starts at the first batch's mean of x over
the positive entries: their least-squares level. x should not be negative. Source: Liu et al. 2022, BiT
(arXiv:2205.13016), the gradient to alpha as in LSQ.
"""

from typing import Any

from torch import Tensor

from lowbit.activations._function import InputSpec
from lowbit.activations.lsq import LearnedScale


class Unit(LearnedScale):
    """Levels 0 and 1 with a learned scale."""

    def __init__(self, estimator: Any = "elastic_unsigned"):
        super().__init__(1, False, estimator)

    def _first(self, x: Tensor, lsq: Tensor) -> Tensor:
        positive = x.detach().float().clamp(min=0)
        return (positive.sum() / (positive > 0).sum().clamp(min=1)).clamp(min=1e-8)


def build(channels: int, axis: int, **options: Any) -> Unit:
    return Unit(**options)


OPTIONS = {"estimator": "elastic_unsigned"}
SPEC = InputSpec("unit", "{0, 1} with a learned scale", "arXiv:2205.13016", build, OPTIONS)
