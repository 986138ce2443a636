"""Regularizers that pull latent weights to +-alpha; alpha (blocks, 1) is trained with them.

    r1 = sum | alpha - |w| |              least where alpha is the median of |w|
    r2 = sum ( alpha - |w| )^2            least where alpha is the mean of |w|
    foothill = sum p(|w| - alpha)         p(x) = a x tanh(b x / 2), between the two

Sources: Darabi et al. 2018, BNN+ (arXiv:1812.11800); Belbahri et al. 2019, Foothill (arXiv:1901.06414).
"""

from collections.abc import Callable

from torch import Tensor

from lowbit.estimators.foothill import penalty


def r1(blocks: Tensor, alpha: Tensor) -> Tensor:
    return (alpha - blocks.abs()).abs().sum()


def r2(blocks: Tensor, alpha: Tensor) -> Tensor:
    return (alpha - blocks.abs()).square().sum()


def foothill(blocks: Tensor, alpha: Tensor) -> Tensor:
    """a = 1, b = 50: like R1 beyond a distance of 0.05, smooth nearer."""
    return penalty(blocks.abs() - alpha, 1.0, 50.0).sum()


REGULARIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"r1": r1, "r2": r2, "foothill": foothill}
