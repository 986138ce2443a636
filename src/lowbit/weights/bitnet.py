"""BitNet b1.58: {-1, 0, 1} times the mean magnitude of the whole weight, clip(round(w / mean|w|), -1, 1).

statistic="median" is the choice of BitNet b1.58 Reloaded. The level is a quarter too small for the least squared error,
which training absorbs and a trained model does not. Quantizing w_hat again gives another scale: the file keeps it. With
activations {"method": "token", "norm": "rms"} it is a BitLinear layer. Source: Ma et al. 2024 (arXiv:2402.17764). The
rule is in ternary_rule.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.ternary_rule import TernaryRule

OPTIONS: dict[str, Any] = {"blocks": "tensor", "statistic": "mean"}


def build(w: Tensor, **options: Any) -> TernaryRule:
    return TernaryRule(**OPTIONS | options)


SPEC = WeightSpec("bitnet", "ternary, absolute mean of the layer", "arXiv:2402.17764", build, OPTIONS)
