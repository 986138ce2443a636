"""EDE, error decay estimator: a tanh that narrows from the identity to the sign.

    forward   T(x) = k tanh(t x),  k = max(1/t, 1)        backward   T'(x) = k t (1 - tanh^2(t x))
    schedule  t = 10**(log10 low + position (log10 high - log10 low)), low 1e-3, high 10

Early k t = 1 and nothing is lost; late the slope is a spike of height t. Source: Qin et al. 2020, IR-Net
(arXiv:1909.10788); the ends are those of its code, the paper starts at 1e-1.
"""

from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value
from lowbit.estimators._schedule import geometric


def transform(x: Tensor, t: Value = 1.0) -> Tensor:
    return (x * t).tanh() * _height(t)


def slope(x: Tensor, t: Value = 1.0) -> Tensor:
    return (1 - (x * t).tanh().square()) * (_height(t) * t)


def _height(t: Value) -> Value:
    return (1 / t).clamp(min=1) if isinstance(t, Tensor) else max(1 / t, 1.0)


def make(low: float = 1e-3, high: float = 10.0) -> Estimator:
    return Estimator(
        "ede",
        "tanh from identity to sign",
        "arXiv:1909.10788",
        transform,
        slope,
        start=low,
        schedule=geometric(low, high),
        fits="sign",
        make=make,
    )


SPEC = make()
