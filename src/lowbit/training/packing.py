"""pack: evaluate every weight function once and keep only its bits."""

from typing import Any

from torch import Tensor, nn

from lowbit.activations import attach, attached
from lowbit.errors import ModelError, RecipeError
from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.runtime import swap
from lowbit.runtime.fold import fold_norms
from lowbit.training.attach import KINDS, STEP, latent_of, weight_functions


def pack(net: nn.Module, activations: str = "float", rest: "Format | str | None" = None) -> nn.Module:
    """Replace every prepared layer by its packed form, in place; returns the net (a new module if `net` itself is one
    layer).

    activations: "float" (exact) or "int8". Input functions stay where they are, in front of the packed layer
    rest:        a format, e.g. "int8-channel", to which the layers that were not prepared are rounded: first
                 convolution, last linear layer. None leaves them in float

    A layer whose weights are 1-bit or ternary (one scale a row) and whose inputs are one bit becomes a layer of bits
    times bits: its input function turns into thresholds, and a batch-norm that only it feeds into its scale and bias.
    Such a network is for inference in evaluation mode.
    Raises RecipeError if nothing is prepared.
    """
    prepared = list(weight_functions(net))
    names = list(net.named_modules(remove_duplicate=False))
    if not prepared:
        raise RecipeError('nothing to pack: call lowbit.prepare(net, "ternary") first, then train.')
    for name, module, function in prepared:
        latent = latent_of(module)
        check_values(name, latent)
        packed = _packed(module, function.quantized(latent), activations)
        packed.train(module.training)
        if not name:
            return packed
        for other in (n for n, m in names if m is module):  # a module may stand under several names
            _replace(net, other, packed)
    if rest is not None:
        _pack_rest(net, Format.parse(rest) if isinstance(rest, str) else rest, activations)
    fold_norms(net)
    net._buffers.pop(STEP, None)
    return net


def check_values(name: str, w: Tensor) -> None:
    """Raises ModelError where a layer's weights are no numbers."""
    if w.is_meta:
        raise ModelError(f"{name or 'the layer'} is on the meta device and has no values: load its weights first.")
    if bad := int((~w.isfinite()).sum()):
        raise ModelError(
            f"{name or 'the layer'}: {bad} of {w.numel()} weights are NaN or infinite, so the training has diverged. "
            "Go back to an earlier checkpoint, and try a smaller learning rate."
        )


def _packed(module: Any, qt: QuantizedTensor, activations: str) -> nn.Module:
    rounds_input = attached(module)
    bit = None if rounds_input is None else rounds_input.one_bit()
    if bit is not None and swap.fits_binary(module, qt):
        return swap.pack_binary(module, qt, bit.inputs, bit.threshold, bit.gain)
    kind = swap.kind_of(module)
    assert kind is not None
    packed = swap.pack_layer(module, qt, kind, activations, swap.conv_options(module) if kind == "conv2d" else None)
    if rounds_input is not None:
        attach(packed, rounds_input)
    return packed


def _pack_rest(net: nn.Module, fmt: Format, activations: str) -> None:
    """The linear layers and convolutions that are still in float, rounded to nearest."""
    for name, module in list(net.named_modules()):
        if swap.kind_of(module) in KINDS and name and attached(module) is None:
            qt = quantize(module.weight.detach().float(), fmt)  # type: ignore[operator, union-attr]
            _replace(net, name, _packed(module, qt, activations))


def _replace(net: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, new)
