"""BinaryConnect: the sign of the weight, without a scale.

    w_hat = sign(w)          dL/dw = dL/dw_hat          after a step  w <- clip(w, -1, 1)

Wants a BatchNorm behind every layer. Source: Courbariaux et al. 2015 (arXiv:1511.00363), the deterministic kind.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {"format": "binary-tensor", "scale": "unit", "clip": 1.0}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec("binaryconnect", "signs without a scale, straight-through", "arXiv:1511.00363", build, OPTIONS)
