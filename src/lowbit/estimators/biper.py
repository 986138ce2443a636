"""BiPer: the sign of a sine, whose gradient never dies out.

    forward   T(x) = sin(omega x), so the level is sign(sin(omega x))        backward   T'(x) = omega cos(omega x)
    schedule  none (omega 20)

x is the raw weight: its period is 2 pi / omega = 0.31. T changes the sign, so the level is that of T(x), not of x.
Source: Vargas et al. 2024 (arXiv:2404.01278), omega as in its scripts.
"""

from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value


def transform(x: Tensor, t: Value = 20.0) -> Tensor:
    return (x * t).sin()


def slope(x: Tensor, t: Value = 20.0) -> Tensor:
    return (x * t).cos() * t


def make(omega: float = 20.0) -> Estimator:
    """omega: frequency in radians per unit of the raw weight."""
    title, source = "sign of a sine, cosine backward", "arXiv:2404.01278"
    return Estimator(
        "biper", title, source, transform, slope, start=omega, fits="sign", unit="raw", periodic=True, make=make
    )


SPEC = make()
