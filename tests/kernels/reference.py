"""The kernels' definition in plain numpy float64, and random problems of any shape for the tests to loop over."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.runtime import kernels

_TABLE = [(op, isa) for op, isa, supported in kernels._extension().table() if supported]
ROWS = [isa for isa in kernels.ISAS if isa in {row for _, row in _TABLE}]  # of any operation, best first


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(N, K) codes to the little-endian bit stream, bit by bit; each row starts on a byte."""
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(len(codes), codes.shape[1] * bits).astype(np.uint8), axis=1, bitorder="little")


@dataclass
class Problem:
    x: Tensor
    codes: Tensor
    table: Tensor
    levels: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    raw: np.ndarray

    @property
    def float_args(self) -> tuple:
        return self.x, self.codes, self.table, self.scale, self.zero, self.bits

    def packed(self) -> Tensor:
        """The kernel layout of `levels`, with steps of 1."""
        step = torch.ones(len(self.levels))
        return kernels.pack_int8(self.codes, self.levels, self.scale, self.zero, step, self.bits, self.raw.shape[1])

    def weight(self, table: "Tensor | None" = None) -> np.ndarray:
        """w_hat in float64 from float32 steps, as the kernels define it: (level - zero), then * scale."""
        n, k = self.raw.shape
        table = (self.table if table is None else table).numpy().astype(np.float32)
        level = np.take_along_axis(np.broadcast_to(table, (n, table.shape[1])), self.raw, 1)
        group = k // self.scale.shape[1]
        zero = np.repeat(self.zero.numpy(), group, 1) if self.zero.numel() else np.float32(0)
        return ((level - zero) * np.repeat(self.scale.numpy(), group, 1)).astype(np.float64)


def problem(
    bits: int, m: int, n: int, k: int, groups: int = 1, tables: int = 1, zero: bool = True, seed: int = 0
) -> Problem:
    random = np.random.default_rng(seed)
    raw = random.integers(0, 2**bits, (n, k))
    levels = torch.from_numpy(random.integers(-128, 128, (tables, 2**bits), dtype=np.int8))
    floats = [
        torch.from_numpy(random.standard_normal(s, dtype=np.float32))
        for s in ((tables, 2**bits), (n, groups), (n, groups), (m, k))
    ]
    table, scale, zeros, x = floats
    return Problem(
        x, torch.from_numpy(pack(raw, bits)), table, levels, scale, zeros if zero else torch.empty(0, 0), bits, raw
    )


def float_bound(p: Problem) -> np.ndarray:
    """The stated bound of `linear_float` against exact arithmetic, per output."""
    return (p.x.shape[1] / 8 + 12) * 2**-24 * (np.abs(p.x.numpy().astype(np.float64)) @ np.abs(p.weight()).T) + 1e-30
