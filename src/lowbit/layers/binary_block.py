"""A residual block for binary networks: a real-valued skip round every single binary convolution.

    y = RPReLU( BN( conv(x) ) + shortcut(x) )        shortcut: identity; with a stride or more channels
                                                     average pooling and a float 1x1 convolution with BN

What the sign throws away goes round it. Put the signs on with lowbit.prepare(net, {"weights": "xnor", "activations":
"sign"}); the shortcut's convolution stays in float by itself. Sources: Liu et al. 2018, Bi-Real Net (arXiv:1808.00278);
Liu et al. 2020, ReActNet (arXiv:2003.03488).
"""

from torch import Tensor, nn

from lowbit.layers._spec import LayerSpec, keep_float
from lowbit.layers.rprelu import RPReLU


class BinaryBlock(nn.Module):
    """x (batch, in_channels, H, W) -> (batch, out_channels, H / stride, W / stride).

    H and W a multiple of the stride. activation: "rprelu" (ReActNet), "hardtanh" or "none" (Bi-Real Net).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, activation: str = "rprelu"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)
        kinds = {"rprelu": RPReLU(out_channels), "hardtanh": nn.Hardtanh(), "none": nn.Identity()}
        self.activation = kinds[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)) + self.shortcut(x))


def shortcut(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    """Identity where the shape stays; else average pooling, float 1x1 convolution, BN."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
    project = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return keep_float(nn.Sequential(pool, project, nn.BatchNorm2d(out_channels)))


SPEC = LayerSpec("binary_block", "real-valued skip round a binary convolution", "arXiv:1808.00278")
