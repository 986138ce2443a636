"""gpt: a small transformer that says the next character."""

import torch
from torch import Tensor, nn

from lowbit.train.architectures._spec import ArchitectureSpec
from lowbit.train.architectures._transformer import blocks


class GPT(nn.Module):
    """ids (n, length) -> (n, length, classes). Embedding and head are not tied."""

    def __init__(self, length: int, classes: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = blocks(depth, width, heads, causal=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.place[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def build(kind: str, shape: tuple[int, ...], classes: int, **options: int) -> nn.Module:
    return GPT(shape[0], classes, **options)


OPTIONS = {"width": 64, "depth": 4, "heads": 4}
SPEC = ArchitectureSpec("gpt", "a small transformer for texts", "arXiv:1706.03762", ("characters",), build, OPTIONS)
