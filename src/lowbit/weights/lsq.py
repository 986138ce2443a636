"""LSQ: a learned scale over integer levels (or any others without a zero).

    w_hat = s clip(round(w/s), low, high)          dL/dw = dL/dw_hat inside the range, else 0
    dL/ds = sum dL/dw_hat (level - w/s inside, level outside) / sqrt(n high)

One scale a row, started at least squares (the paper: one a layer, format="int4-tensor", started at
2 mean|w| / sqrt(high)). Source: Esser et al. 2020 (arXiv:1902.08153).
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {"format": "int4-channel", "estimator": "clipped", "scale": "learned"}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec("lsq", "k bits with a learned scale", "arXiv:1902.08153", build, OPTIONS)
