"""Memory for kernel layouts: large chunks on huge pages, filled front to back.

A product reads its weights once, in order, at the speed of memory. With pages of 4 KB each needs an address translation
of its own; with pages of 2 MB one core reads a fifth to a half more bytes a second (docs/kernels.md). So layouts lie
one behind the other in chunks that ask the kernel for huge pages, which also puts a model's layers in their order of
use. A chunk goes when the last layout in it goes. Where there are no huge pages to ask for, memory comes from torch.
"""

import mmap
import threading

import torch
from torch import Tensor

CHUNK = 32 << 20
HUGE = 2 << 20
ALIGN = 256

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)  # what is left of the newest chunk


def empty_bytes(size: int) -> Tensor:
    """1-D uint8 of this many bytes, uninitialized."""
    global _free
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    if size > CHUNK // 4:
        return _chunk(size)[:size]
    with _lock:
        if len(_free) < size:
            _free = _chunk(CHUNK)
        out, _free = _free[:size], _free[-(-size // ALIGN) * ALIGN :]
    return out


def _chunk(size: int) -> Tensor:
    """Zeroed pages nobody has touched, starting on a huge page: they cost nothing until they are written."""
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE :]
