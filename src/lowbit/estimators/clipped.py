"""Clipped straight-through: no gradient for a weight that has left the range of the levels.

    forward   T(x) = clip(x, low, high)        backward   T'(x) = 1 where low <= x <= high, else 0
    schedule  none                             low, high: the first and the last level (-1 and 1 for binary, ternary)

With a learned scale this is LSQ. Source: Hubara et al. 2016, Binarized Neural Networks (arXiv:1602.02830); Esser et
al. 2020, LSQ (arXiv:1902.08153).
"""

from functools import partial

from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value


def transform(x: Tensor, t: Value = 1.0, low: float = -1.0, high: float = 1.0) -> Tensor:
    return x.clamp(low, high)


def slope(x: Tensor, t: Value = 1.0, low: float = -1.0, high: float = 1.0) -> Tensor:
    return ((x >= low) & (x <= high)).to(x.dtype)


def make(low: float = -1.0, high: float = 1.0) -> Estimator:
    return Estimator(
        "clipped",
        "straight-through inside the range of the levels",
        "arXiv:1602.02830",
        partial(transform, low=low, high=high),
        partial(slope, low=low, high=high),
        ranged=True,
        make=make,
    )


SPEC = make()
