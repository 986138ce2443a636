"""mlp: linear layers with batch normalization. Of a text it sees the last `window` characters (Bengio et al. 2003)."""

import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train.architectures._spec import ArchitectureSpec


class CharacterMLP(nn.Module):
    """ids (n, length) -> (n, length, classes): each place from the `window` characters up to it."""

    def __init__(self, classes: int, width: int, depth: int, window: int, embedding: int):
        super().__init__()
        self.window = window
        self.embedding = nn.Embedding(classes + 1, embedding, padding_idx=classes)  # the last id: before the text
        self.layers = layers(window * embedding, width, depth, classes)

    def forward(self, ids: Tensor) -> Tensor:
        padded = F.pad(ids, (self.window - 1, 0), value=self.embedding.num_embeddings - 1)
        seen = self.embedding(padded.unfold(1, self.window, 1))  # (n, length, window, embedding)
        n, length = ids.shape
        return self.layers(seen.reshape(n * length, -1)).view(n, length, -1)


def layers(in_: int, width: int, depth: int, classes: int) -> nn.Sequential:
    """depth hidden layers: linear, batch normalization, ReLU; then the classes."""
    hidden = []
    for i in range(depth):
        hidden += [nn.Linear(width if i else in_, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def build(
    kind: str, shape: tuple[int, ...], classes: int, width: int, depth: int, window: int, embedding: int
) -> nn.Module:
    if kind == "characters":
        return CharacterMLP(classes, width, depth, window, embedding)
    channels, height, columns = shape
    return nn.Sequential(nn.Flatten(), *layers(channels * height * columns, width, depth, classes))


OPTIONS = {"width": 256, "depth": 2, "window": 8, "embedding": 16}
SPEC = ArchitectureSpec("mlp", "linear layers with batch normalization", "", ("images", "characters"), build, OPTIONS)
