"""What a sensitivity looks at: weights, their rounded versions, and the network's loss and outputs on a small batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.allocate._problem import Array, Choice

Rounded = Callable[[str, str], "Tensor | None"]


@dataclass
class Probe:
    """A network under test.

    weights: item -> its parameter, at its float value
    menu:    the options' labels
    rounded: (item, label) -> w_hat of the weight's shape, or None where the item has no such option
    loss:    scalar mean loss on a fixed batch with the weights as they are; differentiable, eval mode
    outputs: logits (n, classes) on that batch, for divergences; None where only a loss is known
    """

    weights: Mapping[str, nn.Parameter]
    menu: tuple[str, ...]
    rounded: Rounded
    loss: Callable[[], Tensor]
    outputs: "Callable[[], Tensor] | None" = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def table(self, score: Callable[[str, str, Tensor], float]) -> Array:
        """(items, options) of score(item, label, w_hat); inf where an item has no such option."""
        rows = np.full((len(self.weights), len(self.menu)), np.inf)
        for i, name in enumerate(self.weights):
            for o, label in enumerate(self.menu):
                w_hat = self.rounded(name, label)
                if w_hat is not None:
                    rows[i, o] = score(name, label, w_hat)
        return rows

    @contextmanager
    def placed(self, chosen: "Mapping[str, Tensor]") -> Iterator[None]:
        """Other weights for a while."""
        before = {name: self.weights[name].detach().clone() for name in chosen}
        try:
            with torch.no_grad():
                for name, w_hat in chosen.items():
                    self.weights[name].copy_(w_hat)
            yield
        finally:
            with torch.no_grad():
                for name, w in before.items():
                    self.weights[name].copy_(w)

    def chosen(self, choice: Choice) -> dict[str, Tensor]:
        """The rounded weights of an allocation."""
        found = {n: self.rounded(n, self.menu[o]) for n, o in zip(self.weights, choice)}
        return {n: w for n, w in found.items() if w is not None}

    def measure(self, choice: Choice) -> float:
        """The loss with every item at its option: what allocators take as `measure`."""
        with self.placed(self.chosen(choice)), torch.no_grad():
            return float(self.loss())

    def gradients(self, create_graph: bool = False) -> dict[str, Tensor]:
        """d loss / d weight of every item; zeros where the loss does not depend on one."""
        with twice_differentiable():
            found = torch.autograd.grad(
                self.loss(), list(self.weights.values()), create_graph=create_graph, allow_unused=True
            )
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(self.weights.items(), found)}

    def hessian_times(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Hessian of the loss times v, over the items v names: grad(<grad loss, v>). One double backward pass."""
        params = [self.weights[n] for n in v]
        with twice_differentiable():
            grads = torch.autograd.grad(self.loss(), params, create_graph=True, allow_unused=True)
            dot: Any = sum((g * v[n]).sum() for n, g in zip(v, grads) if g is not None)
            if not isinstance(dot, Tensor) or not dot.requires_grad:
                return {n: torch.zeros_like(p) for n, p in zip(v, params)}
            found = torch.autograd.grad(dot, params, allow_unused=True)
        return {n: torch.zeros_like(p) if h is None else h for n, p, h in zip(v, params, found)}


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain products: the fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
