"""BitNet b1.58 Reloaded: the median magnitude instead of the mean, for small models.

At most half of the weights are below the median, so at most half become zero, and one outlier does not move the scale.
strength=(0, 1) mixes the rounding in, w + t (w_hat - w) with t rising over the training (then call lowbit.step);
stochastic=True keeps a weight with probability |w| / median. Evaluation and packing always round fully.

Source: Nielsen and Schneider-Kamp 2024 (arXiv:2407.09527). The rule is in ternary_rule.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.ternary_rule import TernaryRule

OPTIONS: dict[str, Any] = {"statistic": "median", "strength": (1.0, 1.0), "stochastic": False}


def build(w: Tensor, **options: Any) -> TernaryRule:
    return TernaryRule(**OPTIONS | options)


SPEC = WeightSpec("bitnet_reloaded", "ternary, absolute median, ramped", "arXiv:2407.09527", build, OPTIONS)
