"""BNN: the sign of the weight, without a scale, and no gradient beyond [-1, 1].

    w_hat = sign(w)          dL/dw = dL/dw_hat 1[|w| <= 1]          after a step  w <- clip(w, -1, 1)

With activations {"method": "sign", "shift": False, "estimator": "clipped"} and a BatchNorm before each of them it is
the binarized network of Hubara et al. 2016 (arXiv:1602.02830).
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {
    "format": "binary-tensor",
    "estimator": "clipped",
    "scale": "unit",
    "unit": "raw",
    "clip": 1.0,
}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec("bnn", "signs without a scale, clipped straight-through", "arXiv:1602.02830", build, OPTIONS)
