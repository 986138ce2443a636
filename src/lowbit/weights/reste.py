"""ReSTE weights: one scale a layer, with a gradient, and the estimator of the same name.

    w_hat = mean|w| sign(w)          dL/dw = s dL/dw_hat T_o'(w) + sign(w) mean(dL/dw_hat sign(w)), s = mean|w|

T_o is in lowbit.estimators.reste; o follows a schedule, so call lowbit.step. Source: Wu et al. 2023 (arXiv:2308.06689).
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {"format": "binary-tensor", "estimator": "reste", "scale": "attached", "unit": "raw"}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec("reste", "signed-power estimator, one scale a layer", "arXiv:2308.06689", build, OPTIONS)
