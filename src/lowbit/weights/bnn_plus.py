"""BNN+: binary weights with trained scales, SwishSign backward, and a regularizer that pulls |w| to the scale.

    w_hat = alpha sign(w)           dL/dw = alpha dL/dw_hat SS_beta'(w)     alpha learned, a filter, from mean|w| on
    lowbit.penalty adds  strength * sum R(w, alpha)                       R: r1, r2 or foothill

Too large a strength freezes signs early: watch the flip rate. The subgradient of |w| at 0 takes sign(0) = 0.
Source: Darabi et al. 2018 (arXiv:1812.11800); the strength is in the range its readers use.
"""

from typing import Any

from torch import Tensor

from lowbit.errors import RecipeError, near_names
from lowbit.weights._function import WeightSpec, as_matrix
from lowbit.weights._regularizers import REGULARIZERS
from lowbit.weights.quantize import Quantize


class Regularized(Quantize):
    """Quantize with a regularizer towards its own scale, learned or fitted (then a constant)."""

    def __init__(self, *args: Any, regularizer: str = "r1", strength: float = 1e-6, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if regularizer not in REGULARIZERS:
            raise RecipeError(f"unknown regularizer {regularizer!r}. {near_names(regularizer, list(REGULARIZERS))}")
        self.regularizer, self.strength = regularizer, strength

    def penalty(self, latent: Tensor) -> Tensor:
        blocks = self.format.blocks.split(as_matrix(latent))
        alpha = self._grid(blocks.detach()).scale if self.scale is None else self.scale
        return REGULARIZERS[self.regularizer](blocks, alpha) * self.strength


def build(w: Tensor, **options: Any) -> Regularized:
    fmt = options.pop("format", "binary-channel")
    return Regularized(fmt, **{"estimator": "swishsign", "scale": "learned", "unit": "raw"} | options, w=w)


OPTIONS = {
    "format": "binary-channel", "estimator": "swishsign", "scale": "learned", "unit": "raw",
    "regularizer": "r1", "strength": 1e-6,
}  # fmt: skip
SPEC = WeightSpec("bnn_plus", "trained scales, SwishSign, R1 or R2", "arXiv:1812.11800", build, OPTIONS)
