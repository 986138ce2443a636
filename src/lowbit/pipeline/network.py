"""Any network, layer by layer, with calibration inputs: linear layers and 2-d convolutions, as they are called.

    inputs     of a layer: as the network with all earlier layers rounded makes them, and as the float one does (drift);
               those of a convolution are its patches, channels * kh * kw numbers for each place of the output
    bias       takes up the mean shift of the layer's outputs:  b += mean(W x_float) - mean(Q x)
    batch norm its running statistics move by what rounding has changed in mean and variance of its inputs

A layer may be called many times in a pass (recurrent networks): all its inputs count. Convolutions in groups, and
those that do not pad with zeros, are rounded without inputs.
Memory: one batch's patches (at most PATCHES places of it) and a Gram matrix. Cost: two passes over the inputs a layer.
Source: bias correction after Nagel 2019 (arXiv:1906.04721), measured here on the inputs.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import DataError, ModelError, RecipeError, ShapeError
from lowbit.formats import Format
from lowbit.pipeline.blocks import Stop, layer_type
from lowbit.recipe import Recipe
from lowbit.solvers import Solution, find
from lowbit.statistics import GramAccumulator, LayerStatistics

PATCHES = 1 << 15  # of a batch, at most, evenly over it
BATCH = 64
MOST = 16.0  # no variance grows or shrinks by more
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Batches = list[Tensor]
Progress = Callable[[dict[str, Any]], None]


@torch.no_grad()
def solve_network(
    net: nn.Module, names: Iterable[str], plan: Recipe, batches: Batches, progress: "Progress | None" = None
) -> dict[str, Solution]:
    """Solutions of the named layers; the rounded weights, biases and batch norms are in `net` afterwards.

    batches: inputs as the network takes them, a batch each. Raises RecipeError, DataError, ShapeError, ModelError.
    """
    spec = plan.solver
    if spec.smooth is not None or spec.tune is not None or plan.gram != "inputs":
        raise RecipeError(f"{plan.method} with gram={plan.gram} walks transformers' blocks; use gptq or icquant here.")
    floats, solutions = copy.deepcopy(net).eval(), {}
    wanted = set(names)
    calls = {n: c for n, c in _first_pass(net.eval(), batches[0]).items() if n in wanted}
    for i, (name, times) in enumerate(calls.items()):
        layer, fmt = net.get_submodule(name), plan.format_for(name)
        if fmt is None:
            continue
        statistics, means = None, None
        if can_unfold(layer):
            statistics, means = gather(net, floats, name, batches, times)
        solutions[name] = _solved(name, layer, fmt, plan, statistics)
        if means is not None:
            correct_bias(layer, floats.get_submodule(name), *means)
        if progress is not None:
            progress({"event": "layer", "name": name, "layer": i, "layers": len(calls)})
    reestimate(net, floats, batches)
    return solutions


def _solved(name: str, layer: nn.Module, fmt: Format, plan: Recipe, statistics: "LayerStatistics | None") -> Solution:
    """Round one layer and put the weight in place."""
    weight: Any = layer.weight
    w = weight.detach().reshape(weight.shape[0], -1).float()
    spec, options = plan.solver_for(name)
    if statistics is None and spec.needs_data:
        spec, options = find("rtn"), {}
    try:
        solution = spec.solve(w, statistics, fmt, **options)
    except ShapeError as e:
        raise ShapeError(f"{name}: {e}") from None
    weight.copy_(solution.w_hat().reshape(weight.shape))
    return solution


# -- inputs


def _first_pass(net: nn.Module, batch: Tensor) -> dict[str, int]:
    """`call_counts`. Raises DataError where the network cannot read the batch."""
    try:
        return call_counts(net, batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        given = f"{tuple(batch.shape)} of {str(batch.dtype).removeprefix('torch.')}"
        raise DataError(
            f"the network cannot read the data, {given} ({str(e).splitlines()[0]}); give inputs as you call it with."
        ) from e


def call_counts(net: nn.Module, batch: Tensor) -> dict[str, int]:
    """Linear and convolutional layers in the order of their first call, and how often a pass calls them."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable:
        return lambda module, x: counts.__setitem__(name, counts.get(name, 0) + 1)

    layers = [(n, m) for n, m in net.named_modules() if layer_type(m) in ("linear", "conv2d")]
    with _hooked((m, count(n)) for n, m in layers):
        net(batch)
    return counts


def can_unfold(layer: Any) -> bool:
    """Whether the layer is a product with its inputs, or their patches."""
    return not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")


def patches(layer: Any, x: Tensor) -> Tensor:
    """(places, in): what each output of the layer is a product with."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer.padding, str):
        total = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


def gather(
    net: nn.Module, floats: nn.Module, name: str, batches: Batches, times: int
) -> tuple[LayerStatistics, tuple[Tensor, Tensor]]:
    """Statistics of a layer's inputs with their drift from the float network's, and the means of both (in,)."""
    total: GramAccumulator | None = None
    sums = torch.zeros(2, 0)
    for batch in batches:
        own, other = (_inputs(m, name, batch, times) for m in (net, floats))
        if total is None:
            total, sums = GramAccumulator(own.shape[1]), torch.zeros(2, own.shape[1], dtype=torch.float64)
        total.add(own, other)
        sums += torch.stack([own.sum(0, dtype=torch.float64), other.sum(0, dtype=torch.float64)])
    if total is None:
        raise DataError("no calibration inputs: give data=inputs, a tensor whose first dimension counts them.")
    mean = (sums / total.tokens).float()
    return total.finish(), (mean[0], mean[1])


def _inputs(net: nn.Module, name: str, batch: Tensor, times: int) -> Tensor:
    """(places, in) of one batch; the pass ends after the layer's last call."""
    layer, seen = net.get_submodule(name), []

    def keep(module: nn.Module, x: tuple) -> None:
        found = patches(module, x[0].detach().float())
        seen.append(found[:: -(-len(found) * times // PATCHES)])
        if len(seen) == times:
            raise Stop

    with _hooked([(layer, keep)]):
        try:
            net(batch)
        except Stop:
            pass
    if len(seen) != times:
        raise ModelError(f"{name} is called {len(seen)} times for one input and {times} times for another.")
    return torch.cat(seen)


@contextmanager
def _hooked(pairs: "Iterable[tuple[nn.Module, Callable]]") -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) for m, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- afterwards


def correct_bias(layer: Any, reference: Any, mean: Tensor, mean_float: Tensor) -> None:
    """Shift the bias so that the layer's mean output is the float one's. A layer without a bias stays as it is."""
    if layer.bias is None:
        return
    flat = [m.weight.detach().reshape(m.weight.shape[0], -1).float() for m in (reference, layer)]
    layer.bias += (flat[0] @ mean_float - flat[1] @ mean).to(layer.bias.dtype)


def reestimate(net: nn.Module, floats: nn.Module, batches: Batches) -> int:
    """Move the batch norms' running statistics by what rounding has changed; returns how many norms there are.

        mean += mean_q - mean_float        var *= var_q / var_float        both counted on the same inputs

    A network that was not changed keeps its statistics, however few the inputs (counting them anew on 256 images costs
    ResNet-20 3 points of accuracy before anything is rounded). Derived. Norms without running statistics stay as they
    are; so does the network's mode.
    """
    counted, reference = (_counted(copy.deepcopy(m), batches) for m in (net, floats))
    norms = dict(_norms(net))
    for name, norm in norms.items():
        new, old = counted[name], reference[name]
        norm.running_mean += new.running_mean - old.running_mean
        norm.running_var *= (new.running_var / old.running_var.clamp(min=1e-12)).clamp(1 / MOST, MOST)
    return len(norms)


def _norms(net: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in net.named_modules() if isinstance(m, NORMS) and m.track_running_stats]


def _counted(net: nn.Module, batches: Batches) -> dict[str, Any]:
    """The norms of a network after counting these batches only, each norm fed by norms that count too."""
    found = dict(_norms(net.eval()))
    for norm in found.values():
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches if found else ():
            net(batch)
    return found


def batches_of(data: Any, batch: int = BATCH) -> Batches:
    """data: a tensor (n, ...) of inputs, or a list of batches. Raises DataError for anything else, or none."""
    if isinstance(data, Tensor):
        data = list(data.split(batch)) if data.ndim else []
    if not isinstance(data, (list, tuple)) or not data or not all(isinstance(b, Tensor) and len(b) for b in data):
        raise DataError("this network is calibrated on its inputs: data=a tensor (n, ...), or a list of batches.")
    return list(data)
