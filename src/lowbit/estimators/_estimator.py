"""What an estimator is: how a gradient passes a rounding.

    forward   y = P(T(x))          P: nearest level, piecewise constant, derivative zero almost everywhere
    backward  dL/dx = dL/dy * T'(x)      P is passed straight through, T is differentiated exactly

Source: Lu et al. 2023, ProxConnect++ (arXiv:2402.17710), which shows that the estimators in use are such pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimator:
    """One row of the table of estimators. x is measured in steps of the grid: the weight divided by its block's scale.

    transform: T, sign-preserving; slope: T', given in closed form so that it can be tested against T
    """

    name: str
    title: str
    source: str
    transform: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    kind: str = "estimator"


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
