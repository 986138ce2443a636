"""What is done to every packed layer of a model at once."""

from torch import nn

from lowbit.runtime.conv_layer import PackedConv2d
from lowbit.runtime.layers import PackedLinear
from lowbit.runtime.packed import Packed


def set_activations(model: nn.Module, kind: str) -> int:
    """Switch every packed linear and convolution of a model to "float" or "int8" activations; returns their number.

    Raises FormatError on another word.
    """
    layers = [m for m in model.modules() if isinstance(m, (PackedLinear, PackedConv2d))]
    for layer in layers:
        layer.activations = kind
    return len(layers)


def prepare(model: nn.Module) -> int:
    """Derive what the kernels need for every packed layer now (needed before torch.compile and torch.export).

    Returns the number of layers. Raises FormatError or ArtifactError on a layer whose tensors are damaged or missing.
    """
    layers = [m for m in model.modules() if isinstance(m, Packed)]
    for layer in layers:
        layer.prepare()
    return len(layers)
