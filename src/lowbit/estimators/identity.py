"""Identity straight-through: the rounding is passed as if it were not there.

    T(x) = x        T'(x) = 1

Source: Courbariaux et al. 2015, BinaryConnect (arXiv:1511.00363); Bengio et al. 2013 (arXiv:1308.3432).
"""

import torch
from torch import Tensor

from lowbit.estimators._estimator import Estimator


def transform(x: Tensor) -> Tensor:
    return x


def slope(x: Tensor) -> Tensor:
    return torch.ones_like(x)


SPEC = Estimator("identity", "straight-through, gradient unchanged", "arXiv:1511.00363", transform, slope)
