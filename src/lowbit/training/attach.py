"""prepare: put weight functions and input functions on a network's layers."""

import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.activations import InputFunction, attach, attached
from lowbit.errors import LowbitError, RecipeError
from lowbit.formats import Format
from lowbit.layers._spec import FLOAT_MARK
from lowbit.runtime import swap
from lowbit.training.choices import Choice, Choices, Rule, read_choices
from lowbit.weights import WeightFunction

KINDS = ("linear", "conv2d")
STEP = "lowbit_step"  # buffer on the network: optimizer steps done, where `steps` was given


def prepare(
    net: nn.Module,
    recipe: "str | Format | dict[str, Any]" = "binary-channel",
    estimator: Any = None,
    skip: "Iterable[str] | None" = None,
    keep_ends: "bool | None" = None,
    steps: "int | None" = None,
    **options: Any,
) -> nn.Module:
    """Put a weight function (and an input function) on every linear layer and 2-d convolution; returns the same net.

    recipe:    a weight method's name ("s3"), a format ("ternary", "int4-channel"), or a mapping
               {"weights": ..., "activations": ..., "layers": [...], "skip": [...], "keep_ends": ...}
    estimator, **options: of the weight method: prepare(net, "binary", estimator="reste"), prepare(net, "s3", bits=3)
    skip:      names or patterns of layers to leave alone, e.g. "head*"
    keep_ends: leave the first convolution and the last linear layer in float (default yes)
    steps:     optimizer steps of the whole training; then `lowbit.step(net)` knows where schedules stand

    Give the optimizer `net.parameters()` after preparing: methods add parameters of their own.
    Raises RecipeError if nothing is left to quantize, an entry of `skip` matches nothing, the net is prepared already,
    or a chosen weight is tied to another; ShapeError (naming the layer) where groups do not divide. Warns where a
    chosen weight is frozen, and where layers that no method knows hold weights.
    """
    if estimator is not None:
        options["estimator"] = estimator
    swap.check_module(net, "lowbit.prepare")
    if any(True for _ in swap.packed_modules(net)):
        raise RecipeError("this network's layers are packed already: prepare the float network it came from.")
    choices = read_choices(recipe, skip, keep_ends, **options)
    if any(True for _ in weight_functions(net)) or any(True for _ in input_functions(net)):
        raise RecipeError(
            "this network is prepared already: train it, or lowbit.pack it. Prepare a copy to try another format."
        )
    _check_skip(net, choices.skip)
    chosen = list(_chosen(net, choices))
    if not chosen:
        raise RecipeError(
            "there is no layer to quantize: only plain nn.Linear and nn.Conv2d are, without the first convolution "
            "and the last linear layer. Give keep_ends=False, or skip less."
        )
    _check_tied(net, [name for name, _, rule in chosen if rule.weights])
    functions = [_build(name, layer, rule) for name, layer, rule in chosen]
    for (_, layer, _), (on_weight, on_input) in zip(chosen, functions):
        for function in on_weight:
            parametrize.register_parametrization(layer, "weight", function)
        if on_input is not None:
            attach(layer, on_input)
    if steps is not None:
        net.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
        net.lowbit_steps = int(steps)  # type: ignore[assignment]
    _warn(net, chosen, choices)
    return net


def weight_functions(net: nn.Module) -> Iterator[tuple[str, nn.Module, WeightFunction]]:
    """(name, layer, its weight function) of every prepared layer."""
    swap.check_module(net, "this")
    for name, module in list(net.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            last = module.parametrizations["weight"][-1]  # type: ignore[index]
            if isinstance(last, WeightFunction):
                yield name, module, last


def input_functions(net: nn.Module) -> Iterator[tuple[str, nn.Module, InputFunction]]:
    """(name, layer, its input function) of every layer whose input is rounded."""
    for name, module in list(net.named_modules()):
        function = attached(module)
        if function is not None:
            yield name, module, function


def latent_of(module: Any) -> Any:
    """The latent as it reaches the last weight function, without a gradient."""
    w = module.parametrizations.weight.original.detach()
    for function in list(module.parametrizations.weight)[:-1]:
        w = function(w)
    return w.detach()


def _chosen(net: nn.Module, choices: Choices) -> Iterator[tuple[str, Any, Rule]]:
    inside = _inside_attention(net)
    layers = [(n, m, swap.kind_of(m)) for n, m in net.named_modules() if n not in inside]
    marked = {n for n, m, _ in layers if getattr(m, FLOAT_MARK, False)}
    convs, linears = ([n for n, _, k in layers if k == kind and n not in marked] for kind in ("conv2d", "linear"))
    ends = {*convs[:1], *linears[-1:]} if choices.keep_ends else set()
    for name, module, kind in layers:
        if kind in KINDS and name not in ends and (rule := choices.rule_for(name, name in marked)) is not None:
            yield name, module, rule


def _check_skip(net: nn.Module, patterns: tuple[str, ...]) -> None:
    """A pattern that matches nothing is a slip of the pen, and its layer would be quantized."""
    names = [name for name, module in net.named_modules() if name and any(True for _ in module.parameters())]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern.strip("*"), names, n=3) or names[-3:]
            raise RecipeError(f"skip={pattern!r} matches no layer. There are e.g. {', '.join(close)}.")


def _inside_attention(net: nn.Module) -> set[str]:
    """Linear layers whose weight nn.MultiheadAttention takes without calling them."""
    return {
        f"{name}.{child}".removeprefix(".")
        for name, module in net.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }


def _build(name: str, layer: Any, rule: Rule) -> tuple[list[nn.Module], "InputFunction | None"]:
    """The parametrizations and the input function of one layer, built but not yet attached."""
    try:
        return _weight_functions(layer, rule.weights), _input_function(layer, rule.activations)
    except LowbitError as e:
        raise type(e)(f"{name}: {e}" if name else str(e)) from None


def _weight_functions(layer: Any, choice: "Choice | None") -> list[nn.Module]:
    if choice is None:
        return []
    built = choice.spec.build(layer.weight.detach(), **choice.options)
    functions = list(built) if isinstance(built, (list, tuple)) else [built]
    fmt: Format = functions[-1].format
    fmt.blocks.size(layer.weight.shape[0], prod(layer.weight.shape[1:]))  # ShapeError where groups do not divide
    if not layer.weight.requires_grad and functions[-1].starts_over:
        raise RecipeError(
            f"its weight is frozen (requires_grad=False), and {choice.spec.name} would start over at random. "
            'Give init="weights", set requires_grad_(True), or leave the layer out with skip=[...].'
        )
    return [f.to(layer.weight.device) for f in functions]


def _input_function(layer: Any, choice: "Choice | None") -> "InputFunction | None":
    if choice is None:
        return None
    conv = isinstance(layer, nn.Conv2d)
    channels, axis = (layer.in_channels, 1) if conv else (layer.in_features, -1)
    return choice.spec.build(channels, axis, **choice.options).to(layer.weight.device)


def _check_tied(net: nn.Module, names: list[str]) -> None:
    """Raise RecipeError where a chosen weight is also a parameter of something else."""
    owners: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for key, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append(f"{name}.{key}".removeprefix("."))
    for name in names:
        weight = net.get_submodule(name).weight
        shared = [o for o in owners.get(id(weight), []) if o != f"{name}.weight".removeprefix(".")]
        if shared:
            raise RecipeError(
                f"{name}: its weight is tied to {', '.join(shared)}, which would go on using the float numbers. "
                f"Leave it alone with skip=[{name!r}], or untie it first: "
                "layer.weight = nn.Parameter(layer.weight.clone())."
            )


def _warn(net: nn.Module, chosen: list[tuple[str, Any, Rule]], choices: Choices) -> None:
    frozen = [n for n, m, rule in chosen if rule.weights and not m.parametrizations.weight.original.requires_grad]
    if frozen:
        warnings.warn(
            f"frozen weights (requires_grad=False) are rounded but will not learn: {', '.join(frozen)}. "
            "Set requires_grad_(True) on them before training, or leave them out with skip=[...].",
            stacklevel=3,
        )
    left = list(_unsupported(net, choices))
    if left:
        warnings.warn(
            f"these layers keep float weights, no method knows them: {', '.join(left)}. Only nn.Linear and nn.Conv2d "
            "are prepared; build the layer from those, or name it in skip=[...] to silence this.",
            stacklevel=3,
        )


def _unsupported(net: nn.Module, choices: Choices) -> Iterator[str]:
    """torch's own layers with weight matrices that no method prepares, unless they were left out on purpose."""
    inside = _inside_attention(net)
    for name, module in net.named_modules():
        unknown = name not in inside and not getattr(module, FLOAT_MARK, False) and _is_unknown_layer(module)
        if unknown and choices.rule_for(name) is not None:
            yield f"{name} ({type(module).__name__})"


def _is_unknown_layer(module: nn.Module) -> bool:
    known = (nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._NormBase, nn.LayerNorm)
    if swap.kind_of(module) in KINDS or isinstance(module, known):
        return False
    theirs = type(module).__module__.startswith("torch.nn.modules") or isinstance(module, (nn.Linear, nn.Conv2d))
    return theirs and any(p.ndim > 1 for p in module.parameters(recurse=False))
