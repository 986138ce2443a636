"""Running packed models: layers over the compiled kernels, the kernel table, files and generation."""

from lowbit.runtime.conv_layer import PackedConv2d
from lowbit.runtime.kernels import active_isa
from lowbit.runtime.layers import PackedEmbedding, PackedLinear
from lowbit.runtime.modes import prepare, set_activations

__all__ = ["PackedConv2d", "PackedEmbedding", "PackedLinear", "active_isa", "prepare", "set_activations"]
