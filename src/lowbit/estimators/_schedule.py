"""Schedules: one number that moves with the training, kept where checkpoints and devices find it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Schedule = Callable[[float], float]


class Scheduled(nn.Module):
    """A module with one number `t` that follows a schedule: position in the training (0 to 1) -> t.

    With a schedule t is a buffer, so that a checkpoint restores it, it moves with the module, and torch.compile does
    not compile again when it changes. Without one it is a constant.
    """

    t: "Tensor | float"

    def __init__(self, schedule: "Schedule | None" = None, start: float = 1.0):
        super().__init__()
        self.schedule: Schedule | None = None
        self.t = start
        if schedule is not None:
            self.follow(schedule)

    def follow(self, schedule: Schedule) -> None:
        """From now on t is a buffer that `move` sets."""
        self.__dict__.pop("t", None)
        self.schedule = schedule
        self.register_buffer("t", torch.tensor(float(schedule(0.0)), dtype=torch.float32))

    def move(self, position: float) -> bool:
        """Set t to where the schedule is at `position`, 0 to 1. True if there is a schedule."""
        if self.schedule is None:
            return False
        assert isinstance(self.t, Tensor)
        self.t.fill_(self.schedule(min(max(position, 0.0), 1.0)))
        return True


def geometric(start: float, end: float) -> Schedule:
    """start * (end / start)**position.

    >>> geometric(1.0, 100.0)(0.5)
    10.0
    """
    return partial(_geometric, start, end)


def linear(start: float, end: float) -> Schedule:
    """start + (end - start) * position."""
    return partial(_linear, start, end)


def _geometric(start: float, end: float, position: float) -> float:
    return start * (end / start) ** position


def _linear(start: float, end: float, position: float) -> float:
    return start + (end - start) * position
