"""What an estimator is: how a gradient passes a rounding. Almost every quantizer of the literature is one function,

    y = scale * P(T(x))              P: nearest level, piecewise constant, derivative zero almost everywhere
    dL/dx = scale' * dL/dy * T'(x)   P is passed straight through, T is differentiated exactly

and an estimator is its T. x is the weight itself ("raw") or the weight in steps of its grid, w / scale ("step").

Source: Lu et al. 2023, ProxConnect++ (arXiv:2402.17710): F = P o T forward, B = T' backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError, near_names
from lowbit.formats import LevelSet

Value = Tensor | float  # the parameter t of T: a number, or a 0-dim tensor where a schedule moves it
Map = Callable[[Tensor, Value], Tensor]


def exact_scale_slope(x: Tensor, level: Tensor, slope: Tensor) -> Tensor:
    """d/ds of s P(T(w/s)), P straight through, x = w/s."""
    return level - x * slope


@dataclass(frozen=True)
class Estimator:
    """One row of the table of estimators.

    transform: T(x, t)
    slope:     T'(x, t), in closed form so that it is quick, and tested against T
    start:     the parameter t (of estimators without one: unused)
    schedule:  position in the training (0 to 1) -> t, or None where t stays
    fits:      "any" level set; "sign": two levels -1 and 1; "unsigned": levels from 0 on
    unit:      what x is where the weight function does not say otherwise, "step" or "raw"
    periodic:  T changes signs, so the forward pass is P(T(x)), not P(x)
    ranged:    T is a clip whose ends are those of the levels: `over` sets them
    scale_slope: (x, level, T'(x)) -> dy/dscale of a learned scale, x in steps; exactly level - x T'(x)
    """

    name: str
    title: str
    source: str
    transform: Map
    slope: Map
    start: float = 1.0
    schedule: "Callable[[float], float] | None" = None
    fits: str = "any"
    unit: str = "step"
    periodic: bool = False
    ranged: bool = False
    scale_slope: Callable[[Tensor, Tensor, Tensor], Tensor] = exact_scale_slope
    make: "Callable[..., Estimator] | None" = None
    kind: str = "estimator"

    def over(self, levels: LevelSet) -> "Estimator":
        """This estimator for a level set. Raises RecipeError where it does not fit."""
        self.check(levels)
        if self.ranged and self.make is not None and levels.values:
            return self.make(low=levels.values[0], high=levels.values[-1])
        return self

    def check(self, levels: LevelSet) -> None:
        """Raise RecipeError where the levels are not those that T was made for."""
        if self.fits == "sign" and levels.values != (-1.0, 1.0):
            raise RecipeError(
                f"estimator {self.name!r} is made for the two levels -1 and 1 and does not fit {levels.name}. "
                'Use a binary format, or estimator "identity" or "clipped".'
            )
        if self.fits == "unsigned" and (not levels.values or levels.values[0] != 0):
            raise RecipeError(
                f"estimator {self.name!r} is made for activations without a negative level and does not fit "
                f'{levels.name}. Use "elastic_signed" or "clipped".'
            )

    def with_options(self, **options: Any) -> "Estimator":
        """The estimator with other parameters, e.g. `power=5` of ReSTE. Raises RecipeError for an unknown one."""
        if not options:
            return self
        known = [] if self.make is None else [k for k in signature(self.make).parameters if k not in ("low", "high")]
        for name in options:
            if name not in known:
                raise RecipeError(f"estimator {self.name!r} has no {name!r}. {near_names(name, known or ['(none)'])}")
        assert self.make is not None
        return self.make(**options)


class _Through(torch.autograd.Function):
    """Returns `projected` itself, so that no rounding error creeps between the levels; the gradient is grad * slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projected: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if slope is None else (slope,)))
        return projected.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        slopes = ctx.saved_tensors
        return (grads[0] * slopes[0] if slopes else grads[0]), None, None


def through(x: Tensor, projected: Tensor, slope: Tensor | None = None) -> Tensor:
    """`projected` in the forward pass, grad * slope to `x` in the backward pass (slope None: 1).

    x, projected, slope: one shape. The values are exactly `projected`: `x + (projected - x)` would be off by an ulp
    here and there.

    >>> x = torch.tensor([0.3, -2.0], requires_grad=True)
    >>> y = through(x, torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]))
    >>> y.sum().backward(); y.tolist(), x.grad.tolist()
    ([1.0, -1.0], [1.0, 0.0])
    """
    return _Through.apply(x, projected, slope)


class _Scaled(torch.autograd.Function):
    """level * scale; gradients to x by `slope` and to the scale by `scale_slope`, summed over what shares it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, level: Tensor, slope: Tensor | None, scale_slope: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(level if scale_slope is None else scale_slope, scale, slope)
        return (level * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale_slope, scale, slope = ctx.saved_tensors
        grad = grads[0]
        to_scale = (grad * scale_slope).sum_to_size(scale.shape).to(scale.dtype)
        return (grad if slope is None else grad * slope), to_scale, None, None, None


def scaled(
    x: Tensor, scale: Tensor, level: Tensor, slope: "Tensor | None" = None, scale_slope: "Tensor | None" = None
) -> Tensor:
    """level * scale, differentiated by closed forms: grad * slope to `x` (None: 1), grad * scale_slope to `scale`.

    x, level, slope, scale_slope (..., n); scale broadcasts against them. scale_slope None: the level itself.
    The levels are multiplied by the scale outside the straight-through step, so that as many values come out as levels
    went in.
    """
    # one tensor must not come in twice: torch.compile would break the graph
    return _Scaled.apply(x, scale, level, slope, None if scale_slope is level else scale_slope)
