"""The kernel layout of `linear_int8`: every kind of level table, few and many tokens, extremes, bias and steps."""

import numpy as np
import pytest
import torch

from lowbit.errors import KernelError
from lowbit.runtime import kernels, ops
from tests.kernels.reference import ROWS, Problem, pack, problem

EVERY = pytest.mark.parametrize("isa", ROWS)
# what the layout distinguishes: even grids of 1 to 4 bits, tables, bytes, levels of their own for each row
LEVELS = {
    "binary": [-1, 1],
    "one bit": [0, 1],
    "one bit, wide": [-100, 27],
    "ternary": [-1, 0, 1, 1],
    "2 bits": [-2, -1, 0, 1],
    "2 bits, table": [-2, -1, 1, 2],
    "3 bits": list(range(-4, 4)),
    "3 bits, powers of two": [-4, -2, -1, 0, 1, 2, 4, 4],
    "4 bits": list(range(16)),
    "4 bits, table": [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127],
    "5 bits": list(range(-16, 16)),
    "8 bits": list(range(-128, 128)),
}


def with_levels(levels: list[int], m: int, n: int, k: int, groups: int, zero: bool = True) -> Problem:
    bits = (len(levels) - 1).bit_length()
    p = problem(bits, m, n, k, groups, zero=zero)
    p.levels = torch.tensor([levels], dtype=torch.int8)
    return p


def run(p: Problem, isa: str) -> np.ndarray:
    return kernels.linear_int8(p.x, p.packed(), len(p.raw), isa=isa).numpy()


def exact(p: Problem) -> np.ndarray:
    """x is whole, with 127 in each segment: nothing is rounded."""
    return p.x.numpy().astype(np.float64) @ p.weight(p.levels).T


@pytest.mark.parametrize("name", LEVELS)
def test_rows_agree_for_every_kind_and_number_of_tokens(name: str) -> None:
    """1 to 4 tokens have kernels of their own, 12 and more expand the codes first; 16 rows are a block, 64 a panel, and
    scales stand behind the unit (two segments) that ends their group."""
    for m, n, k, groups in (
        (1, 130, 64, 1),
        (1, 112, 160, 5),
        (1, 96, 288, 3),
        (2, 80, 96, 3),
        (1, 17, 70, 2),
        (2, 16, 96, 1),
        (3, 33, 48, 3),
        (4, 15, 250, 5),
        (7, 34, 32, 2),
    ):
        p = with_levels(LEVELS[name], m, n, k, groups, zero=bool(m % 2))
        want = run(p, "scalar")
        for isa in ROWS:
            assert np.array_equal(run(p, isa), want), (isa, m, n, k)
    for m in (11, 12, 17):
        p = with_levels(LEVELS[name], m, 99, 96, 3)
        want = run(p, "scalar")
        for isa in ROWS:
            assert np.array_equal(run(p, isa), want), (isa, m)


@EVERY
@pytest.mark.parametrize("name", LEVELS)
def test_extremes_do_not_saturate(isa: str, name: str) -> None:
    """The largest and the smallest level against activations of 127 and one sign: every sum at its bound."""
    levels = LEVELS[name]
    for group in (16, 32, 128):
        for code in (0, len(levels) - 1):
            for m in (1, 3, 13):
                p = with_levels(levels, m, 18, 128, 128 // group, zero=False)
                p.raw = np.full_like(p.raw, code)
                p.raw[:, ::7] = len(levels) - 1 - code  # both occur: the layout only counts levels that do
                p.raw[3] = code
                p.codes = torch.from_numpy(pack(p.raw, p.bits))
                p.scale = torch.ones_like(p.scale)
                for x in (np.full(128, 127), np.full(128, -127), np.where(np.arange(128) % 2, 127, -127)):
                    p.x = torch.from_numpy(np.broadcast_to(x, (m, 128)).astype(np.float32).copy())
                    assert np.array_equal(run(p, isa), exact(p)), (group, code, m)


@EVERY
def test_steps_and_bias(isa: str) -> None:
    """y = sum * step + bias; scales that float16 cannot hold keep their float32."""
    for tables, m in ((1, 1), (1, 13), (21, 2)):
        p = problem(4, m, 21, 64, 2, tables, zero=False)
        p.x = torch.from_numpy(np.full((m, 64), 127.0, np.float32))
        for scale in (0.5, 1 + 2.0**-20):
            p.scale.fill_(scale)
            step = torch.arange(1, tables + 1).float() / 4
            packed = kernels.pack_int8(p.codes, p.levels, p.scale, p.zero, step, 4, 64)
            bias = torch.arange(21).float()
            y = kernels.linear_int8(p.x, packed, 21, bias, isa).numpy()
            want = exact(p) * step.numpy() + bias.numpy()
            assert np.allclose(y, want, rtol=1e-6, atol=0), (tables, m, scale)


def test_codes_keep_their_width_and_scales_their_value() -> None:
    """Bytes for one row of 1024 weights (64 rows fill a panel), float16 scales where they are exact."""
    sizes = {}
    for name, levels in LEVELS.items():
        p = with_levels(levels, 1, 64, 1024, 8, zero=False)
        p.scale = p.scale.half().float()
        sizes[name] = (p.packed().numel() - 256 - 256) / 64
        p.scale += 2.0**-20
        assert (p.packed().numel() - 256 - 256) / 64 == sizes[name] + 16
    bits = {name: (size - 16) / 128 for name, size in sizes.items()}
    assert list(bits.values()) == [1, 1, 8, 2, 2, 2, 3, 3, 4, 4, 8, 8], bits


def test_levels_of_common_formats_need_no_zero() -> None:
    """A base folded into the zero costs precision: symmetric tables must not get one."""
    for levels in (
        [-1.0, 1.0],
        [-1.0, 0.0, 1.0],
        [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 6.0],
        [-0.7, 0.7],
    ):
        of = ops.int8_levels(torch.tensor([levels]))
        assert not of.base.any() and of.error < 1e-7, levels


def test_what_is_no_packed_matrix_is_refused() -> None:
    p = problem(4, 1, 6, 32, 2)
    good = p.packed()
    for bad in (good[:-64].clone(), good[:100].clone(), torch.cat([good, good]), torch.zeros_like(good)):
        with pytest.raises(KernelError, match="packed matrix"):
            kernels.linear_int8(p.x, bad, 6)
    with pytest.raises(KernelError, match="y has shape"):
        kernels.linear_int8(p.x, good, 5)
    with pytest.raises(KernelError, match="columns"):
        kernels.linear_int8(p.x[:, :31].contiguous(), good, 6)
    with pytest.raises(KernelError, match="bias"):
        kernels.linear_int8(p.x, good, 6, torch.zeros(5))
