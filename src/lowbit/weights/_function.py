"""What every weight function is, and the row it adds to the table of methods.

    latent -> w_hat                in every forward pass: what the layer computes with
    latent -> codes and grid       the same weight as a file holds it: packing changes no value

The latent is the trained parameter, `module.parametrizations.weight.original`: the float weight itself, or what the
function made of it when it was attached (`right_inverse`), e.g. several numbers a weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError, near_names
from lowbit.estimators import Scheduled
from lowbit.formats import Format, Grid, QuantizedTensor, decode
from lowbit.formats.stores import round_scale
from lowbit.formats.tensor import matrix_shape

TINY = torch.finfo(torch.float32).tiny


class WeightFunction(Scheduled):
    """Base of the parametrizations. A method gives `forward`, `encoded`, and whatever else it needs of the rest.

    format: what it packs into
    """

    format: Format
    starts_over = False  # attaching it forgets the weight it is put on

    def forward(self, latent: Tensor) -> Tensor:
        """w_hat in the shape and dtype of the weight. In training mode a soft forward pass is allowed."""
        raise NotImplementedError

    def encoded(self, latent: Tensor) -> tuple[Tensor, Grid, Format]:
        """Codes (out, in) uint8, the grid of their blocks, the format: of the very w_hat of evaluation mode."""
        raise NotImplementedError

    def penalty(self, latent: Tensor) -> "Tensor | None":
        """What the method adds to the loss, a scalar; None where it adds nothing."""
        return None

    def after_step(self, latent: Tensor) -> None:
        """In place, after an optimizer step: keep the latent in its range, fit a grid again."""

    def shape(self, latent: Tensor) -> tuple[int, ...]:
        """The weight's shape; the latent may hold several numbers a weight."""
        return tuple(latent.shape)

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        """uint8 in the weight's shape: what flip rates and level counts are made from."""
        return self.encoded(latent)[0].reshape(self.shape(latent))

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> QuantizedTensor:
        """`quantized(latent).dequantize()` equals `forward(latent)` in evaluation mode, bit for bit."""
        codes, grid, fmt = self.encoded(latent.detach())
        return QuantizedTensor.from_codes(codes, grid, fmt, self.shape(latent))


def as_matrix(w: Tensor) -> Tensor:
    """(out, everything else) float32."""
    return w.float().reshape(matrix_shape(tuple(w.shape)))


def decoded(codes: Tensor, grid: Grid, fmt: Format, like: Tensor) -> Tensor:
    """w_hat in the shape and dtype of `like`."""
    out, in_ = codes.shape
    w_hat = fmt.blocks.merge(decode(fmt.blocks.split(codes), grid, fmt), out, in_)
    return w_hat.reshape(like.shape).to(like.dtype)


def stored(scale: Tensor, dtype: str) -> Tensor:
    """The value that a file keeps of each scale; too large ones become the largest instead of an error in training."""
    if dtype in ("fp16", "bf16"):
        scale = scale.clamp(max=torch.finfo(torch.float16 if dtype == "fp16" else torch.bfloat16).max)
    return round_scale(scale, dtype)


@dataclass(frozen=True)
class WeightSpec:
    """One row of the table of weight functions.

    build:   (w, **options) -> WeightFunction, or a sequence of parametrizations that ends with one; w is the weight it
             will be put on
    options: their defaults
    """

    name: str
    title: str
    source: str
    build: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "weight"

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise RecipeError for an option that the method does not have."""
        for name in options:
            if name not in self.options:
                known = list(self.options) or ["(none)"]
                raise RecipeError(f"weights {self.name!r} have no option {name!r}. {near_names(name, known)}")
