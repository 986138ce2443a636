"""Clipped straight-through: the gradient stops where the weight has left [-1, 1] steps.

    T(x) = clip(x, -1, 1)        T'(x) = 1 where |x| <= 1, else 0

For binary and ternary levels, whose outermost value is 1. With wider level sets it would freeze almost every weight.
Source: Hubara et al. 2016, Binarized Neural Networks (arXiv:1602.02830).
"""

from torch import Tensor

from lowbit.estimators._estimator import Estimator


def transform(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)


def slope(x: Tensor) -> Tensor:
    return (x.abs() <= 1).to(x.dtype)


SPEC = Estimator("clipped", "straight-through inside [-1, 1]", "arXiv:1602.02830", transform, slope)
