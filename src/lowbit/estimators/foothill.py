"""Foothill: one smooth function between |x| and x^2; its derivative is a soft sign, its second derivative the slope.

    p(x) = a x tanh(b x / 2)               the penalty: a = 1, b -> inf is |x|; a = 2/b, b -> 0 is x^2
    forward   T(x) = p'(x)  = a (tanh z + z sech^2 z),  z = b x / 2             = a SwishSign_b(x)
    backward  T'(x) = p''(x) = a b (1 - z tanh z) sech^2 z
    schedule  none (a = 1, b = 2)

Even, infinitely differentiable, quasiconvex but not convex: p'' < 0 for |z| > 1.19968. a and b both free is one
parameter too many: fix a = 1 or a = 2/b. Source: Belbahri et al. 2019 (arXiv:1901.06414).
"""

from functools import partial

from torch import Tensor

from lowbit.estimators import swishsign
from lowbit.estimators._estimator import Estimator, Value


def penalty(x: Tensor, a: float = 1.0, b: float = 2.0) -> Tensor:
    """p(x), elementwise: a regularizer or a loss."""
    return a * x * (x * (b / 2)).tanh()


def transform(x: Tensor, t: Value = 2.0, a: float = 1.0) -> Tensor:
    return swishsign.transform(x, t) * a


def slope(x: Tensor, t: Value = 2.0, a: float = 1.0) -> Tensor:
    return swishsign.slope(x, t) * a


def make(a: float = 1.0, b: float = 2.0) -> Estimator:
    return Estimator(
        "foothill",
        "derivative of x tanh x",
        "arXiv:1901.06414",
        partial(transform, a=a),
        partial(slope, a=a),
        start=b,
        fits="sign",
        make=make,
    )


SPEC = make()
