"""Which module before a group of layers can take an input scaling, so that the float model does not change.

    y = W x = (W t) (x / t):    x / t comes from the producer, if x scales with the producer's output rows

A producer is a norm, or a linear layer with as many outputs as the group has inputs (up before down, v before o, fc1
before fc2 after ReLU). Nothing is assumed from names: the block runs once with a random t folded in, and its output
must stay what it was. Derived.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.pipeline.blocks import all_inputs, layer_matrix, linear_layers, run_block

TOLERANCE = 1e-3


def fold(block: nn.Module, producer: str, group: list[str], t: Tensor) -> None:
    """Divide the producer's output by t (in,) and multiply the group's weights by it, in place."""
    _scale_output(block.get_submodule(producer), 1 / t)
    for name in group:
        layer_matrix(block.get_submodule(name)).mul_(t)


def _scale_output(module: nn.Module, factor: Tensor) -> None:
    weight: Any = layer_matrix(module) if module_is_linear(module) else module.weight.data  # type: ignore[union-attr]
    weight.mul_(factor[:, None] if module_is_linear(module) else factor)
    if getattr(module, "bias", None) is not None:
        module.bias.data.mul_(factor)  # type: ignore[union-attr, operator]


def module_is_linear(module: nn.Module) -> bool:
    return bool(linear_layers(module))


@torch.no_grad()
def find_producer(
    block: nn.Module, group: list[str], hidden: Tensor, args: tuple, kwargs: dict[str, Any]
) -> "str | None":
    """The name of a module that can take the group's input scaling, or None. Weights are as before when it returns."""
    inputs, before = all_inputs(block, group[:1], hidden, args, kwargs)
    width = inputs[group[0]].shape[-1]
    t = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 0.5
    for name in _candidates(block, group, width):
        saved = {k: v.clone() for k, v in block.state_dict().items()}
        fold(block, name, group, t)
        after = run_block(block, hidden, args, kwargs)
        block.load_state_dict(saved)
        if torch.allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().mean())):
            return name
    return None


def _candidates(block: nn.Module, group: list[str], width: int) -> list[str]:
    """Modules with one output row or weight per input channel: norms as they come, then linear layers, last first."""
    names = [n for n, _ in block.named_modules()]
    linears = linear_layers(block)
    wide = [n for n, m in linears.items() if n not in group and layer_matrix(m).shape[0] == width]
    norms = [n for n, m in block.named_modules() if n not in linears and _is_scale(m, width)]
    return sorted(norms, key=names.index) + sorted(wide, key=names.index, reverse=True)


def _is_scale(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and len(weight) == width
