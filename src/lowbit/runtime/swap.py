"""Packed layers in the place of float ones: which module may become which, checked before anything is changed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ArtifactError, LowbitError, ModelError
from lowbit.formats import QuantizedTensor, tensor_specs
from lowbit.runtime.binary_layers import PackedBinaryConv2d, PackedBinaryLinear
from lowbit.runtime.conv_layer import PackedConv2d
from lowbit.runtime.layers import PackedEmbedding, PackedLinear
from lowbit.runtime.packed import Packed

BINARY: dict[str, Any] = {"binary_linear": PackedBinaryLinear, "binary_conv2d": PackedBinaryConv2d}
BINARY_LAYERS = (PackedBinaryLinear, PackedBinaryConv2d)
PACKED_KINDS: dict[str, type[Packed]] = {
    "linear": PackedLinear, "embedding": PackedEmbedding, "conv2d": PackedConv2d, **BINARY
}  # fmt: skip
PACKED = tuple(PACKED_KINDS.values())
FLOAT = {"linear": nn.Linear, "embedding": nn.Embedding, "conv2d": nn.Conv2d}
ROUNDING = (PackedLinear, PackedConv2d)  # whose inputs may be rounded to int8
INPUT_FUNCTION = "input_function"  # as lowbit.activations attaches it
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CONV_KEYS = ("stride", "padding", "dilation", "groups", "padding_mode")
ELSEWHERE = "check that the architecture is the one that was compressed, or re-run lowbit compress"


class Awaiting(nn.Module):
    """Holds the place of a packed layer while transformers reads its tensors.

    Buffers without memory, the bias, and what else the packed layer takes from the float one.
    """

    def __init__(self, float_layer: nn.Module, specs: dict[str, Any]):
        super().__init__()
        self.kind = str(kind_of(float_layer))
        self.padding_idx = getattr(float_layer, "padding_idx", None)
        weight = torch.empty_like(float_layer.weight, device="meta").detach()  # type: ignore[arg-type]
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.weight = weight  # no parameter: transformers' initialisers look at it, and leave it alone
        for key, (shape, dtype) in specs.items():
            self.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", getattr(float_layer, "bias", None))


def pack_layer(
    old: Any, qt: QuantizedTensor, kind: str, activations: str = "float", conv: "dict[str, Any] | None" = None
) -> nn.Module:
    """The packed layer for a float one (or an `Awaiting`). It keeps the very bias parameter, which others may share."""
    if kind == "embedding":
        return PackedEmbedding.from_quantized(qt, old.padding_idx, old.weight.dtype)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in (conv or {}).items()}
    new = (PackedConv2d if kind == "conv2d" else PackedLinear).from_quantized(qt, None, activations, **options)
    new.bias = old.bias
    return new


def pack_binary(
    old: Any, qt: QuantizedTensor, inputs: str, threshold: "Tensor | float" = 0.0, gain: float = 1.0
) -> nn.Module:
    """The packed layer for a float one whose weights and inputs are bits: see `binary_layers`."""
    kind = f"binary_{kind_of(old)}"
    conv = conv_options(old) if kind == "binary_conv2d" else {}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in conv.items()}
    rows = None if gain == 1 else torch.full((qt.shape[0],), gain)
    bias = None if old.bias is None else old.bias.detach()
    layer = BINARY[kind].from_quantized(qt, bias, inputs=inputs, threshold=threshold, gain=rows, **options)
    return layer.to(old.weight.device)


def fits_binary(module: nn.Module, qt: QuantizedTensor) -> bool:
    """May the module be a layer of bits? That takes 1-bit or ternary levels, one scale a row, and zero padding."""
    out, in_ = qt.matrix_shape
    return (
        kind_of(module) in ("linear", "conv2d")
        and len(qt.parts) == 1
        and qt.format.levels.name in ("binary", "ternary")
        and qt.format.blocks.size(out, in_)[1] == in_
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and in_ > 0
    )


def kind_of(module: nn.Module) -> "str | None":
    """ "linear", "embedding", "conv2d", transformers' "conv1d"; None where a packed layer would compute otherwise."""
    if isinstance(module, Awaiting):
        return module.kind
    classes: dict[str, Any] = FLOAT
    for kind, cls in classes.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return kind
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def check_layers(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Raise ArtifactError unless every layer and tie of the manifest finds a float module of its type and sizes."""
    for name, row in manifest["layers"].items():
        _check_one(_module(model, name), name, row)
        for folded in row.get("binary", {}).get("folded", ()):
            if not isinstance(_module(model, folded), NORMS):
                raise ArtifactError(
                    f"{folded!r} is a {type(_module(model, folded)).__name__} here, but was packed as the batch-norm "
                    f"after {name!r}; {ELSEWHERE}."
                )
    for alias, owner in manifest["tied"].items():
        module = _module(model, alias)
        kind = kind_of(module)
        if kind not in ("linear", "embedding"):
            raise ArtifactError(
                f"tied layer {alias!r} is a {type(module).__name__} and cannot share packed weights; {ELSEWHERE}."
            )
        shared = manifest["layers"][owner] | {"type": kind, "bias": getattr(module, "bias", None) is not None}
        _check_one(module, alias, shared)


def _check_one(module: nn.Module, name: str, row: dict[str, Any]) -> None:
    found, binary = kind_of(module), row["type"] in BINARY
    if found != row["type"].removeprefix("binary_"):
        raise ArtifactError(
            f"layer {name!r} is a {type(module).__name__} here, but was packed as {row['type']}; {ELSEWHERE}."
        )
    weight: Any = module.weight
    shape = list(weight.shape)[::-1] if found == "conv1d" else list(weight.shape)
    if shape != row["meta"]["shape"]:
        raise ArtifactError(
            f"layer {name!r} has a weight of {shape} here, but {row['meta']['shape']} was packed; {ELSEWHERE}."
        )
    if not binary and (getattr(module, "bias", None) is not None) != row["bias"]:
        raise ArtifactError(
            f"layer {name!r} {'lacks the' if row['bias'] else 'has a'} bias here, unlike what was packed; {ELSEWHERE}."
        )
    if found == "conv2d" and conv_options(module) != row["conv"]:
        raise ArtifactError(
            f"layer {name!r} has {conv_options(module)} here, but {row['conv']} was packed; {ELSEWHERE}."
        )


def conv_options(conv: Any) -> dict[str, Any]:
    """Stride, padding, dilation, groups and padding mode in JSON's types."""
    return {k: list(v) if isinstance(v := getattr(conv, k), tuple) else v for k in CONV_KEYS}


def place_binary(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Put an empty packed layer in the place of every layer of bits (checked before), nothing in that of its norms."""
    for name, row in manifest["layers"].items():
        if row["type"] not in BINARY:
            continue
        told = row["binary"]
        conv = {k: tuple(v) if isinstance(v, list) else v for k, v in row.get("conv", {}).items()}
        extras = {k: tuple(v) for k, v in told["extras"].items()}
        try:
            options = {"inputs": told["inputs"], "pad": told["pad"], "extras": extras, **conv}
            new = BINARY[row["type"]](row["meta"], row["bias"], device="meta", **options)
        except LowbitError as e:
            raise ArtifactError(f"layer {name!r}: {e} Copy the folder again, or pack the network again.") from e
        _set_module(model, name, new)
        set_folded(model, new, told["folded"])


def set_folded(model: nn.Module, layer: Any, names: "Iterable[str]") -> None:
    """From now on `layer` does the work of the modules `names`."""
    layer.folded = (*layer.folded, *names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = nn.Identity()


def reserve(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Put an `Awaiting` in the place of every layer (checked before). Raises ArtifactError on layers of bits."""
    for name, row in manifest["layers"].items():
        if row["type"] in BINARY:
            raise ArtifactError(
                f"layer {name!r} has 1-bit inputs, which from_pretrained cannot place: use lowbit.load."
            )
        _set_module(model, name, Awaiting(_module(model, name), tensor_specs(row["meta"])))
    for alias in manifest["tied"]:
        _set_module(model, alias, Awaiting(_module(model, alias), {}))


def install(
    model: nn.Module,
    manifest: dict[str, Any],
    tensors_of: Callable[[str], dict[str, Tensor]],
    activations: str = "float",
) -> None:
    """Replace every layer (checked before) by its packed form; tied ones share the tensors.

    tensors_of: layer name -> its stored tensors by key. Biases stay the modules' own parameters.
    Raises ArtifactError on impossible codes.
    """
    packed: dict[str, QuantizedTensor] = {}
    for name, row in manifest["layers"].items():
        try:
            packed[name] = QuantizedTensor.from_tensors(row["meta"], tensors_of(name))
        except LowbitError as e:
            raise ArtifactError(f"layer {name!r}: {e} Copy the folder again, or re-run lowbit compress.") from e
        if row["type"] in BINARY:
            _module(model, name).fill(packed[name])  # type: ignore[operator]
            continue
        _set_module(
            model, name, pack_layer(_module(model, name), packed[name], row["type"], activations, row.get("conv"))
        )
    for alias, owner in manifest["tied"].items():
        old = _module(model, alias)
        _set_module(model, alias, pack_layer(old, packed[owner], str(kind_of(old)), activations))


def check_module(model: Any, what: str) -> None:
    """Raises ModelError for anything but a torch module; what: the function that was called."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{what} takes a torch module, not a {type(model).__name__}.")


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, packed layer), every name of a module that is reachable twice."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PACKED):
            yield name, module


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArtifactError(f"layer {name!r} does not exist in {type(model).__name__}; {ELSEWHERE}.") from None


def _set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    new.train(old.training)
    if INPUT_FUNCTION in old._modules and not isinstance(
        new, BINARY_LAYERS
    ):  # what rounds the layer's input, and the hook that calls it, stay
        new.add_module(INPUT_FUNCTION, old._modules[INPUT_FUNCTION])
        new._forward_pre_hooks.update(old._forward_pre_hooks)
    model.get_submodule(parent)._modules[leaf] = new


def untie(model: Any, manifest: dict[str, Any]) -> None:
    """transformers must not tie weights that are packed now (they have no `.weight`): take them out of its tables."""
    gone = {f"{name}.weight" for name in (*manifest["layers"], *manifest["tied"])}
    for table in ("all_tied_weights_keys", "_tied_weights_keys"):
        pairs = getattr(model, table, None)
        if isinstance(pairs, dict):
            setattr(model, table, {a: b for a, b in pairs.items() if a not in gone and b not in gone})
