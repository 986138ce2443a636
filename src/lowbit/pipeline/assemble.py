"""Compressed models put together in memory: plain tensors in place, packed layers for the rest."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError, RecipeError, ShapeError
from lowbit.formats import tensor_specs
from lowbit.pipeline.blocks import layer_matrix, layer_type
from lowbit.pipeline.checkpoint import MemoryStore
from lowbit.pipeline.network import Progress, batches_of, solve_network
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.runtime import swap
from lowbit.solvers import Solution
from lowbit.sources import check_finite, set_tensor


def assemble(walk: Walk, store: MemoryStore, plan: Recipe) -> nn.Module:
    """The walked skeleton with plain tensors in place and packed layers for the rest."""
    model = walk.source.new_skeleton()  # the walk has left float32 parameters behind; here each has its own dtype
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for piece, entries in store.pieces.values():
        tensors |= piece
        layers |= entries["layers"]
        for name in entries["plain"]:
            _put(model, name, piece[name], walk.source.tied)
    manifest = {"layers": layers, "tied": tied_modules(walk.source.tied, layers)}

    def parts_of(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): tensors[k] for k in _keys(name, layers)}

    swap.install(model, manifest, parts_of, plan.activations)
    swap.untie(model, manifest)
    return model.eval()


def _keys(name: str, layers: dict[str, Any]) -> list[str]:
    return [f"{name}.{k}" for k in tensor_specs(layers[name]["meta"])]


def _put(model: nn.Module, name: str, tensor: Tensor, tied: dict[str, str]) -> None:
    first = set_tensor(model, name, tensor)
    for alias in (a for a, owner in tied.items() if owner == name):
        owner, _, leaf = alias.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = first  # type: ignore[assignment]


def tied_modules(tied: dict[str, str], layers: dict[str, Any]) -> dict[str, str]:
    """Module -> packed module whose tensors it shares."""
    pairs = {a.removesuffix(".weight"): o.removesuffix(".weight") for a, o in tied.items() if a.endswith(".weight")}
    return {a: o for a, o in pairs.items() if o in layers}


@torch.no_grad()
def compress_network(model: nn.Module, plan: Recipe, data: Any, progress: "Progress | None") -> nn.Module:
    """Any network, each layer on its own; with inputs as data, layer after layer (see `pipeline.network`)."""
    if plan.needs_data and data is None:
        raise RecipeError(f"{plan.method} needs calibration inputs: data=a tensor (n, ...); or use rtn or hqq.")
    model = copy.deepcopy(model).eval()
    layers = {n: m for n, m in model.named_modules() if layer_type(m) in ("linear", "conv2d")}
    if not layers:
        raise ModelError("the network has no nn.Linear and no nn.Conv2d, and nothing else is compressed.")
    for name, layer in layers.items():
        _check_values(f"{name}.weight".removeprefix("."), layer_matrix(layer))
    convs, linears = ([n for n, m in layers.items() if layer_type(m) == kind] for kind in ("conv2d", "linear"))
    for name in {*convs[:1], *linears[-1:]} if len(layers) > 1 else ():
        del layers[name]
    if data is not None:
        solutions = solve_network(model, layers, plan, batches_of(data), progress)
    else:
        solutions = {n: s for n, m in layers.items() if (s := _solved_alone(n, m, plan)) is not None}
    for name, solution in solutions.items():
        layer = layers[name]
        kind, shape = str(layer_type(layer)), tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
        conv = swap.conv_options(layer) if kind == "conv2d" else None
        packed = swap.pack_layer(layer, solution.quantized(shape), kind, plan.activations, conv)
        swap._set_module(model, name, packed)
    return model


def _solved_alone(name: str, layer: nn.Module, plan: Recipe) -> "Solution | None":
    fmt, w = plan.format_for(name), layer_matrix(layer)
    if fmt is None:
        return None
    spec, options = plan.solver_for(name)
    try:
        return spec.solve(w.reshape(w.shape[0], -1).float(), None, fmt, **options)
    except ShapeError as e:
        raise ShapeError(f"{name}: {e}" if name else str(e)) from None


def _check_values(name: str, w: Tensor) -> None:
    if w.is_meta:
        raise ModelError(f"{name} is on the meta device and has no values: load the network's weights first.")
    check_finite(name, w)
