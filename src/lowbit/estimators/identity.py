"""Identity straight-through: the rounding is passed as if it were not there.

    forward   T(x) = x        backward   T'(x) = 1        schedule   none

Source: Courbariaux et al. 2015, BinaryConnect (arXiv:1511.00363); Bengio et al. 2013 (arXiv:1308.3432).
"""

import torch
from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value


def transform(x: Tensor, t: Value = 1.0) -> Tensor:
    return x


def slope(x: Tensor, t: Value = 1.0) -> Tensor:
    return torch.ones_like(x)


SPEC = Estimator("identity", "straight-through, gradient unchanged", "arXiv:1511.00363", transform, slope)
