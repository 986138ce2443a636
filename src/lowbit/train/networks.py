"""Networks for small images: the residual networks of the binary-network papers.

    resnet(depth=20, width=16)                      He's CIFAR network (arXiv:1512.03385, section 4.2), shortcut A
    resnet(activations="sign")                      signs before every convolution but the first
    resnet(activations="approx", block="single")    a real-valued skip round every convolution (Bi-Real, 1808.00278)
    resnet(activations="rsign", block="single")     learned shifts and RPReLU (ReActNet, 2003.03488)
    resnet(activations="signed")                    no ReLU: for signs that `lowbit.prepare` puts on the layers' inputs
    resnet(activations="signed_rprelu", block="single")     the same with RPReLU

`quantized_names(net)` lists the convolutions that methods act on: all but the first and the 1 x 1 shortcuts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.layers import keep_float


def sgn(x: Tensor) -> Tensor:
    """-1 or 1 in x's dtype; sgn(0) = +1. The two constants lie on x's device, so that a CUDA graph can hold it."""
    one = x.new_ones(())
    return torch.where(x >= 0, one, -one)


class _Sign(torch.autograd.Function):
    """sign(x), sign(0) = +1; the gradient is multiplied by a window: `kind` says which, o is ReSTE's power."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, o: Tensor) -> Tensor:
        ctx.save_for_backward(x, o)
        ctx.kind = kind
        return sgn(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, o = ctx.saved_tensors
        return grads[0] * WINDOWS[ctx.kind](x, o), None, None


def reste_slope(x: Tensor, o: Tensor, m: float = 0.1, t: float = 1.5) -> Tensor:
    """(1/o)|x|^((1-o)/o); its chord m^(1/o)/m nearer to 0 than m; 0 beyond t (ReSTE, arXiv:2308.06689)."""
    a = x.abs()
    o = o.to(x.dtype)
    return torch.where(a <= m, m ** (1 / o) / m, a.clamp(min=m) ** ((1 - o) / o) / o) * (a <= t)


WINDOWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sign": lambda x, o: (x.abs() <= 1).to(x.dtype),
    "approx": lambda x, o: (2 - 2 * x.abs()).clamp(min=0),
    "reste": reste_slope,
}


class SignActivation(nn.Module):
    """x (n, c, h, w) -> -1 or 1; with `shift` the threshold is learned per channel (RSign)."""

    o: Tensor

    def __init__(self, kind: str, channels: int, shift: bool = False):
        super().__init__()
        self.kind = kind
        self.shift = nn.Parameter(torch.zeros(channels)) if shift else None
        self.register_buffer("o", torch.ones(()), persistent=False)  # ReSTE's power, moved on by the training loop

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x + self.shift.to(x.dtype)[:, None, None]
        return _Sign.apply(x, self.kind, self.o)


class RPReLU(nn.Module):
    """PReLU(x + a) + b, slope and shifts per channel (ReActNet)."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.after = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        before, after, slope = (p.to(x.dtype)[:, None, None] for p in (self.before, self.after, self.slope))
        x = x + before
        return torch.where(x >= 0, x, slope * x) + after


class Unit(nn.Module):
    """(sign) -> 3 x 3 convolution -> batch normalization."""

    def __init__(self, in_: int, out: int, stride: int, activations: str):
        super().__init__()
        kind = "approx" if activations == "rsign" else activations
        inside = activations in WINDOWS or activations == "rsign"
        self.sign = SignActivation(kind, in_, activations == "rsign") if inside else nn.Identity()
        self.conv = nn.Conv2d(in_, out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.sign(x)))


class PadShortcut(nn.Module):
    """Every second pixel, new channels zero: a shortcut without parameters (He's option A)."""

    def __init__(self, in_: int, out: int):
        super().__init__()
        self.extra = out - in_

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class ConvShortcut(nn.Module):
    """Average pool, a real-valued 1 x 1 convolution, batch normalization (Bi-Real, ReActNet).

    As published it stays in float: `lowbit.prepare` leaves it alone unless an entry of `layers` names it.
    """

    def __init__(self, in_: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(in_, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        keep_float(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.avg_pool2d(x, 2)))


class PairBlock(nn.Module):
    """Two units and one skip. Its last activation is ReLU, or hardtanh where signs follow."""

    def __init__(self, in_: int, out: int, stride: int, activations: str):
        super().__init__()
        self.first = Unit(in_, out, stride, activations)
        self.second = Unit(out, out, 1, activations)
        self.shortcut = nn.Identity() if stride == 1 and in_ == out else PadShortcut(in_, out)
        self.act = nn.ReLU() if activations == "float" else nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))) + self.shortcut(x))


class SingleBlock(nn.Module):
    """One unit and one skip, twice: the real values survive every sign."""

    def __init__(self, in_: int, out: int, stride: int, activations: str):
        super().__init__()
        self.first = Unit(in_, out, stride, activations)
        self.second = Unit(out, out, 1, activations)
        self.shortcut = nn.Identity() if stride == 1 and in_ == out else ConvShortcut(in_, out)
        rprelu = activations in ("rsign", "signed_rprelu")
        self.act1, self.act2 = (RPReLU(out) if rprelu else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.first(x) + self.shortcut(x))
        return self.act2(self.second(x) + x)


BLOCKS = {"pair": PairBlock, "single": SingleBlock}


class ResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks, width, 2 width and 4 width channels.

    x (n, channels, h, w) -> (n, classes)
    """

    def __init__(
        self, depth: int = 20, width: int = 16, classes: int = 10, activations: str = "float", block: str = "pair",
        stem_stride: int = 1, channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act: nn.Module = nn.ReLU() if activations == "float" else nn.Identity()
        blocks, in_ = [], width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                stride, out = 2 if stage and i == 0 else 1, width << stage
                blocks.append(BLOCKS[block](in_, out, stride, activations))
                in_ = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(in_, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)).to(self.head.bias.dtype))


def resnet(**options: Any) -> ResNet:
    """`ResNet` with He's initialisation; see the module's text."""
    return ResNet(**options)


def quantized_names(net: nn.Module) -> list[str]:
    """Names of the convolutions that methods act on, in order."""
    convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    return [n for n in convs[1:] if "shortcut" not in n]
