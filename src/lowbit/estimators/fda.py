"""FDA: the sign as a truncated Fourier series.

    forward   T(x) = (4/pi) sum_{i=0..n} sin((2i+1) w0 x) / (2i+1), x clipped to [-1, 1]
    backward  T'(x) = (4 w0/pi) sum_{i=0..n} cos((2i+1) w0 x) = (2 w0/pi) sin(2 (n+1) w0 x) / sin(w0 x), |x| <= 1
    schedule  n = 9 + floor(9 position);  w0 = 0.1

Source: Xu et al. 2021 (arXiv:2103.00841), constants as in BiBench's code; its noise branch is left out.
"""

from math import floor, pi

import torch
from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value

W0 = 0.1
TERMS = 19  # n + 1 at the end of the schedule


def transform(x: Tensor, t: Value = 9.0) -> Tensor:
    """The series itself: slow, for tests and for soft forward passes."""
    angle = W0 * x.clamp(-1, 1)
    total = torch.zeros_like(x)
    for i in range(TERMS):
        odd = 2 * i + 1
        total = total + (angle * odd).sin() / odd * (t >= i)
    return total * (4 / pi)


def slope(x: Tensor, t: Value = 9.0) -> Tensor:
    angle = W0 * x
    near_zero = angle.abs() < 1e-4  # there sin(2(n+1) a) / sin(a) is 2(n+1) to seven digits
    safe = torch.where(near_zero, 1.0, angle)
    ratio = torch.where(near_zero, 2 * (t + 1), (safe * (2 * (t + 1))).sin() / safe.sin())
    return ratio * (2 * W0 / pi) * (x.abs() <= 1)


def last_term(position: float) -> float:
    return 9.0 + floor(9 * position)


SPEC = Estimator(
    "fda", "truncated Fourier series", "arXiv:2103.00841", transform, slope, 9.0, schedule=last_term, fits="sign"
)
