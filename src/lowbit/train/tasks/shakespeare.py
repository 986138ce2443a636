"""shakespeare: the next character of a text. Any text will do; the name is that of the usual one (tiny Shakespeare).

data: a text file, or whatever else `lowbit compress --data` reads. The last tenth is the test set, read in windows one
after the other; training windows begin at random places. An epoch is as many characters as the training part has.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.sources import read_text
from lowbit.train.tasks._task import Task, TaskSpec, digest, generator

CONTEXT = 64


class Characters(Task):
    """x (n, 64) ids of characters, y the same one character later."""

    kind, shape = "characters", (CONTEXT,)

    def __init__(self, text: str, device: torch.device, train_examples: int = 0, test_examples: int = 0):
        self.alphabet = sorted(set(text))
        place = {c: i for i, c in enumerate(self.alphabet)}
        ids = torch.tensor([place[c] for c in text])
        cut = len(ids) * 9 // 10
        if len(ids) - cut <= CONTEXT:
            raise DataError(
                f"the text has {len(ids)} characters; {CONTEXT * 11} or more are needed. Give a longer one."
            )
        self.train, self.test = ids[:cut].to(device), ids[cut:].to(device)
        self.classes = len(self.alphabet)
        self.train_examples, self.test_examples = (
            min(n // CONTEXT, wanted or n)
            for n, wanted in ((cut - 1, train_examples), (len(ids) - cut - 1, test_examples))
        )

    def draws(self, batch: int, seed: int, epoch: int) -> Tensor:
        """(steps, batch): where each window begins."""
        draw = generator(seed, epoch)
        return torch.randint(0, len(self.train) - CONTEXT, (self.steps(batch), batch), generator=draw)

    def batch(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        return self._windows(self.train, draw.to(self.train.device))

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        starts = torch.arange(self.test_examples, device=self.test.device) * CONTEXT
        return (self._windows(self.test, s) for s in starts.split(64))

    def fingerprint(self) -> str:
        return digest(self.train, self.test)

    @staticmethod
    def _windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        at = starts[:, None] + torch.arange(CONTEXT + 1, device=ids.device)
        both = ids[at]
        return both[:, :-1], both[:, 1:]


def load(data: str, device: torch.device, train_examples: int, test_examples: int) -> Characters:
    if not data:
        raise DataError("the task shakespeare needs a text: --data FILE.txt.")
    return Characters(read_text(data), device, train_examples, test_examples)


SPEC = TaskSpec("shakespeare", "the next character of a text", "characters", load)
