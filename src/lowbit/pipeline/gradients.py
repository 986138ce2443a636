"""One backward pass over the float model before the walk, block by block.

    forward    hidden states of all windows through block after block; what enters each block goes to scratch
    loss       of each window, and its gradient at the last hidden states
    backward   from the last block to the first: each block runs again with gradients; every linear layer's input x and
               output gradient r go to its accumulator (`statistics.output`), which goes to scratch

In memory at a time: one block, the hidden states of all windows, one window's graph, and the accumulators of one block
(for oac in^2 floats a layer); once also the output head and one window's logits. On disk, where the compression has a
folder, else in memory: the hidden states entering every block, 4 bytes * windows * tokens * width each. Costs about
four forward passes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import DataError, ModelError
from lowbit.pipeline.blocks import _replaced_forwards, linear_layers, run_block
from lowbit.statistics import OutputAccumulator

if TYPE_CHECKING:
    from lowbit.pipeline.stream import Walk

Loss = Callable[[Tensor, Tensor], Tensor]


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next token. logits (1, tokens, vocabulary), ids (1, tokens)."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


def gather_gradients(walk: "Walk", hidden: list[Tensor], kind: str, loss: Loss = next_token) -> None:
    """Leave in the walk's scratch, for each block i, "gradients-i": layer -> what `OutputAccumulator` finds.

    hidden: what enters the first block, one (1, tokens, width) tensor a window. loss: (logits, ids) -> scalar.
    """
    scratch, blocks = walk.store.scratch, walk.blocks
    for i, block in enumerate(blocks):
        scratch.put(f"enter-{i}", {str(k): h for k, h in enumerate(hidden)})
        names = walk.read_block(i)
        hidden = [run_block(block, h, *walk.calls[i]) for h in hidden]
        walk._forget(names)
    slopes = _at_the_end(walk, hidden, loss)
    for i in reversed(range(len(blocks))):
        names, entering = walk.read_block(i), scratch.take(f"enter-{i}")
        inputs = [entering[str(k)] for k in range(len(slopes))]
        slopes, found = block_gradients(blocks[i], walk.calls[i], inputs, slopes, kind)
        scratch.put(f"gradients-{i}", found)
        walk._forget(names)


def block_gradients(
    block: nn.Module, call: tuple[tuple, dict[str, Any]], inputs: list[Tensor], slopes: list[Tensor], kind: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(the loss's gradients at the block's inputs, layer -> statistics) from those at its outputs."""
    sums = {n: OutputAccumulator(kind) for n in linear_layers(block)}
    block.requires_grad_(False)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            x = args[0].detach()
            out.register_hook(lambda r: sums[name].add(x, r))

        return block.get_submodule(name).register_forward_hook(hook)

    handles = [watch(n) for n in sums]
    before = []
    try:
        for h, slope in zip(inputs, slopes):
            with torch.enable_grad():
                leaf = h.detach().clone().requires_grad_(True)
                run_block(block, leaf, *call).backward(slope)
            assert leaf.grad is not None
            before.append(leaf.grad)
    finally:
        for handle in handles:
            handle.remove()
    return before, {n: s.finish() for n, s in sums.items() if s.windows}


def _at_the_end(walk: "Walk", hidden: list[Tensor], loss: Loss) -> list[Tensor]:
    """The gradient of each window's loss at the last block's output."""
    names = [n for n in walk.names if not walk._in_blocks(n)]
    walk._read(names)
    walk.model.requires_grad_(False)
    assert walk.windows is not None
    slopes = [_slope(walk, h, ids[None], loss) for h, ids in zip(hidden, walk.windows)]
    walk._forget(names)
    return slopes


def _slope(walk: "Walk", hidden: Tensor, ids: Tensor, loss: Loss) -> Tensor:
    for as_tuple in (False, True):  # older transformers expect a tuple from a block
        leaf = hidden.detach().clone().requires_grad_(True)
        try:
            with torch.enable_grad(), _replaced_forwards(walk.blocks, _gives((leaf,) if as_tuple else leaf)):
                value = loss(walk.model(input_ids=ids).logits, ids)
                value.backward()
        except (IndexError, RuntimeError, ValueError, TypeError):
            if as_tuple:
                raise
            continue
        except AttributeError as e:
            raise ModelError(f"{type(walk.model).__name__} gives no logits to take a loss of: leave --gram out.") from e
        if leaf.grad is not None and leaf.grad.shape == hidden.shape:
            if not bool(torch.isfinite(leaf.grad).all()):
                raise DataError("the loss's gradients hold NaN or infinity: the model's weights are broken.")
            return leaf.grad
    raise ModelError(f"the loss of {type(walk.model).__name__} does not depend on its last block: leave --gram out.")


def _gives(value: Any) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return value

    return forward
