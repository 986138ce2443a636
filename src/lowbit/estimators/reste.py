"""ReSTE, rectified straight-through: a signed power that moves from the identity to the sign.

    forward   T(x) = sign(x) |x|**(1/o)         for m < |x| <= cut;  m**(1/o) x / m (a chord) below m, constant above
    backward  T'(x) = |x|**((1-o)/o) / o        for m < |x| <= cut;  m**(1/o) / m below m, 0 above cut
    schedule  o = 1 + (1 - cos(pi position / 2)) (power - 1), power 3;  m = 0.1, cut = 1.5

At o = 1 it is the clipped straight-through with window 1.5. T' jumps at m unless o = 1 (chord 4.64, tangent 1.55 at
o = 3). A larger o has less estimating error and less stable gradients: the two indicators below measure both.

Source: Wu et al. 2023 (arXiv:2308.06689), the constants are those of its code.
"""

from collections.abc import Iterable
from functools import partial
from math import cos, pi

import torch
from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value

M, CUT = 0.1, 1.5


def transform(x: Tensor, t: Value = 1.0) -> Tensor:
    size = x.abs()
    power = size.clamp(M, CUT) ** (1 / t)
    return torch.where(size > M, x.sign() * power, x * (M ** (1 / t) / M))


def slope(x: Tensor, t: Value = 1.0) -> Tensor:
    size = x.abs()
    power = size.clamp(min=M) ** (1 / t - 1) / t
    return torch.where(size > M, power, M ** (1 / t) / M) * (size <= CUT)


def estimating_error(weights: Iterable[Tensor], o: float) -> Tensor:
    """sum over layers of || sign(w) |w|**(1/o) - sign(w) ||_2: how far T is from the sign. Falls with o."""
    return torch.stack([(w.detach().abs() ** (1 / o) - 1).norm() for w in weights]).sum()


def gradient_stability(gradients: Iterable[Tensor]) -> Tensor:
    """sum over layers of the variance of |gradient| over the layer's weights. Rises with o: less stable."""
    return torch.stack([g.detach().abs().var() for g in gradients]).sum()


def power_at(power: float, position: float) -> float:
    """o at a position of the training."""
    return 1 + (1 - cos(pi * position / 2)) * (power - 1)


def make(power: float = 3.0) -> Estimator:
    """power: o at the end of the training."""
    return Estimator(
        "reste",
        "signed power from identity to sign",
        "arXiv:2308.06689",
        transform,
        slope,
        schedule=partial(power_at, power),
        fits="sign",
        make=make,
    )


SPEC = make()
