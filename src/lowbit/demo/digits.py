"""The demo's task: scikit-learn's 1797 handwritten digits of 8 x 8 pixels, and a small convolutional network for them.

A quarter of the images (every class in proportion to chance, chosen by the seed) is never trained on.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 64
Step = Callable[[int, int], object]


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32 in [0, 1] and classes (n,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits(seed: int) -> Digits:
    """The data ship with scikit-learn: no download."""
    from sklearn.datasets import load_digits as from_sklearn

    data = from_sklearn()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = len(x) * 3 // 4
    return Digits(x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]])


def digit_net(width: int = 48) -> nn.Sequential:
    """Three convolutions and two linear layers with batch normalization; about 200,000 weights at width 48."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def train(
    net: nn.Module, data: Digits, epochs: int, lr: float, seed: int, step: Step = lambda done, total: None
) -> None:
    """Adam with a one-cycle schedule on cross-entropy; the order of images is seeded. Leaves the net in eval mode."""
    draw = torch.Generator().manual_seed(seed)
    per_epoch = len(data.x_train) // BATCH
    total = epochs * per_epoch
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    net.train()
    for done in range(total):
        if done % per_epoch == 0:
            order = torch.randperm(len(data.x_train), generator=draw)
        batch = order[(done % per_epoch) * BATCH :][:BATCH]
        optimizer.zero_grad()
        F.cross_entropy(net(data.x_train[batch]), data.y_train[batch]).backward()
        optimizer.step()
        schedule.step()
        step(done + 1, total)
    net.eval()


@torch.no_grad()
def logits(net: nn.Module, data: Digits) -> Tensor:
    """Of the test images, (n, 10)."""
    return net(data.x_test)


def share_right(scores: Tensor, data: Digits) -> float:
    """Accuracy, 0 to 1."""
    return float((scores.argmax(1) == data.y_test).float().mean())
