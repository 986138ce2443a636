"""pack: evaluate every weight function once and keep only its bits."""

from torch import nn

from lowbit.activations import attach, attached
from lowbit.errors import RecipeError
from lowbit.runtime import swap
from lowbit.training.attach import STEP, latent_of, weight_functions


def pack(net: nn.Module, activations: str = "float") -> nn.Module:
    """Replace every prepared layer by its packed form, in place; returns the net (a new module if `net` itself is one
    layer).

    activations: "float" (exact) or "int8". Input functions stay where they are, in front of the packed layer.
    Raises RecipeError if nothing is prepared.
    """
    prepared = list(weight_functions(net))
    if not prepared:
        raise RecipeError('nothing to pack: call lowbit.prepare(net, "ternary") first, then train.')
    for name, module, function in prepared:
        qt = function.quantized(latent_of(module))
        kind = swap.kind_of(module)
        assert kind is not None
        conv = swap.conv_options(module) if kind == "conv2d" else None
        packed = swap.pack_layer(module, qt, kind, activations, conv)
        rounds_input = attached(module)
        if rounds_input is not None:
            attach(packed, rounds_input)
        packed.train(module.training)
        if not name:
            return packed
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, packed)
    net._buffers.pop(STEP, None)
    return net
