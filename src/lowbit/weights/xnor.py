"""XNOR-Net weights: the sign times the mean magnitude of the filter.

    w_hat = mean|w| sign(w)          dL/dw = dL/dw_hat 1[|w| <= 1]

mean|w| is the least-squares scale. It is a constant in the backward pass, as nearly all code has it; scale="attached"
is the full gradient. Also the weights of Bi-Real Net (arXiv:1808.00278) and ReActNet (arXiv:2003.03488). Source:
Rastegari et al. 2016 (arXiv:1603.05279); its activation scale K is left out.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize

OPTIONS: dict[str, Any] = {"format": "binary-channel", "estimator": "clipped", "scale": "fit", "unit": "window"}


def build(w: Tensor, **options: Any) -> Quantize:
    given = OPTIONS | options
    return Quantize(given.pop("format"), **given, w=w)


SPEC = WeightSpec("xnor", "signs times the mean of a filter", "arXiv:1603.05279", build, OPTIONS)
