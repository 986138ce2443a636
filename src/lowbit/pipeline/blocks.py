"""The repeated blocks of a model, and the linear layers inside one.

Works on any transformers model whose body is one list of blocks (Llama, Qwen, Mistral, GPT-2, OPT, BERT ...). Names are
the state dict's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the repeated blocks: the module list with most weights. Raises ModelError if there is none."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder and a decoder; only models with one stack of blocks are walked yet."
        )
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and linear_layers(m)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; "
            "use lowbit.compress(model, ...) layer by layer."
        )
    return max(lists, key=lambda nm: sum(p.numel() for p in nm[1].parameters()))


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer (nn.Linear, or transformers' Conv1D, whose weight is (in, out)) below a module."""
    return {n: m for n, m in module.named_modules() if layer_type(m) in ("linear", "conv1d")}


def layer_type(module: nn.Module) -> "str | None":
    """ "linear", "conv1d", "embedding", "conv2d", or None for anything that is not quantized."""
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv2d" if isinstance(module, nn.Conv2d) else None


def layer_matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in), no copy."""
    weight: Any = module.weight
    return weight.detach().T if layer_type(module) == "conv1d" else weight.detach()


def set_matrix(module: nn.Module, w: Tensor) -> None:
    """Replace the weight by w (out, in) of the same size, in place."""
    layer_matrix(module).copy_(w)


class Stop(Exception):
    """Ends a forward pass early; carries what was wanted."""


def run_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """One block's output hidden states."""
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def run_block_with(
    block: nn.Module, weights: dict[str, Tensor], hidden: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """As `run_block`, with other weights (layer -> (out, in)) in place of the block's own; gradients reach them."""
    stored = {f"{n}.weight": w.T if layer_type(block.get_submodule(n)) == "conv1d" else w for n, w in weights.items()}
    out = torch.func.functional_call(block, stored, (hidden, *args), kwargs)
    return out[0] if isinstance(out, tuple) else out


def block_calls(
    model: nn.Module, blocks: nn.ModuleList, batch: dict[str, Tensor]
) -> "list[tuple[tuple, dict[str, Any]]]":
    """The (args, kwargs) with which the model calls each block; args[0] is the hidden states.

    The model runs once with blocks that do nothing, so no block needs its weights. The first call's args[0] is what
    enters the first block.
    """
    for as_tuple in (False, True):  # older transformers expect a tuple from a block
        calls: list[tuple[tuple, dict[str, Any]]] = []
        try:
            with _replaced_forwards(blocks, _recorder(calls, len(blocks), as_tuple)):
                model(**batch)
        except Stop:
            pass
        except (IndexError, RuntimeError, ValueError, TypeError):
            if as_tuple or not calls:
                raise
        calls = [_without_cache(args, kwargs) for args, kwargs in calls]
        if len(calls) == len(blocks) and all(c[0][0].shape == calls[0][0][0].shape for c in calls):
            return calls
    raise ModelError(
        f"{type(model).__name__} does not call its {len(blocks)} blocks one after the other; it cannot be walked."
    )


def _without_cache(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A call that remembers nothing: a key-value cache would grow with every pass over the block."""
    clean = {k: None if _is_cache(v) else False if k == "use_cache" else v for k, v in kwargs.items()}
    return tuple(None if _is_cache(a) else a for a in args), clean


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def _recorder(calls: list, n: int, as_tuple: bool) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append(((hidden, *args[1:]), kwargs))
        if len(calls) == n:
            raise Stop
        return (hidden,) if as_tuple else hidden

    return forward


class _replaced_forwards:
    """Give every block another forward for a while."""

    def __init__(self, blocks: nn.ModuleList, forward: Callable) -> None:
        self.blocks, self.forward = blocks, forward

    def __enter__(self) -> None:
        for block in self.blocks:
            block.forward = self.forward

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            del block.forward


def input_groups(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> list[list[str]]:
    """The block's linear layers in the order they are called, those that get the very same tensor together.

    Llama: [q, k, v], [o], [gate, up], [down]. Layers that are not called are missing.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = [
        m.register_forward_pre_hook(lambda _, inputs, name=n: seen.append((name, inputs[0])))
        for n, m in linear_layers(block).items()
    ]
    try:
        run_block(block, hidden, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in seen:
        home = next((names for tensor, names in groups if tensor is x), None)
        if home is None:
            groups.append((x, [name]))
        elif name not in home:
            home.append(name)
    return [names for _, names in groups]


@torch.no_grad()
def all_inputs(
    block: nn.Module, leaders: list[str], hidden: Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """One forward pass: the input of each named layer, and the block's output."""
    inputs: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(n).register_forward_pre_hook(lambda _, x, name=n: inputs.__setitem__(name, x[0]))
        for n in leaders
    ]
    try:
        return inputs, run_block(block, hidden, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
