"""BiPer weights: the sign of a sine, with a learned scale a filter.

    first stage   w_hat = alpha sin(omega w)            stage=1, while training
    second stage  w_hat = alpha sign(sin(omega w))      stage=2, and always in evaluation
    dL/dw = alpha dL/dw_hat omega cos(omega w)                lowbit.penalty adds  tau * mean(sin^2(omega w))

The file holds the bits of sign(sin(omega w)). The penalty, as the published code has it, pulls the sine to 0, where the
gradient is largest; a negative tau pulls it to +-1. alpha is learned; here it starts at mean|w| instead of at random.
Source: Vargas et al. 2024 (arXiv:2404.01278).
"""

from typing import Any

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.estimators import estimator as find_estimator
from lowbit.weights._function import WeightSpec
from lowbit.weights.quantize import Quantize


class BiPer(Quantize):
    """stage: 1 (soft while training) or 2; omega: radians per unit of weight; tau: strength of the penalty."""

    def __init__(self, w: Tensor, format: Any, omega: float, stage: int, tau: float):
        if stage not in (1, 2):
            raise RecipeError(f"stage={stage!r}: BiPer has stage 1 (sine) and stage 2 (its sign).")
        soft = "soft" if stage == 1 else "hard"
        super().__init__(format, find_estimator("biper", omega=omega), scale="learned", forward=soft, w=w)
        self.tau = tau

    def penalty(self, latent: Tensor) -> "Tensor | None":
        return (latent * self.t).sin().square().mean() * self.tau if self.tau else None


def build(w: Tensor, **options: Any) -> BiPer:
    return BiPer(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"format": "binary-channel", "omega": 20.0, "stage": 2, "tau": 0.0}
SPEC = WeightSpec("biper", "sign of a sine", "arXiv:2404.01278", build, OPTIONS)
