"""What the reparametrized shift networks share: several latent numbers a weight, stacked in front of its shape.

    latent (planes, *weight.shape)  ->  level  ->  w_hat = level * scale

The scale does not learn. From a random start it is one number a layer, 1 / sqrt(fan_in E[level^2]): networks with a
BatchNorm behind every layer do not notice it, networks without one need it (E[level^2] reaches 191.5). From trained
weights (init="weights") it is fitted a row by least squares, and the latents begin at the nearest levels.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.estimators._project import code_of, project
from lowbit.formats import Format, Grid, fit
from lowbit.weights._function import WeightFunction, as_matrix, stored

INITS = ("random", "weights")


class Planes(WeightFunction):
    """Base: a method gives `level`, `forward`, `random_latent`, `latent_for` and `mean_square`."""

    scale: Tensor
    planes: int

    def __init__(self, w: Tensor, levels: str, init: str, sigma: "float | None"):
        super().__init__()
        if init not in INITS:
            raise RecipeError(f'init={init!r}: use "random" (train from scratch) or "weights" (go on from these).')
        self.init, self.sigma, self.starts_over = init, sigma, init == "random"
        self.format = Format.parse(f"{levels}-{'channel' if init == 'weights' else 'tensor'}")
        self.register_buffer("scale", self._first_scale(w))

    def right_inverse(self, w: Tensor) -> Tensor:
        """The latents to begin with: random ones, or those of the levels nearest to w."""
        sigma = self.spread(w) if self.sigma is None else self.sigma
        if self.init == "random":
            return self.random_latent(w, sigma)
        rows = as_matrix(w.detach())
        with torch.no_grad():
            x = rows / self.scale.clamp(min=1e-12)
            level = project(x, self.format.levels)
            return self.latent_for(level.reshape(w.shape), sigma).to(w.dtype)

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        codes = code_of(self.level(latent), self.format.levels)
        return as_matrix(codes).to(torch.uint8), Grid(self.scale), self.format

    def shape(self, latent: Tensor) -> tuple[int, ...]:
        return tuple(latent.shape[1:])

    def spread(self, w: Tensor) -> float:
        """Kaiming's standard deviation by fan-out, sqrt(2 / (kh kw out)), as the published code has it."""
        return (2 / (w.shape[0] * prod(w.shape[2:]))) ** 0.5

    def factor(self, latent: Tensor) -> Tensor:
        """The scale, shaped to multiply levels in the weight's shape."""
        return self.scale.reshape(-1, *[1] * (latent.ndim - 2)) if len(self.scale) > 1 else self.scale.reshape(())

    def _first_scale(self, w: Tensor) -> Tensor:
        if self.init == "weights":
            return fit(as_matrix(w.detach()), self.format.with_(scale_rule="lstsq")).scale
        return stored(torch.full((1, 1), (prod(w.shape[1:]) * self.mean_square()) ** -0.5), "fp16").to(w.device)

    # ------------------------------------------------------------ what a method gives

    def level(self, latent: Tensor) -> Tensor:
        """The unscaled value of each weight, one of the format's levels, float32."""
        raise NotImplementedError

    def mean_square(self) -> float:
        """E[level^2] of a random start."""
        raise NotImplementedError

    def random_latent(self, w: Tensor, sigma: float) -> Tensor:
        """(planes, *w.shape), each N(0, sigma^2)."""
        return torch.randn(self.planes, *w.shape, dtype=w.dtype, device=w.device) * sigma

    def latent_for(self, level: Tensor, sigma: float) -> Tensor:
        """Latents whose level is the given one, as far from flipping as a random start."""
        raise NotImplementedError


def run_probabilities(n: int) -> list[float]:
    """Of S = 0 .. n where S counts a run of ones over n fair bits: 2**-(k+1), and 2**-n for the whole run.

    >>> run_probabilities(2)
    [0.5, 0.25, 0.25]
    """
    return [2.0 ** -(k + 1) for k in range(n)] + [2.0**-n]


def shift_bits(bits: Any, method: str) -> int:
    if bits not in (2, 3, 4):
        raise RecipeError(f"{method} with {bits!r} bits: use 2, 3 or 4.")
    return int(bits)
