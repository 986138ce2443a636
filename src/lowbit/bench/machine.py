"""What the machine can do at most, the two lines of the roofline: bytes copied a second, int8 products added up.

time of a product >= max(bytes read / bandwidth, products / integer peak)
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.bench.timing import medians, threads
from lowbit.runtime import kernels

COPY_BYTES = 128 << 20
DEFAULT_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    threads: int
    isa: str  # of the integer products
    copy_gbytes_per_second: float  # bytes read plus bytes written, buffers larger than the caches
    int8_gmacs_per_second: float  # multiply-adds of the widest int8 instructions, from registers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_machine(count: int, seconds: float = 0.3) -> Machine:
    """Measured with `count` threads, in about 2 * seconds."""
    isa = kernels.isa_of("linear_int8")
    with threads(count):
        a, b = torch.ones(COPY_BYTES // 8), torch.ones(COPY_BYTES // 8)
        ms = medians({"copy": [lambda: a.copy_(b)], "peak": [lambda: kernels.int8_peak(PEAK_STEPS)]}, seconds)
        products = kernels.int8_peak(PEAK_STEPS)  # of this many threads
    copied = 2 * a.nbytes / ms["copy"] / 1e6
    return Machine(count, isa, copied, products / ms["peak"] / 1e6)


PEAK_STEPS = 200_000  # a few milliseconds


def cache_bytes() -> int:
    """The last-level cache a core sees, where Linux tells it; else 32 MiB."""
    sizes = [DEFAULT_CACHE // 1024] if not (found := _cache_sizes_kib()) else found
    return max(sizes) * 1024


def _cache_sizes_kib() -> list[int]:
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    try:
        words = [f.read_text("ascii").strip() for f in files]
    except OSError:
        return []
    units = {"K": 1, "M": 1024}
    return [int(w[:-1]) * units[w[-1]] for w in words if w[:-1].isdigit() and w[-1] in units]
