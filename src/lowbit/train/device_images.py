"""Labelled images that lie on one device as a whole; random crops and flips are gathered there from padded images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.train.images import Images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4


class DeviceImages:
    """Both splits on one device, the training images padded for crops."""

    def __init__(self, train: Images, test: Images, device: torch.device):
        self.padded = F.pad(train.x, (0, 0, PAD, PAD, PAD, PAD)).to(device)
        self.y, self.y_test = train.y.to(device), test.y.to(device)
        self.x_test = test.x.to(device)
        self.size = train.x.shape[1]
        self.mean = torch.tensor(MEAN, device=device) * 255
        self.gain = 1 / (torch.tensor(STD, device=device) * 255)
        self.at = torch.arange(self.size, device=device)

    def batch(self, draw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """draw (4, n): which image, two offsets, flip -> x (n, 3, h, w) in channels_last, y (n,)."""
        i, dy, dx, flip = draw
        rows = dy[:, None] + self.at
        columns = torch.where(flip[:, None] > 0, self.size - 1 - self.at, self.at) + dx[:, None]
        return self.normal(self.padded[i[:, None, None], rows[:, :, None], columns[:, None, :]], dtype), self.y[i]

    def test_batches(self, size: int = 1000) -> "list[tuple[Tensor, Tensor]]":
        chunks = zip(self.x_test.split(size), self.y_test.split(size))
        return [(self.normal(x), y) for x, y in chunks]

    def normal(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x (n, h, w, 3) uint8 -> (n, 3, h, w) with mean 0 and spread about 1."""
        return ((x.float() - self.mean) * self.gain).to(dtype).permute(0, 3, 1, 2)
