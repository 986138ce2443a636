"""TWN: ternary with the threshold 0.7 mean|w| and the mean of what is kept as level; one scale a layer.

Source: Li et al. 2016 (arXiv:1605.04711). The rule is in ternary_rule.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.ternary_rule import TernaryRule

OPTIONS: dict[str, Any] = {"blocks": "tensor", "cut": 0.7, "level": "kept"}


def build(w: Tensor, **options: Any) -> TernaryRule:
    return TernaryRule(**OPTIONS | options)


SPEC = WeightSpec("twn", "ternary, threshold 0.7 mean|w|", "arXiv:1605.04711", build, OPTIONS)
