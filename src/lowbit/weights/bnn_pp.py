"""BNN++: the network computes with SwishSign itself while it trains; beta rises until it is the sign.

    training     w_hat = mean|w| SS_beta(w / mean|w|)          dL/dw = dL/dw_hat SS_beta'
    evaluation   w_hat = mean|w| sign(w)

The forward pass of training is not binary: only evaluation mode says what will be packed. Call lowbit.step. Source: Lu
et al. 2023 (arXiv:2402.17710), F = P o T with P the identity; the ends of beta are ours.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {
    "format": "binary-channel",
    "estimator": {"name": "swishsign", "beta": 1.0, "end": 50.0},
    "forward": "soft",
}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec(
    "bnn_pp", "SwishSign in the forward pass, sharpened into the sign", "arXiv:2402.17710", build, OPTIONS
)
