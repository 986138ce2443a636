"""Diagnostics of a prepared network in training: what moves, what is stuck, what explodes.

    watch = lowbit.diagnose.Recorder(net)
    with watch:                                forward and backward of one batch, before the optimizer's step
        loss_of(net(x), y).backward()
    row = watch.record(epoch)                  a dict of plain numbers; all of them are in watch.rows
    for line in lowbit.diagnose.warnings(row): print(line)

For every prepared layer, in the order of the forward pass:

    flip_rate         share of the weights whose code has changed since the last record (None in the first)
    zero_fraction     share of the rounded weights that are 0
    distance          mean |w - w_hat| / mean |w_hat|: how far the latent weights are from their levels
    estimator_error   root mean square of T(x) - P(T(x)), x in steps: how far the estimator is from what it stands for
                      (ReSTE's estimating error; None for methods that are no rounding of the weight)
    gradient          mean squared gradient of the layer's output
    dead              share of input channels that have one value throughout the batch: they carry nothing

`growth` is the factor by which the gradient's second moment grows from a layer to the one before it, the geometric
mean over the network. With K inputs, weights and inputs of -1 and 1, the clipped estimator and no normalization it is
sqrt(2 K / pi) for even K and twice that for odd K; with batch normalization 0.683.

Sources: Sari et al. 2019 (arXiv:1909.09139), Sari and Partovi Nia 2020 (arXiv:2004.14214), Wu et al. 2023 (2308.06689).
The formulas are derived and simulated, not taken from the papers' theorems; a test checks them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.training import input_functions, latent_of, weight_functions

LAYER_FIELDS = ("flip_rate", "zero_fraction", "distance", "estimator_error", "gradient", "dead")
GROWTH = (0.3, 2.0)  # outside of it, `warnings` speaks
DEAD = 0.5


class Recorder:
    """Watches the prepared layers of `net` in `with` blocks. It changes nothing in the network or its training."""

    def __init__(self, net: nn.Module):
        self.net = net
        self.rows: list[dict[str, Any]] = []
        self._codes: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._dead: dict[str, Tensor] = {}
        self._order: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        self._order, self._moments, self._dead = [], {}, {}
        names = {name: layer for name, layer, _ in (*weight_functions(self.net), *input_functions(self.net))}
        for name, layer in names.items():
            self._hooks.append(layer.register_forward_hook(self._watch(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, name: str) -> Any:
        def seen(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:  # args: after the input function
            if name not in self._order:  # of a layer called several times the first call counts
                self._order.append(name)
                self._dead[name] = constant_channels(args[0], isinstance(layer, nn.Conv2d))
                if out.requires_grad:
                    out.register_hook(lambda g: self._moments.__setitem__(name, g.detach().float().square().mean()))

        return seen

    @torch.no_grad()
    def record(self, at: float) -> dict[str, Any]:
        """Numbers of the batch that was watched last and of the weights as they are. at: where, e.g. the epoch."""
        layers: dict[str, dict[str, Any]] = {name: dict.fromkeys(LAYER_FIELDS) for name in self._order}
        for name, layer, function in weight_functions(self.net):
            row = layers.setdefault(name, dict.fromkeys(LAYER_FIELDS))
            row |= self._of_weight(name, layer, function)
        for name, row in layers.items():
            row["gradient"] = _number(self._moments.get(name))
            row["dead"] = _number(self._dead.get(name))
        found = {"at": at, "layers": layers, "growth": growth([layers[n]["gradient"] for n in self._order])}
        self.rows.append(found)
        return found

    def _of_weight(self, name: str, layer: nn.Module, function: Any) -> dict[str, "float | None"]:
        latent = latent_of(layer)
        codes, before = function.codes(latent), self._codes.get(name)
        self._codes[name] = codes
        w_hat = function.quantized(latent).dequantize().float()
        same = latent.shape == w_hat.shape
        x, t_of_x = function.in_steps(latent) if hasattr(function, "in_steps") else (None, None)
        return {
            "flip_rate": None if before is None else _number((codes != before).float().mean()),
            "zero_fraction": _number((w_hat == 0).float().mean()),
            "distance": distance(latent.float(), w_hat.to(latent.device)) if same else None,
            "estimator_error": None
            if x is None or t_of_x is None
            else estimator_error(x, t_of_x, function.format.levels.values),
        }


def distance(w: Tensor, w_hat: Tensor) -> float:
    """mean |w - w_hat| / mean |w_hat|; 0 where all is 0."""
    size = float(w_hat.abs().mean())
    gap = float((w - w_hat).abs().mean())
    return gap / size if size > 0 else gap


def estimator_error(x: Tensor, t_of_x: Tensor, levels: "tuple[float, ...] | None") -> "float | None":
    """Root mean square of T(x) - P(T(x)), P the nearest level; None where levels are a table of the tensor's own."""
    if not levels:
        return None
    table = torch.tensor(levels, dtype=torch.float32, device=x.device)
    middle = (table[1:] + table[:-1]) / 2
    nearest = table[torch.bucketize(t_of_x.float().contiguous(), middle, right=True)]
    return _number((t_of_x - nearest).square().mean().sqrt())


def constant_channels(x: Tensor, convolution: bool) -> Tensor:
    """Share of the channels of a layer's input that have one value throughout. x (n, c, ...) or (..., features)."""
    axis = (1 if x.ndim == 4 else 0) if convolution else -1
    rows = x.detach().movedim(axis, 0).flatten(1)
    return (rows == rows[:, :1]).all(1).float().mean()


def growth(moments: "list[float | None]") -> "float | None":
    """exp(mean(log(moment of a layer / moment of the next))): moments in the order of the forward pass.

    None for fewer than two layers with a gradient.
    """
    known = [m for m in moments if m is not None and m > 0]
    return None if len(known) < 2 else math.exp((math.log(known[0]) - math.log(known[-1])) / (len(known) - 1))


def warnings(row: dict[str, Any]) -> list[str]:
    """What a person should look at in one record, with what to do about it."""
    lines = []
    g = row["growth"]
    if g is not None and g > GROWTH[1]:
        lines.append(f"gradients grow {g:.1f} times a layer towards the input: put a normalization after each layer.")
    if g is not None and g < GROWTH[0]:
        lines.append(f"gradients shrink to {g:.2f} a layer towards the input: add skips, or a wider estimator.")
    dead = [n for n, r in row["layers"].items() if (r["dead"] or 0) > DEAD]
    if dead:
        lines.append(
            f"more than half of the inputs of {', '.join(dead)} never change: centre them (BatchNorm, a shift)."
        )
    stuck = [n for n, r in row["layers"].items() if r["zero_fraction"] == 1]
    if stuck:
        lines.append(f"all weights of {', '.join(stuck)} are 0: nothing passes. Lower the threshold or the decay.")
    return lines


def _number(value: "Tensor | None") -> "float | None":
    return None if value is None else float(value)
