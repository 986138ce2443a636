"""What a run costs on the machine in hand: milliseconds, peak memory, bytes on disk."""

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lowbit.errors import DataError, RecipeError


@dataclass(frozen=True)
class LatencyResult:
    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int
    warmup: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def latency(fn: Callable[[], object], repeats: int = 20, warmup: int = 3) -> LatencyResult:
    """Wall-clock time of fn(), each call timed alone after `warmup` calls that are not.

    A function that only queues work (a GPU) must wait for it itself. Thread counts are the caller's business.
    """
    if repeats < 1 or warmup < 0:
        raise RecipeError(f"repeats={repeats}, warmup={warmup} time nothing. Try repeats=20, warmup=3.")
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        started = time.perf_counter_ns()
        fn()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return LatencyResult(statistics.median(times), min(times), max(times), repeats, warmup)


def peak_memory_bytes() -> int:
    """Largest resident memory this process ever had, in bytes.

    Linux: VmHWM, which starts anew at exec; ru_maxrss (KiB) would also report the peak of the process that started
    this one, so it is only the fallback. macOS: ru_maxrss, there in bytes. Windows: peak working set, through psutil.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    kib = _proc_status_kib("VmHWM")
    if kib is not None:
        return kib * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Resident memory of this process now, in bytes. Where neither /proc nor psutil tells, the peak so far."""
    kib = _proc_status_kib("VmRSS")
    if kib is not None:
        return kib * 1024
    try:
        import psutil
    except ImportError:
        return peak_memory_bytes()
    return int(psutil.Process().memory_info().rss)


def _proc_status_kib(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


class PeakMemory:
    """The largest resident memory during a `with` block, sampled every `interval` seconds by a thread.

    >>> with PeakMemory() as memory:
    ...     work = bytearray(1000)
    >>> memory.peak_bytes >= memory.start_bytes > 0
    True

    peak_bytes and grown_bytes (peak minus start) may be read inside the block as well. Spikes shorter than the
    interval can be missed; `peak_memory_bytes` misses none, but counts from the start of the process.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.start_bytes = 0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def grown_bytes(self) -> int:
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> "PeakMemory":
        self.start_bytes = self.peak_bytes = resident_memory_bytes()
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, name="lowbit-peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.peak_bytes = max(self.peak_bytes, resident_memory_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak_bytes = max(self.peak_bytes, resident_memory_bytes())


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files in a folder and below: what they hold, not the disk blocks they take.

    A link to a file counts as the file (model caches are made of them); links to folders are not followed.
    Raises DataError if there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder, so it has no size. Check the path.")
    return sum(os.stat(os.path.join(d, name)).st_size for d, _, names in os.walk(path) for name in names)
