"""Foothill as a regularizer: binary weights by any estimator, pulled to +-mean|w| by x tanh x.

    w_hat = mean|w| sign(w)          lowbit.penalty adds  strength * sum p(|w| - mean|w|),  p(x) = x tanh(25 x)

Source: Belbahri et al. 2019 (arXiv:1901.06414). As an estimator: estimator="foothill" of any binary format.
"""

from typing import Any

from torch import Tensor

from lowbit.weights._function import WeightSpec
from lowbit.weights.bnn_plus import Regularized


def build(w: Tensor, **options: Any) -> Regularized:
    fmt = options.pop("format", "binary-channel")
    return Regularized(fmt, **{"regularizer": "foothill"} | options, w=w)


OPTIONS = {"format": "binary-channel", "estimator": "identity", "scale": "fit", "strength": 1e-6}
SPEC = WeightSpec("foothill", "binary, with Foothill as regularizer", "arXiv:1901.06414", build, OPTIONS)
