"""What every task is: examples on one device, batches drawn by seed and epoch alone, and a test set."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class Task:
    """A data set in memory. `draws` says all that is random about an epoch, so that training resumes anywhere in it.

    kind:        "images": x (n, c, h, w) float, y (n,) classes; "characters": x (n, length) ids, y the same one later
    shape:       of one example's x
    """

    kind: str
    classes: int
    shape: tuple[int, ...]
    train_examples: int
    test_examples: int

    def steps(self, batch: int) -> int:
        """Batches an epoch; what is left over waits for the next shuffle."""
        return max(self.train_examples // batch, 1)

    def draws(self, batch: int, seed: int, epoch: int) -> Tensor:
        """(steps, ..., batch) int64 on the CPU: which examples, and how they are changed, in each batch."""
        size = min(batch, self.train_examples)
        order = torch.randperm(self.train_examples, generator=generator(seed, epoch))
        return order[: self.steps(batch) * size].reshape(-1, size)

    def batch(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of one entry of `draws`, on the task's device."""
        raise NotImplementedError

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, on the task's device."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of the data: a checkpoint goes on with the same only."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskSpec:
    """One row of the table of tasks. load: (data, device, train_examples, test_examples; 0 for all) -> Task."""

    name: str
    title: str
    kind: str
    load: Callable[[str, torch.device, int, int], Task]


def generator(seed: int, epoch: int) -> torch.Generator:
    """Of one epoch's order and changes."""
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def digest(*tensors: Tensor) -> str:
    """SHA-256 over the tensors' bytes, shortened."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
