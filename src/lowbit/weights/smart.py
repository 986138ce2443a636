"""Smart Quantization: each layer learns whether it is binary or ternary.

    w_hat = mu sign(w) where |w| > cut, else 0            cut = mu / (1 + tau**(-1/p))
    lowbit.penalty adds  strength / n * sum min(| |w| - mu |**p, |w|**p / tau) / mean|w|**p  +  depth * tau
    dL/dw = dL/dw_hat,  dL/dmu = sum dL/dw_hat level / sqrt(n) (and the penalty's),  tau from the penalty alone

tau = cot(beta) in (0, 1]: at 1 three equal wells (ternary, cut mu/2), towards 0 the well at zero disappears (binary). A
larger `depth` pushes layers towards binary. A layer is packed as binary only if no weight is zero: summary says which.
Both branches of the penalty meet at the cut. Dividing by mean|w|**p and sqrt(n), so that
one strength and one learning rate fit every layer, is ours; mu stays above mean|w| / 10.

Source: Razani et al. 2019 (arXiv:1909.12205); the cut follows from the penalty.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError
from lowbit.estimators import scaled, through
from lowbit.formats import Format, Grid
from lowbit.weights._function import TINY, WeightFunction, WeightSpec, as_matrix, stored

SMALLEST_TAU = 1e-7


class Smart(WeightFunction):
    """strength: of the wells; depth: of the pull to binary; p: 1 or 2."""

    def __init__(self, w: Tensor, strength: float, depth: float, p: int):
        super().__init__()
        if p not in (1, 2):
            raise RecipeError(f"p={p!r}: the wells are of power 1 or 2.")
        self.strength, self.depth, self.p = strength, depth, p
        self.format = Format.parse("ternary-tensor")
        self.mu = nn.Parameter(w.detach().float().abs().mean().clamp(min=TINY).reshape(1))
        self.tau = nn.Parameter(torch.ones(1, device=w.device))

    def forward(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            level, scale = self._level(latent.detach())
        return scaled(latent, through(self.mu, scale), level, None, level / latent.numel() ** 0.5)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        level, scale = self._level(latent)
        matrix, grid = as_matrix(level), Grid(scale.reshape(1, 1))
        if bool((matrix != 0).all()):
            return (matrix > 0).to(torch.uint8), grid, Format.parse("binary-tensor")
        return (matrix + 1).to(torch.uint8), grid, self.format

    def penalty(self, latent: Tensor) -> Tensor:
        tau, size = self._tau(), latent.float().abs()
        wells = torch.minimum((size - self.mu).abs() ** self.p, size**self.p / tau)
        unit = (size.detach().mean() ** self.p).clamp(min=TINY)
        return wells.mean() / unit * self.strength + tau.sum() * self.depth

    def cut(self) -> Tensor:
        """Below it a weight is zero."""
        return self.mu.detach() / (1 + self._tau().detach() ** (-1 / self.p))

    @torch.no_grad()
    def after_step(self, latent: Tensor) -> None:
        self.tau.clamp_(SMALLEST_TAU, 1)
        self.mu.clamp_(min=(latent.float().abs().mean() / 10).clamp(min=TINY))

    def _tau(self) -> Tensor:
        return self.tau.clamp(SMALLEST_TAU, 1)

    def _level(self, w: Tensor) -> tuple[Tensor, Tensor]:
        kept = (w.float().abs() > self.cut()) | (self._tau() <= SMALLEST_TAU)
        signs = torch.where(w >= 0, 1.0, -1.0)
        return signs * kept, stored(self.mu.detach().float(), self.format.scale_dtype)


def build(w: Tensor, **options: Any) -> Smart:
    return Smart(w, **OPTIONS | options)


OPTIONS: dict[str, Any] = {"strength": 1e-2, "depth": 1e-3, "p": 1}
SPEC = WeightSpec("smart", "binary or ternary, learned a layer", "arXiv:1909.12205", build, OPTIONS)
