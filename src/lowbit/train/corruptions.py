"""Images made worse, for the corruption track of `lowbit bench methods`: noise, blur, fog, light, coding.

    corrupt(x, "noise", 3)         x: (n, h, w, 3) uint8, the same out; severities 1 (mild) to 5

Kinds and severities follow CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), which BiBench's corruption
track uses (Qin 2023, arXiv:2301.11233). The functions are ours and the originals are JPEGs already, so the accuracies
are not those of the published files. Random ones draw from a generator of their own: the same images every time.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import RecipeError, near_names

Change = Callable[[Tensor, float, torch.Generator], Tensor]  # (n, 3, h, w) in [0, 1], strength, generator

LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip  # the example tables of the JPEG standard, row by row; of colours the corner, 99 elsewhere
COLOUR = (17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99)


def corrupt(x: Tensor, kind: str, severity: int) -> Tensor:
    """x (n, h, w, 3) uint8 -> the same, changed. Raises RecipeError for an unknown kind or severity."""
    if kind not in KINDS:
        raise RecipeError(f"unknown corruption {kind!r}. {near_names(kind, tuple(KINDS))}")
    change, strengths = KINDS[kind]
    if not 1 <= severity <= len(strengths):
        raise RecipeError(f"severity {severity} is not between 1 and {len(strengths)}.")
    draw = torch.Generator().manual_seed(1000 * list(KINDS).index(kind) + severity)
    out = change(x.permute(0, 3, 1, 2).float() / 255, strengths[severity - 1], draw)
    return (out * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _noise(x: Tensor, sigma: float, draw: torch.Generator) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=draw)


def _shot(x: Tensor, photons: float, draw: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=draw) / photons


def _impulse(x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    u = torch.rand(x.shape, generator=draw)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def _blur(x: Tensor, sigma: float, draw: torch.Generator) -> Tensor:
    reach = max(1, math.ceil(3 * sigma))
    k = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    k = k / k.sum()
    return _filtered(_filtered(x, k[None]), k[:, None])


def _motion(x: Tensor, length: float, draw: torch.Generator) -> Tensor:
    """The mean along the falling diagonal, `length` pixels, the ends in part."""
    reach = math.ceil((length - 1) / 2)
    k = ((length + 1) / 2 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1) / length
    return _filtered(x, torch.diag(k))


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with one kernel; the border repeats."""
    kh, kw = kernel.shape
    x = F.pad(x, ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2), mode="replicate")
    return F.conv2d(x, kernel.expand(x.shape[1], 1, kh, kw), groups=x.shape[1])


def _fog(x: Tensor, amount: float, draw: torch.Generator) -> Tensor:
    """A cloud of four octaves of smooth noise in [0, 1], mixed in; the brightest value stays."""
    size = x.shape[-2:]
    cloud = torch.zeros(len(x), 1, *size)
    for octave in range(4):
        n = 2 << octave
        coarse = torch.rand(len(x), 1, n, n, generator=draw)
        cloud += F.interpolate(coarse, size, mode="bicubic", align_corners=True) / 2**octave
    cloud = (cloud / cloud.amax((2, 3), keepdim=True)).clamp(0, 1)
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * cloud) * top / (top + amount)


def _brighter(x: Tensor, amount: float, draw: torch.Generator) -> Tensor:
    return x + amount


def _contrast(x: Tensor, factor: float, draw: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _pixelate(x: Tensor, factor: float, draw: torch.Generator) -> Tensor:
    """Fewer pixels and back, each the mean of what it covers."""
    h, w = x.shape[-2:]
    rows, columns = (_boxes(n, int(n * factor)) @ _boxes(int(n * factor), n) for n in (h, w))
    return rows @ x @ columns.T


def _boxes(out: int, in_: int) -> Tensor:
    """(out, in_): how much of each input lies in each output, rows summing to 1."""
    i, j = torch.arange(out)[:, None] * in_ / out, torch.arange(in_)
    shared = (torch.minimum(i + in_ / out, j + 1) - torch.maximum(i, j)).clamp(min=0)
    return shared / shared.sum(1, keepdim=True)


def _jpeg(x: Tensor, quality: float, draw: torch.Generator) -> Tensor:
    """Luminance and both colour differences in rounded 8 x 8 cosine blocks, no subsampling."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    to_ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    scale = 50 / quality if quality < 50 else 2 - quality / 50
    table = torch.full((3, 8, 8), 99.0)
    table[0], table[1:, :4, :4] = torch.tensor(LUMINANCE).reshape(8, 8), torch.tensor(COLOUR).reshape(4, 4)
    step = (table * scale).round().clamp(1, 255)[:, None, None]
    i = torch.arange(8)
    cosines = torch.cos((2 * i[None] + 1) * i[:, None] * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)
    ycc = torch.einsum("ij,njhw->nihw", to_ycc, x * 255) - torch.tensor([128.0, 0, 0])[:, None, None]
    blocks = ycc.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    kept = (cosines @ blocks @ cosines.T / step).round() * step
    out = (cosines.T @ kept @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    out[:, 0] += 128
    return (torch.einsum("ij,njhw->nihw", to_ycc.inverse(), out) / 255)[:, :, :h, :w]


KINDS: dict[str, tuple[Change, tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot": (_shot, (500, 250, 100, 75, 50)),
    "impulse": (_impulse, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "motion": (_motion, (2, 3, 4, 5, 6)),
    "fog": (_fog, (0.2, 0.5, 0.75, 1.0, 1.5)),
    "brightness": (_brighter, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
}  # strengths for severities 1 to 5
