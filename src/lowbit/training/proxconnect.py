"""ProxConnect++ as an optimizer: any pair of a forward F and a backward B, on a network that is left as it is.

    w = F(u)                        the network's own parameters hold w
    u <- step(u, B(u) * dL/dw)      the base optimizer's step and state (momentum, moments, decay) belong to the latent

    optimizer = lowbit.ProxConnect(torch.optim.SGD(net.parameters(), 0.1), net, "prox", format="ternary", steps=N)
    ...                               train as usual: optimizer.step() also moves the schedule
    optimizer.finish()                the network becomes a prepared one: evaluate it, lowbit.pack it

(F, B) is that of a weight function: "prox" with map "parq" or "relax" (PARQ, BinaryRelax), "binaryconnect", "bnn",
"bnn_pp", or any estimator, {"format": "binary-channel", "estimator": "reste"}. The same functions on a prepared network
(`lowbit.prepare`) compute the same steps; the wrapper leaves module classes, names and the forward pass untouched.

Sources: Dockhorn et al. 2021 (arXiv:2110.13220); Lu et al. 2023 (arXiv:2402.17710).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lowbit.errors import RecipeError
from lowbit.training.attach import _build, _check_tied, _chosen
from lowbit.training.choices import read_choices
from lowbit.weights import WeightFunction

KEY = "proxconnect"


class ProxConnect(Optimizer):
    """Wraps an optimizer whose parameters include the network's weights.

    recipe, skip, keep_ends, **options: as for `lowbit.prepare`; only methods whose latent is the weight and that learn
        nothing else
    steps: optimizer steps of the whole training, for methods with a schedule; or call `move(position)`

    Raises RecipeError for methods with parameters of their own, and for weights the optimizer does not know.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        net: nn.Module,
        recipe: Any = "prox",
        skip: Any = None,
        keep_ends: "bool | None" = None,
        steps: "int | None" = None,
        **options: Any,
    ):
        self.base, self.steps, self.done = optimizer, steps, 0
        choices = read_choices(recipe, skip, keep_ends, **options)
        chosen = list(_chosen(net, choices))
        _check_tied(net, [name for name, _, _ in chosen])
        self.weights = [_Weight(name, layer, _plain_function(name, layer, rule)) for name, layer, rule in chosen]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strangers = [w.name for w in self.weights if id(w.parameter) not in known]
        if not self.weights or strangers:
            raise RecipeError(
                f"the optimizer does not hold these weights: {', '.join(strangers) or '(none was chosen)'}. "
                "Make it from net.parameters(), and wrap it afterwards."
            )
        if steps is None and any(w.function.schedule for w in self.weights):
            raise RecipeError("this method has a schedule: give steps=N, the optimizer steps of the whole training.")
        self._project()

    @torch.no_grad()
    def step(self, closure: "Callable[[], Any] | None" = None) -> Any:  # type: ignore[override]
        """One step of the base optimizer on the latents, then the projection."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for w in self.weights:
            w.to_latent()
        self.base.step()
        for w in self.weights:
            w.latent.copy_(w.parameter)
            w.function.after_step(w.latent)
        self.done += 1
        self.move(self.done / self.steps if self.steps else 1.0)
        return loss

    def move(self, position: float) -> None:
        """Set where the schedules stand, 0 to 1, and the weights that follow from it."""
        for w in self.weights:
            w.function.move(position)
        self._project()

    @contextmanager
    def hard(self) -> Iterator[None]:
        """Inside, the network computes with the levels that would be packed, however soft the map still is."""
        soft = [w.parameter.detach().clone() for w in self.weights]
        with torch.no_grad():
            for w in self.weights:
                w.function.eval()
                w.parameter.copy_(w.function(w.latent))
                w.function.train()
        try:
            yield
        finally:
            with torch.no_grad():
                for w, value in zip(self.weights, soft):
                    w.parameter.copy_(value)

    def finish(self) -> None:
        """Hand the latents and their functions to the network, as `lowbit.prepare` would have: evaluate, pack."""
        for w in self.weights:
            with torch.no_grad():
                w.parameter.copy_(w.latent)
            w.function.train(w.layer.training)
            parametrize.register_parametrization(w.layer, "weight", w.function)
        self.weights = []

    @torch.no_grad()
    def _project(self) -> None:
        for w in self.weights:
            w.parameter.copy_(w.function(w.latent))

    # ------------------------------------------------------------ what schedulers and checkpoints look at

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: "dict[str, Any]") -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> "dict[str, Any]":
        """The base optimizer's, and the latents, functions and count beside it."""
        ours = {w.name: {"latent": w.latent, "function": w.function.state_dict()} for w in self.weights}
        return self.base.state_dict() | {KEY: {"done": self.done, "weights": ours}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: "dict[str, Any]") -> None:
        """Raises RecipeError where the state is of other weights, or of an optimizer that was not wrapped."""
        rest = dict(state_dict)
        ours = rest.pop(KEY, {"weights": {}})
        if set(ours["weights"]) != {w.name for w in self.weights}:
            raise RecipeError(
                "this state is not of ProxConnect on these weights; make the wrapper as it was made then."
            )
        self.base.load_state_dict(rest)
        self.done = ours["done"]
        for w in self.weights:
            w.function.load_state_dict(ours["weights"][w.name]["function"])
            w.latent.copy_(ours["weights"][w.name]["latent"])
        self._project()


class _Weight:
    """One quantized parameter: its layer, its (F, B), and its latent."""

    def __init__(self, name: str, layer: Any, function: WeightFunction):
        self.name, self.layer, self.function = name, layer, function
        self.parameter: nn.Parameter = layer.weight
        self.latent: Tensor = self.parameter.detach().clone()

    def to_latent(self) -> None:
        """The parameter becomes the latent, and its gradient B(u) * dL/dw."""
        if self.parameter.grad is not None:
            with torch.enable_grad():
                u = self.latent.detach().requires_grad_()
                (grad,) = torch.autograd.grad(self.function(u), u, self.parameter.grad)
            self.parameter.grad = grad
        self.parameter.copy_(self.latent)


def _plain_function(name: str, layer: Any, rule: Any) -> WeightFunction:
    functions, on_input = _build(name, layer, rule)
    if on_input is not None:
        raise RecipeError("ProxConnect is about weights; put input functions on with lowbit.prepare.")
    f = functions[-1] if functions else None
    if not isinstance(f, WeightFunction) or len(functions) > 1 or any(True for _ in f.parameters()) or f.starts_over:
        raise RecipeError(
            f"{name}: this method has latents or parameters of its own: use lowbit.prepare for it. ProxConnect takes "
            '"prox", "binaryconnect", "bnn", "bnn_pp", "xnor", ternary rules, or a format with an estimator.'
        )
    return f.train()
