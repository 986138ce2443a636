"""The plan: peak memory and time of a compression, estimated before it starts.

    start      what the process holds now
    opening    embeddings and everything else outside the blocks, in float32
    blocks     one block in float32 + hidden states of all windows + live activations at a pause
               + the solver's work on the largest layer

Peak = start + the larger of the two (and of the output head, where it is not tied). The estimate is meant to be a
little high.
"""

import ctypes
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowbit.errors import MemoryPlanError

SOLVER_GRAMS = 8  # in^2 float32 matrices alive in a solver: H, copies damped and permuted, factor, inverse, products
SOLVER_COPIES = 9  # out*in float32 matrices alive: w, compensated columns, candidates of the scale search
EMBEDDING_ROWS = 2560  # rows quantized at a time; a multiple of 40, so that slices end on bytes in every packing
SLACK = 1.5  # what the allocator holds between sizes; measured


@dataclass(frozen=True)
class Sizes:
    """What the plan needs to know. Counts are numbers of float32 values unless the name says bytes."""

    start_bytes: int
    outside: int
    head: int
    block: int
    width: int
    widest_input: int
    widest_group: int  # out * in of the largest group of stacked layers
    tokens: int
    blocks: int
    gram: int  # sum of in^2 over the groups of a block
    streams: int = 1  # sets of hidden states that are carried


@dataclass(frozen=True)
class Plan:
    """estimate and ceiling in bytes, seconds, and how passes through a block are run."""

    estimate_bytes: int
    ceiling_bytes: "int | None"
    seconds: float
    recompute: bool
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}


def make_plan(sizes: Sizes, ceiling: "int | None" = None, windows: int = 1) -> Plan:
    """Choose how to run within the ceiling. Raises MemoryPlanError saying what would fit."""
    fast, lean = peak_bytes(sizes, recompute=False), peak_bytes(sizes, recompute=True)
    seconds = _seconds(sizes)
    if ceiling is None or fast <= ceiling:
        return Plan(fast, ceiling, seconds, False)
    if lean <= ceiling:
        note = (
            "to stay below the ceiling, beginnings of blocks are computed again for every group of layers "
            "(about twice the time)"
        )
        return Plan(lean, ceiling, 2 * seconds, True, (note,))
    raise MemoryPlanError(_too_small(sizes, ceiling, lean, windows))


def peak_bytes(s: Sizes, recompute: bool) -> int:
    """Estimated peak resident bytes."""
    hidden = s.streams * s.tokens * s.width
    live = 0 if recompute else s.streams * s.tokens * (s.widest_input + 3 * s.width)
    solver = SOLVER_GRAMS * s.widest_input**2 + SOLVER_COPIES * s.widest_group
    blocks = s.streams * s.block + 2 * hidden + live + solver if s.tokens else s.block + SOLVER_COPIES * s.widest_group
    opening = s.outside + hidden + SOLVER_COPIES * EMBEDDING_ROWS * s.width
    return int(s.start_bytes + 4 * SLACK * max(blocks, opening, s.head + SOLVER_COPIES * EMBEDDING_ROWS * s.width))


def _too_small(s: Sizes, ceiling: int, needed: int, windows: int) -> str:
    smaller = [
        n for n in range(windows - 1, 0, -1) if peak_bytes(_with_tokens(s, s.tokens * n // windows), True) <= ceiling
    ]
    fix = f"--windows {smaller[0]}" if smaller else f"--max-ram {_gb(needed)}"
    return f"the run needs about {_gb(needed)}, more than the ceiling of {_gb(ceiling)}. Try {fix}."


def _with_tokens(s: Sizes, tokens: int) -> Sizes:
    return Sizes(**(asdict(s) | {"tokens": tokens}))


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f}GB"


def _seconds(s: Sizes) -> float:
    """Products of the passes, the Gram matrices and the solvers, at the speed of a float32 product measured now."""
    forward = s.streams * s.tokens * (s.block + s.gram)
    solve = 4 * s.widest_group * s.widest_input + 40 * s.block
    return 2 * s.blocks * (forward + solve) / _flops_per_second() + s.blocks * 0.4


def _flops_per_second(n: int = 768, repeats: int = 4) -> float:
    a = torch.ones(n, n)
    a @ a
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return repeats * 2 * n**3 / max(time.perf_counter() - started, 1e-9)


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps it otherwise, and a walk over many blocks would seem to grow with depth.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
