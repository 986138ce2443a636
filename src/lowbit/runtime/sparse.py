"""Exceptions as the kernels want them: y + x @ S.T for a sparse S, beside the dense product of a packed layer.

    S = w_hat - (dense part) at the places of the further parts, 0 elsewhere

Made once when a layer is prepared: places by row (start, column, value), and the same in steps of sixteen rows for one
to seven tokens and in tiles for more (csrc/sparse.h). In memory, not in the file, 5% of exceptions take 5.8 bits a
weight for int8 activations and 9.1 for float ones.

With int8 activations the values of a row are whole multiples of a factor, at most 127 of them: exact where they are so
by themselves, as for levels times one scale, else off by at most 1/254 of the row's largest. Activations are rounded
to 15 bits there.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit.runtime import kernels

_MOST = 127
_MANY = 8  # tokens from which they stand side by side
_FEW = range(1, 16)  # multiples that are tried before 127: two levels, four, ... of one scale


class Sparse(NamedTuple):
    """start (N+1,) int64, column (n,) int32 rising in each row, value (n,) float32; steps: the kernel's layout."""

    start: Tensor
    column: Tensor
    value: Tensor
    steps: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self)

    @property
    def coded(self) -> bool:
        """Does every row have so few different values that they are kept as codes too?"""
        return bool(self.steps[56:64].numpy().view(np.int64)[0])

    def read_bytes(self, tokens: int) -> int:
        """Bytes of it that a product of so many tokens reads: steps of few tokens, or tiles of many (csrc/sparse.h)."""
        _, _, n, k, steps, integer, quads, coded = self.steps[:64].numpy().view(np.int64).tolist()
        slot = 2 if integer else 5  # an offset and a value
        if tokens < _MANY:
            return steps * (100 if coded else 4 + 16 * (4 if integer else 1) * slot)
        return 4 * quads * slot + 16 * 8 * -(-n // 64) * -(-k // 128)


def sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int], integer: bool = False) -> Sparse:
    """From places in row-major order. integer: for int8 activations. Raises KernelError on places outside the shape."""
    start = torch.searchsorted(row.contiguous(), torch.arange(shape[0] + 1, device=row.device))
    factor = torch.empty(0, dtype=torch.float32)
    if integer:
        factor = row_factors(row, value, shape[0])
        each = factor[row].clamp(min=1e-38)
        value = (value / each).round() * each
    column = column.to(torch.int32).contiguous()
    arrays = (start, column, value.float().contiguous(), factor)
    steps = kernels._call(kernels._extension().pack_sparse, *arrays, max(shape[1], 1), integer)
    return Sparse(*arrays[:3], torch.from_numpy(np.frombuffer(bytearray(steps), dtype=np.uint8)))


def row_factors(row: Tensor, value: Tensor, rows: int) -> Tensor:
    """(rows,) float32: each row's largest value over the smallest whole number that makes all its values whole."""
    most = torch.zeros(rows, dtype=torch.float32).scatter_reduce_(0, row, value.abs().float(), "amax")
    chosen = most / _MOST
    found = torch.zeros(rows, dtype=torch.bool)
    for n in _FEW:
        times = value / (most[row] / n).clamp(min=1e-38)
        off = torch.zeros(rows).scatter_reduce_(0, row, (times - times.round()).abs().float(), "amax")
        exact = (off < 1e-5) & ~found
        chosen[exact], found = most[exact] / n, found | exact
    return chosen


def sparse_linear(x: Tensor, y: Tensor, s: Sparse, isa: "str | None" = None) -> None:
    """y (M, N) += x (M, K) @ S.T, in place; float32, contiguous, on the CPU."""
    kernels._call(kernels._extension().sparse_linear, x, *s, y, kernels._threads(), isa or checked_isa())


def rows() -> list[dict[str, Any]]:
    """As `kernels.rows`, of the exceptions."""
    active = kernels.isa_of("sparse_linear")
    table = [(isa, supported) for op, isa, supported in kernels._extension().table() if op == "sparse_linear"]
    return [
        {
            "op": "sparse_linear", "format": "exceptions", "isa": isa, "active": isa == active,
            "selfcheck": ("ok" if _agrees(isa) else "failed") if supported else "not supported",
        }
        for isa, supported in table
    ]  # fmt: skip


def checked_isa() -> str:
    """Name of the rows that run, those of the exceptions checked too."""
    isa = kernels.active_isa()
    if not _agrees(isa):
        raise kernels.KernelError(
            f"kernel row sparse_linear/{isa} computes wrong results on this machine and is refused. "
            "Set LOWBIT_ISA=scalar to go on without it."
        )
    return isa


@cache
def _agrees(isa: str) -> bool:
    """Does a row give what the scalar row gives: integers exactly, floats within the bound, few tokens and many?"""
    random = np.random.default_rng(0)
    n, k = 37, 300
    row, column = np.nonzero(random.random((n, k)) < 0.1)
    value = random.standard_normal(len(row), dtype=np.float32)
    for integer, v in ((False, value), (True, value), (True, np.sign(value))):  # the signs are kept as codes too
        s = sparse(torch.from_numpy(row), torch.from_numpy(column), torch.from_numpy(v), (n, k), integer)
        for tokens in (1, 9):
            x = torch.from_numpy(random.standard_normal((tokens, k), dtype=np.float32))
            y = [np.zeros((tokens, n), np.float32) for _ in range(2)]
            for out, which in zip(y, (isa, "scalar")):
                sparse_linear(x, torch.from_numpy(out), s, which)
            size = np.abs(x.numpy()) @ np.abs(np.bincount(row * k + column, v, n * k)).reshape(n, k).T
            if not (np.abs(y[0] - y[1]) <= (0 if integer and tokens == 1 else 66 * 2**-24) * size).all():
                return False
    return True
