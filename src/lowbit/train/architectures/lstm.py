"""lstm: a recurrent network of plain linear layers. Images are read row by row, texts character by character.

    i, f, g, o = input(x_t) + hidden(h)        c = sigmoid(f) c + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c)

torch's own nn.LSTM keeps its weights where `prepare` cannot reach them; this one has two linear layers a depth.
Source: Hochreiter and Schmidhuber 1997; the forget gate's bias starts at 1 (Jozefowicz et al. 2015).
"""

import torch
from torch import Tensor, nn

from lowbit.train.architectures._spec import ArchitectureSpec


class LSTMLayer(nn.Module):
    """x (n, length, in) -> h of every step (n, length, width)."""

    def __init__(self, in_: int, width: int):
        super().__init__()
        self.width = width
        self.input, self.hidden = nn.Linear(in_, 4 * width), nn.Linear(width, 4 * width, bias=False)
        with torch.no_grad():
            self.input.bias[width : 2 * width] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        from_input = self.input(x).unbind(1)
        h = c = x.new_zeros(len(x), self.width, dtype=from_input[0].dtype)
        out = []
        for at in from_input:
            i, f, g, o = (at + self.hidden(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out, 1)


class LSTM(nn.Module):
    """Images (n, c, h, w) -> (n, classes); ids (n, length) -> (n, length, classes)."""

    def __init__(self, kind: str, shape: tuple[int, ...], classes: int, width: int, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(classes, width) if kind == "characters" else None
        in_ = width if kind == "characters" else shape[0] * shape[2]
        self.layers = nn.Sequential(*(LSTMLayer(width if i else in_, width) for i in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.head(self.layers(self.embedding(x)))
        return self.head(self.layers(x.transpose(1, 2).flatten(2))[:, -1])


def build(kind: str, shape: tuple[int, ...], classes: int, **options: int) -> nn.Module:
    return LSTM(kind, shape, classes, **options)


OPTIONS = {"width": 128, "depth": 1}
SPEC = ArchitectureSpec("lstm", "a recurrent network", "Hochreiter 1997", ("images", "characters"), build, OPTIONS)
