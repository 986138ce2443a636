"""vit: a small vision transformer. Patches become tokens, their mean after the last block is classified."""

import torch
from torch import Tensor, nn

from lowbit.train.architectures._spec import ArchitectureSpec
from lowbit.train.architectures._transformer import blocks


class ViT(nn.Module):
    """x (n, c, h, w) -> (n, classes)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, heads: int, patch: int):
        super().__init__()
        channels, height, columns = shape
        if height % patch or columns % patch:
            raise ValueError(f"images of {height} x {columns} pixels cannot be cut into patches of {patch}.")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(height // patch * (columns // patch), width))
        self.blocks = blocks(depth, width, heads, causal=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def build(kind: str, shape: tuple[int, ...], classes: int, **options: int) -> nn.Module:
    return ViT(shape, classes, **options)


OPTIONS = {"width": 64, "depth": 4, "heads": 4, "patch": 4}
SPEC = ArchitectureSpec("vit", "a small vision transformer", "arXiv:2010.11929", ("images",), build, OPTIONS)
