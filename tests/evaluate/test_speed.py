"""Times, memory and bytes have the right units."""

import os
import time

import pytest

from lowbit.errors import DataError, RecipeError
from lowbit.evaluate import PeakMemory, folder_bytes, latency, peak_memory_bytes, resident_memory_bytes

MIB = 1 << 20


def test_latency_is_in_milliseconds_and_warmup_is_not_timed():
    naps = iter([0.05] * 2 + [0.002] * 5)
    got = latency(lambda: time.sleep(next(naps)), repeats=5, warmup=2)
    assert 1.9 <= got.min_ms <= got.median_ms <= got.max_ms and got.median_ms < 40
    assert (got.repeats, got.warmup) == (5, 2)
    with pytest.raises(RecipeError, match="repeats=0"):
        latency(lambda: None, repeats=0)


def test_memory_is_in_bytes():
    now = resident_memory_bytes()
    assert 5 * MIB < now < 64 << 30
    assert peak_memory_bytes() >= 0.9 * now  # the kernel updates the two counters at slightly different moments


def test_peak_of_a_block_sees_what_was_freed_again():
    with PeakMemory(interval=0.002) as memory:
        work = bytearray(os.urandom(64)) * MIB  # 64 MiB, every page written
        time.sleep(0.05)
        del work
    assert 48 * MIB < memory.grown_bytes < 512 * MIB
    assert peak_memory_bytes() >= memory.peak_bytes - 8 * MIB


def test_folder_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"y" * 24)
    (tmp_path / "empty").touch()
    assert folder_bytes(tmp_path) == 1024
    assert folder_bytes(str(tmp_path / "a")) == 1000
    with pytest.raises(DataError, match="neither a file nor a folder"):
        folder_bytes(tmp_path / "missing")
