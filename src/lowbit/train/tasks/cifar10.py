"""cifar10: 50,000 small colour photographs in ten classes, with random crops and flips in training.

data: a folder of Parquet files, the one file of `python -m lowbit.train.images`, or the data set's name on the hub.
Any other data set of equally large images in that layout works as well; its classes are counted.
Source: Krizhevsky 2009; crops and flips as in He et al. 2015 (arXiv:1512.03385).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.train.device_images import PAD, DeviceImages
from lowbit.train.images import read_images
from lowbit.train.tasks._task import Task, TaskSpec, digest, generator


class Photographs(Task):
    """x (n, 3, h, w) float32, normalized."""

    kind = "images"

    def __init__(self, data: str, device: torch.device, train_examples: int = 0, test_examples: int = 0):
        train, test = (s.first(n) for s, n in zip(read_images(data), (train_examples, test_examples)))
        self.images = DeviceImages(train, test, device)
        self.classes, self.shape = int(train.y.max()) + 1, (3, *train.x.shape[1:3])
        self.train_examples, self.test_examples = len(train.y), len(test.y)
        self.device = device

    def draws(self, batch: int, seed: int, epoch: int) -> Tensor:
        """(steps, 4, batch): which image, two offsets, flip."""
        which = super().draws(batch, seed, epoch)
        draw = generator(seed, epoch)
        offsets = torch.randint(0, 2 * PAD + 1, (2, *which.shape), generator=draw)
        flip = torch.randint(0, 2, (1, *which.shape), generator=draw)
        return torch.cat([which[None], offsets, flip]).transpose(0, 1).contiguous()

    def batch(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.batch(draw.to(self.device), torch.float32)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.images.test_batches(500))

    def fingerprint(self) -> str:
        return digest(self.images.y, self.images.y_test, self.images.x_test[:100])


def load(data: str, device: torch.device, train_examples: int, test_examples: int) -> Photographs:
    if not data:
        raise DataError("the task cifar10 needs data: --data FOLDER (Parquet), or its name on the hub, cifar10.")
    try:
        return Photographs(data, device, train_examples, test_examples)
    except DataError as e:
        raise DataError(f"{e} Give the images with --data FOLDER.") from None


SPEC = TaskSpec("cifar10", "photographs, 32 x 32 pixels, ten classes", "images", load)
