"""EuclidNet layers: the negative squared distance in the place of the product, with a smooth way from one to the other.

    y = x.w - (t/2) (|x|^2 + |w|^2)          t = 0: the product;  t = 1: -|x - w|^2 / 2

The gradient is autograd's: at t = 1, dL/dw = g (x - w). `to_euclid` replaces a trained network's layers, which at t = 0
compute what they did; t then rises linearly to 1 over the first `transition` of the training (call lowbit.step) and
stays. |x|^2 of a convolution is a box filter of x^2, shared by all outputs: one product, one row norm, one column norm.
Outputs are large and negative: a BatchNorm or a bias must follow. The norms are taken in float32.

On CPUs and GPUs this is not faster than a product; the gain is in hardware, where a squarer costs about half of a
multiplier's gates. Source: Li et al. 2022 (arXiv:2212.11803); the linear schedule is a common choice, not theirs.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import RecipeError
from lowbit.estimators import Scheduled
from lowbit.layers._spec import LayerSpec


def ramp(transition: float, position: float) -> float:
    """t at a position of the training."""
    return 1.0 if transition <= 0 else min(position / transition, 1.0)


class _Euclid(Scheduled):
    """weight and bias as in the layer replaced; transition: share of the training until t = 1; 0: from the start."""

    def __init__(self, layer: "nn.Linear | nn.Conv2d", transition: float = 0.5):
        super().__init__(partial(ramp, transition))
        self.weight, self.bias = layer.weight, layer.bias

    def _combine(self, product: Tensor, x_norm: Tensor, w_norm: Tensor) -> Tensor:
        y = product.float() - (self.t / 2) * (x_norm + w_norm)
        y = y if self.bias is None else y + self.bias.float().reshape(w_norm.shape)
        return y.to(product.dtype)


class EuclidLinear(_Euclid):
    """x (..., in) -> (..., out): -|x - w|^2 / 2 against each row of the weight, plus bias, at t = 1."""

    def forward(self, x: Tensor) -> Tensor:
        x_norm = x.float().square().sum(-1, keepdim=True)
        return self._combine(F.linear(x, self.weight), x_norm, self.weight.float().square().sum(1))


class EuclidConv2d(_Euclid):
    """x (batch, in, H, W) -> (batch, out, H', W'): the same for each patch and filter; zero padding counts as zeros."""

    def __init__(self, layer: nn.Conv2d, transition: float = 0.5):
        if layer.padding_mode != "zeros":
            raise RecipeError(f"a distance convolution pads with zeros, not {layer.padding_mode!r}: skip this layer.")
        super().__init__(layer, transition)
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        product = F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)
        grouped = x.float().square().reshape(len(x), self.groups, -1, *x.shape[2:]).sum(2)
        box = torch.ones(self.groups, 1, *w.shape[2:], device=x.device)
        norm = F.conv2d(grouped, box, None, self.stride, self.padding, self.dilation, self.groups)
        norm = norm.repeat_interleave(len(w) // self.groups, 1) if self.groups > 1 else norm
        return self._combine(product, norm, w.float().square().sum((1, 2, 3)).reshape(-1, 1, 1))


def to_euclid(net: nn.Module, transition: float = 0.5, skip: tuple[str, ...] = ()) -> nn.Module:
    """Replace linear layers and 2-d convolutions by distance layers with the same parameters, in place.

    The last linear layer stays a product, as do layers whose name is in `skip`. Raises RecipeError if none is left.
    """
    layers = {n: m for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    last = [n for n, m in layers.items() if isinstance(m, nn.Linear)][-1:]
    names = [n for n in layers if n and n not in last and n not in skip]
    if not names:
        raise RecipeError("no layer to replace: only plain nn.Linear and nn.Conv2d are, without the last linear layer.")
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = layers[name]
        new = EuclidConv2d(layer, transition) if isinstance(layer, nn.Conv2d) else EuclidLinear(layer, transition)
        setattr(net.get_submodule(owner), leaf, new.to(layer.weight.device))  # type: ignore[arg-type]
    return net


SPEC = LayerSpec("euclid", "squared distance in place of the product", "arXiv:2212.11803")
