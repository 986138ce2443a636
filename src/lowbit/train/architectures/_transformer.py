"""Transformer blocks of plain linear layers, so that `prepare` finds every one of them.

    x = x + attention(norm(x));  x = x + mlp(norm(x))            causal for texts

Source: Vaswani et al. 2017 (arXiv:1706.03762), normalization first as in GPT-2.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """x (n, length, width) -> the same shape."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}.")
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def blocks(depth: int, width: int, heads: int, causal: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, causal) for _ in range(depth)))
