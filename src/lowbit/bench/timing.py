"""Times that can be compared: candidates take turns, each call is timed alone, the median of all counts."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle

import torch

Call = Callable[[], object]
ROUNDS = 3  # a neighbour on the machine that wakes up for a while hits every candidate


def medians(candidates: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, float]:
    """Milliseconds of each candidate, a list of calls to go through in turn (on buffers of their own).

    seconds: spent on each candidate, split over ROUNDS; at least two calls a round, after one round of warm-up calls.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    turns = {name: cycle(calls) for name, calls in candidates.items()}
    for name in candidates:
        _run(turns[name], seconds / ROUNDS / 2)
    for _ in range(ROUNDS):
        for name in candidates:
            times[name] += _run(turns[name], seconds / ROUNDS)
    return {name: statistics.median(t) for name, t in times.items()}


def _run(calls: Iterator[Call], seconds: float) -> list[float]:
    """Milliseconds of each call, until the time is over and two are done."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        call = next(calls)
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return times


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads, which are also the kernels', for a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
