"""Random bias initialisation: the hyperplanes of a sign network need not all pass through the origin.

    bias ~ U(-spread, spread) * standard deviation of what it is added to

Without biases a sign network gives f(c x) = f(x) for c > 0 and f(-x) = -f(x): it cannot tell concentric rings apart.
The bias in front of a sign is that of the BatchNorm there, if there is one (its weight is the standard deviation); else
that of the layer (the norm of a row of its weight, for inputs of variance 1). Too wide a spread leaves units whose sign
never changes. Source: Li and Partovi Nia 2019 (arXiv:1909.13446); the uniform range is an option here.
"""

import torch
from torch import nn

from lowbit.layers._spec import LayerSpec


@torch.no_grad()
def random_bias_(net: nn.Module, spread: float = 1.0, generator: "torch.Generator | None" = None) -> int:
    """Fill the biases of BatchNorms, linear layers and convolutions, in place; returns how many layers had one.

    A linear layer or convolution directly followed by a BatchNorm (in the order of net.modules()) is left alone: the
    BatchNorm takes its bias away again.
    """
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, _NORMS))]
    filled = 0
    for m, after in zip(layers, [*layers[1:], None]):
        bias = getattr(m, "bias", None)
        if bias is None or (not isinstance(m, _NORMS) and isinstance(after, _NORMS)):
            continue
        deviation = m.weight.abs() if isinstance(m, _NORMS) else m.weight.flatten(1).norm(dim=1)
        draw = torch.rand(bias.shape, generator=generator, dtype=torch.float32).to(bias.device, bias.dtype)
        bias.copy_((2 * draw - 1) * spread * deviation)
        filled += 1
    return filled


_NORMS = nn.modules.batchnorm._NormBase
SPEC = LayerSpec("random_bias", "random biases in front of signs", "arXiv:1909.13446")
