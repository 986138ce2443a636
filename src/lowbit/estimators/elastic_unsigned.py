"""Elastic, unsigned: levels from 0 on with a learned scale, for attention probabilities and after a ReLU.

    forward   T(x) = clip(x, 0, high),  x = a / alpha          at one bit the level is 1 where x > 1/2, else 0
    backward  T'(x) = 1 where 0 <= x <= high, else 0;   dy/dalpha = level - x inside the window, level outside
    schedule  none                                             high: the last level (1 at one bit)

Source: Liu et al. 2022, BiT (arXiv:2205.13016); the derivative to alpha is LSQ's (arXiv:1902.08153).
"""

from functools import partial

from lowbit.estimators import clipped
from lowbit.estimators._estimator import Estimator


def make(low: float = 0.0, high: float = 1.0) -> Estimator:
    return Estimator(
        "elastic_unsigned",
        "clip from 0 to the learned scale",
        "arXiv:2205.13016",
        partial(clipped.transform, low=low, high=high),
        partial(clipped.slope, low=low, high=high),
        fits="unsigned",
        ranged=True,
        make=make,
    )


SPEC = make()
