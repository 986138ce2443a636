"""Elastic, signed: a clip whose width is the learned scale itself.

    forward   T(x) = clip(x, -1, 1),  x = w / alpha            the level is sign(x), the value alpha sign(x)
    backward  T'(x) = 1 where |x| <= 1, else 0;   dy/dalpha = sign(x)
    schedule  none

With a constant scale it is "clipped". The exact derivative to alpha would be sign(x) - x inside the window; the
papers' code gives every weight its whole sign. Source: Liu et al. 2022, BiT (arXiv:2205.13016); TBT (arXiv:2306.01841).
"""

from torch import Tensor

from lowbit.estimators._estimator import Estimator
from lowbit.estimators.clipped import slope, transform


def scale_slope(x: Tensor, level: Tensor, slope: Tensor) -> Tensor:
    return level


SPEC = Estimator(
    "elastic_signed",
    "clip as wide as the learned scale",
    "arXiv:2205.13016",
    transform,
    slope,
    fits="sign",
    scale_slope=scale_slope,
)
