"""ApproxSign: the sign as two parabolas.

    forward   T(x) = 2x - x |x| on [-1, 1], +-1 outside        backward   T'(x) = max(0, 2 - 2|x|)
    schedule  none

Source: Liu et al. 2018, Bi-Real Net (arXiv:1808.00278); also the activations of ReActNet (arXiv:2003.03488).
"""

from torch import Tensor

from lowbit.estimators._estimator import Estimator, Value


def transform(x: Tensor, t: Value = 1.0) -> Tensor:
    inside = x.clamp(-1, 1)
    return inside * (2 - inside.abs())


def slope(x: Tensor, t: Value = 1.0) -> Tensor:
    return (2 - 2 * x.abs()).clamp(min=0)


SPEC = Estimator("approxsign", "two parabolas", "arXiv:1808.00278", transform, slope, fits="sign")
