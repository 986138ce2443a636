"""Torch's number of threads, for a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on this thread alone, then give torch's others back.

    For work too little to share: a second thread saves nothing, waiting for it is slow on a busy machine, and threads
    that have nothing to do go on spinning where others want to run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
