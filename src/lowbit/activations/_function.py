"""Input functions: what rounds a layer's input. They sit on the layer as `input_function` and run before it.

    x -> x_hat = scale * P(T(x))       elementwise, in every forward pass, training and evaluation alike

`attach` adds the module and a hook that calls it; the layer's own class, names and code stay as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError, near_names
from lowbit.estimators import Scheduled

NAME = "input_function"


class OneBit(NamedTuple):
    """What a packed layer of bits is told: x_hat = gain where x >= threshold, else -gain ("sign") or 0 ("unit")."""

    inputs: str
    threshold: "Tensor | float"  # (channels,), or one for all
    gain: float = 1.0


class InputFunction(Scheduled):
    """Base of the input functions: forward(x) -> x_hat of the same shape and dtype.

    axis: where the channels are: 1 of a convolution's input, -1 of a linear layer's
    """

    axis: int = -1

    def one_bit(self) -> "OneBit | None":
        """This function as a comparison, if it is one: the same levels for every x, ties included."""
        return None

    def int_grid(self) -> "tuple[float, int, int] | None":
        """(scale, low, high) where x_hat = scale * clip(round_to_even(x / scale), low, high), one scale for all."""
        return None

    def per_channel(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter (channels,) or () shaped to broadcast against x."""
        if parameter.ndim == 0:
            return parameter
        shape = [1] * x.ndim
        shape[self.axis if self.axis < 0 or x.ndim != 3 else 0] = -1  # a convolution takes (C, H, W) as well
        return parameter.reshape(shape)


def attach(layer: nn.Module, function: InputFunction) -> None:
    """Round the layer's input by `function` from now on."""
    layer.add_module(NAME, function)
    layer.register_forward_pre_hook(_round_input)


def attached(layer: nn.Module) -> "InputFunction | None":
    """The layer's input function, if it has one."""
    found = layer._modules.get(NAME)
    return found if isinstance(found, InputFunction) else None


def _round_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_function(args[0]), *args[1:])


def broadcast_from_first(*parameters: Tensor) -> None:
    """Where several processes train together: what one batch has set becomes that of process 0 everywhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for p in parameters:
            torch.distributed.broadcast(p.data, 0)


@dataclass(frozen=True)
class InputSpec:
    """One row of the table of input functions.

    build:   (channels, axis, **options) -> InputFunction
    options: their defaults
    """

    name: str
    title: str
    source: str
    build: Callable[..., InputFunction]
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "activation"

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise RecipeError for an option that the method does not have."""
        for name in options:
            if name not in self.options:
                known = list(self.options) or ["(none)"]
                raise RecipeError(f"activations {self.name!r} have no option {name!r}. {near_names(name, known)}")
