"""Memory for kernel layouts: disjoint, aligned, on huge pages where there are any, given back with the last user."""

import gc
import mmap
from pathlib import Path

import pytest

from lowbit.runtime import arena


def test_pieces_do_not_overlap_and_stand_in_order() -> None:
    pieces = [arena.empty_bytes(n) for n in (1, 300, 0, 4096, arena.CHUNK // 4, 70000)]
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert all(bool((piece == i).all()) for i, piece in enumerate(pieces))
    assert all(piece.data_ptr() % arena.ALIGN == 0 for piece in pieces if len(piece))
    a, b = arena.empty_bytes(1000), arena.empty_bytes(1000)
    assert b.data_ptr() - a.data_ptr() == 1024 or b.data_ptr() % arena.HUGE == 0  # a new chunk


def test_a_large_piece_starts_on_a_huge_page() -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("huge pages can be asked for on Linux only")
    piece = arena.empty_bytes(arena.CHUNK // 4 + 1)
    assert piece.data_ptr() % arena.HUGE == 0 and not piece.any()


def test_memory_goes_with_its_last_user() -> None:
    maps = Path("/proc/self/statm")
    if not maps.exists():
        pytest.skip("needs /proc")
    size = 256 << 20  # of addresses: nothing is written
    piece = arena.empty_bytes(size)
    view = piece[:5]
    del piece
    gc.collect()
    held = int(maps.read_text().split()[0])
    view.fill_(1)
    del view
    gc.collect()
    assert held - int(maps.read_text().split()[0]) >= size // mmap.PAGESIZE


def test_without_huge_pages_memory_comes_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert arena.empty_bytes(12).shape == (12,)
