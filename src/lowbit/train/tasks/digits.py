"""digits: scikit-learn's 1797 handwritten digits of 8 x 8 pixels. They come with scikit-learn: no download.

A quarter of the images, always the same, is the test set. Source: UCI, Alpaydin and Kaynak 1998.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.train.tasks._task import Task, TaskSpec, digest


class DigitImages(Task):
    """x (n, 1, 8, 8) float32 in [0, 1]."""

    kind, classes, shape = "images", 10, (1, 8, 8)

    def __init__(self, device: torch.device, train_examples: int = 0, test_examples: int = 0):
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        cut = len(x) * 3 // 4
        train, test = order[:cut][: train_examples or None], order[cut:][: test_examples or None]
        self.x, self.y = x[train].to(device), y[train].long().to(device)
        self.x_test, self.y_test = x[test].to(device), y[test].long().to(device)
        self.train_examples, self.test_examples = len(self.y), len(self.y_test)

    def batch(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        at = draw.to(self.x.device)
        return self.x[at], self.y[at]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x_test.split(256), self.y_test.split(256))

    def fingerprint(self) -> str:
        return digest(self.y, self.y_test)


def load(data: str, device: torch.device, train_examples: int, test_examples: int) -> DigitImages:
    if data:
        raise DataError(f"the task digits brings its own images and takes no data; leave out {data!r}.")
    return DigitImages(device, train_examples, test_examples)


SPEC = TaskSpec("digits", "handwritten digits, 8 x 8 pixels (scikit-learn)", "images", load)
