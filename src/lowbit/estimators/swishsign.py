"""SwishSign: the sign as a difference of two Swish functions, with tails that push back.

    forward   T(x) = tanh z + z sech^2 z,  z = beta x / 2
    backward  T'(x) = beta (1 - z tanh z) sech^2 z            = beta (2 - beta x tanh z) / (1 + cosh beta x)
    schedule  beta constant (5), or geometric up to `end` (BNN++, where the forward pass is T itself)

T is not monotone: it peaks at |z| = 1.19968 (the root of z tanh z = 1) with the value 1.19968, and T' is negative
beyond. `monotone=True` cuts T' at 0, which makes T the monotone envelope that a proximal map needs.

Source: Darabi et al. 2018, BNN+ (arXiv:1812.11800); with a rising beta and T in the forward pass BNN++ (Lu et al.
2023, arXiv:2402.17710).
"""

from functools import partial

from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value
from lowbit.estimators._schedule import geometric

PEAK = 1.1996786402577339  # z tanh z = 1, and the largest value of T


def transform(x: Tensor, t: Value = 5.0, monotone: bool = False) -> Tensor:
    z = x * (t / 2)
    if monotone:
        z = z.clamp(-PEAK, PEAK)
    tanh = z.tanh()
    return tanh + z * (1 - tanh.square())


def slope(x: Tensor, t: Value = 5.0, monotone: bool = False) -> Tensor:
    z = x * (t / 2)
    tanh = z.tanh()
    value = (1 - z * tanh) * (1 - tanh.square()) * t  # sech^2 from tanh: cosh would overflow
    return value.clamp(min=0) if monotone else value


def make(beta: float = 5.0, end: "float | None" = None, monotone: bool = False) -> Estimator:
    """beta: slope at 0; end: where it rises to, geometrically; monotone: no negative slope."""
    return Estimator(
        "swishsign",
        "difference of two Swish functions",
        "arXiv:1812.11800",
        partial(transform, monotone=monotone),
        partial(slope, monotone=monotone),
        start=beta,
        schedule=None if end is None else geometric(beta, end),
        fits="sign",
        make=make,
    )


SPEC = make()
