"""Channel reordering: permutations folded into neighbours, so that the float network computes what it did.

    hidden    rows of what produces a layer's input, and its columns     (gate, up -> down; fc1 -> fc2)
    heads     rows of v within each head, and the columns of o           (one order a key-value head)
    residual  columns of all that reads the residual stream, rows of all that writes it, norms, embedding, head

Sensitive channels gathered in one corner let tiles of one width each be worth their bits. Nothing is assumed from
names: a partner is found by permuting and looking whether the output stays.
Source: the bi-directional reordering of ScaleBITS (Li 2026, arXiv:2602.17698); how partners are found is derived.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError
from lowbit.pipeline.blocks import all_inputs, input_groups, layer_matrix, linear_layers, run_block

TOLERANCE = 1e-4
Call = tuple[tuple, dict[str, Any]]
Partners = list[tuple[list[str], str]]  # (producers, consumer)


def by_importance(rows: "list[Tensor]", columns: "list[Tensor]") -> Tensor:
    """An order of channels, the most sensitive first; rows: scores (channels, n) of producers, columns: (n, channels)
    of consumers."""
    score = sum((s.sum(1) for s in rows), torch.zeros(1)) + sum((s.sum(0) for s in columns), torch.zeros(1))
    return score.argsort(descending=True, stable=True)


# -- hidden channels


def permute_hidden(block: nn.Module, producers: list[str], consumer: str, order: Tensor) -> None:
    """Channel i becomes what channel order[i] was: rows (and biases) of the producers, columns of the consumer."""
    for name in producers:
        _permute_rows(block.get_submodule(name), order)
    _permute_columns(block.get_submodule(consumer), order)


@torch.no_grad()
def hidden_partners(block: nn.Module, hidden: Tensor, call: Call) -> list[tuple[list[str], str]]:
    """(producers, consumer) for every layer whose input channels can be reordered freely. Weights stay as they are."""
    groups = input_groups(block, hidden, *call)
    before = run_block(block, hidden, *call)
    sizes = {n: tuple(layer_matrix(m).shape) for n, m in linear_layers(block).items()}
    found = []
    for g in range(1, len(groups)):
        for consumer in groups[g] if len(groups[g]) == 1 else ():
            width = sizes[consumer][1]
            order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
            for earlier in reversed(groups[:g]):
                wide = [n for n in earlier if sizes[n][0] == width]
                for producers in [wide, *([n] for n in wide)] if len(wide) > 1 else [wide] if wide else []:
                    if _unchanged(block, producers, consumer, order, hidden, call, before):
                        found.append((producers, consumer))
                        break
    return found


def _unchanged(
    block: nn.Module, producers: list[str], consumer: str, order: Tensor, hidden: Tensor, call: Call, before: Tensor
) -> bool:
    permute_hidden(block, producers, consumer, order)
    after = run_block(block, hidden, *call)
    permute_hidden(block, producers, consumer, order.argsort())
    return torch.allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().mean()))


@torch.no_grad()
def arrange(block: nn.Module, hidden: Tensor, call: Call, partners: "Partners | None" = None) -> Partners:
    """Put the sensitive hidden channels of a block first; returns who goes with whom (for the next block).

    A channel's sensitivity: what its consumer makes of it, mean x^2 |w|^2.
    """
    partners = hidden_partners(block, hidden, call) if partners is None else partners
    inputs = all_inputs(block, [consumer for _, consumer in partners], hidden, *call)[0]
    for producers, consumer in partners:
        energy = inputs[consumer].flatten(0, -2).square().mean(0)
        score = layer_matrix(block.get_submodule(consumer)).square() * energy
        permute_hidden(block, producers, consumer, by_importance([], [score]))
    return partners


# -- heads


def permute_heads(v: nn.Module, o: nn.Module, orders: Tensor) -> None:
    """Reorder the value channels within each head. orders (key-value heads, head size); o may have more heads than v.

    Query head h reads key-value head h // (query heads / key-value heads), as transformers repeats them.
    """
    heads, size = orders.shape
    shift = torch.arange(heads)[:, None] * size
    _permute_rows(v, (orders + shift).reshape(-1))
    query_heads = layer_matrix(o).shape[1] // size
    of_query = orders.repeat_interleave(query_heads // heads, 0)
    _permute_columns(o, (of_query + torch.arange(query_heads)[:, None] * size).reshape(-1))


# -- the residual stream


@torch.no_grad()
def permute_residual(model: nn.Module, order: Tensor, check: "Tensor | None" = None) -> None:
    """Reorder the residual stream of a whole transformers model in place.

    Every tensor with a side as long as the stream is permuted along it: embeddings and what reads the stream along
    columns, what writes it along rows, norms and biases. Square layers are readers unless their block's output passes
    through them (attention's and the MLP's last layer).
    check: token ids; raises ModelError, with the weights as they were, where the logits would change.
    """
    width = len(order)
    before = model(check).logits if check is not None else None
    sides = _residual_sides(model, width)
    _apply(model, sides, order)
    if check is not None and before is not None:
        after = model(check).logits
        if not torch.allclose(after, before, rtol=1e-3, atol=TOLERANCE * float(before.abs().max())):
            _apply(model, sides, order.argsort())
            raise ModelError(f"{type(model).__name__} mixes the channels of its residual stream; they stay in order.")


WRITERS = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj", "dense")


def _residual_sides(model: nn.Module, width: int) -> dict[str, tuple[nn.Parameter, int]]:
    """Parameter name -> (parameter, the dimension that is the residual stream). A tied weight appears once."""
    found = {}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        writer = owner.rpartition(".")[2] in WRITERS
        if p.ndim == 1:
            linear = owner in linear_layers(model)
            if len(p) == width and (writer or not linear):
                found[name] = (p, 0)
        elif leaf == "weight" and owner in linear_layers(model):
            flipped = type(module).__name__ == "Conv1D"
            side = 0 if writer else 1
            dim = 1 - side if flipped else side
            if p.shape[dim] == width:
                found[name] = (p, dim)
        elif isinstance(module, nn.Embedding) and p.shape[1] == width:
            found[name] = (p, 1)
    return found


def _apply(model: nn.Module, sides: dict[str, tuple[nn.Parameter, int]], order: Tensor) -> None:
    for p, dim in sides.values():
        p.copy_(p.index_select(dim, order))


def _permute_rows(module: nn.Module, order: Tensor) -> None:
    w = layer_matrix(module)
    w.copy_(w[order].clone())
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.data.copy_(bias.data[order].clone())


def _permute_columns(module: nn.Module, order: Tensor) -> None:
    w = layer_matrix(module)
    w.copy_(w[:, order].clone())
