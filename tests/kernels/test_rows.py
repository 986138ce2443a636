"""Every row of the kernel table against slow float64 numpy: all widths, odd shapes, extremes, threads, memory."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch

from lowbit.errors import KernelError
from lowbit.runtime import kernels
from tests.kernels.reference import ROWS, Problem, float_bound, problem

# (M, N, K, groups, tables): nothing, one, odd, ragged, groups not on vector or byte borders, long groups cut in blocks
SHAPES = [
    (0, 3, 8, 1, 1),
    (1, 0, 8, 1, 1),
    (1, 1, 1, 1, 1),
    (2, 3, 5, 5, 3),
    (3, 5, 33, 3, 1),
    (4, 7, 66, 66, 7),
    (5, 9, 70, 7, 1),
    (7, 13, 300, 2, 13),
    (9, 25, 96, 3, 1),
    (6, 26, 641, 1, 1),
    (2, 4, 1300, 4, 4),
]
EVERY = pytest.mark.parametrize("isa", ROWS)
WIDTHS = pytest.mark.parametrize("bits", range(1, 9))


def linear_float(p: Problem, isa: str) -> np.ndarray:
    return kernels.linear_float(*p.float_args, isa=isa).numpy()


def linear_int8(p: Problem, isa: str) -> np.ndarray:
    return kernels.linear_int8(p.x, p.packed(), len(p.raw), isa=isa).numpy()


def decode(p: Problem, isa: str, rows: "torch.Tensor | None" = None) -> np.ndarray:
    return kernels.decode(p.codes, p.table, p.scale, p.zero, p.bits, p.raw.shape[1], rows, isa).numpy()


def x_hat(p: Problem, isa: str) -> np.ndarray:
    """What linear_int8 multiplies, float64 (M, K), out of the padded segments."""
    groups, group = p.scale.shape[1], p.raw.shape[1] // p.scale.shape[1]
    count, length, padded, per_group = kernels._extension().segments(groups, group)
    q = kernels.quantize(p.x, groups, isa)
    x = q.q.numpy().reshape(-1, padded, length) * q.scale.numpy().astype(np.float64)[..., None]
    return x[:, :count].reshape(len(p.x), groups, per_group * length)[..., :group].reshape(p.x.shape)


@EVERY
@WIDTHS
def test_any_shape(isa: str, bits: int) -> None:
    for i, (m, n, k, groups, tables) in enumerate(SHAPES):
        p = problem(bits, m, n, k, groups, max(tables, 1), zero=i % 2 == 0, seed=i)
        w, x = p.weight(), p.x.numpy().astype(np.float64)
        assert np.array_equal(decode(p, isa), w), "decode is exact"
        assert np.all(np.abs(linear_float(p, isa) - x @ w.T) <= float_bound(p)), (m, n, k)
        exact = x_hat(p, isa) @ p.weight(p.levels).T
        size = np.abs(x_hat(p, isa)) @ (np.abs(p.weight(p.levels)) + 2 * np.abs(p.scale.numpy()).max(initial=0) * 130).T
        assert np.all(np.abs(linear_int8(p, isa) - exact) <= 1e-6 * size + 1e-30), (m, n, k)


@WIDTHS
def test_int8_rows_are_equal_bit_for_bit(bits: int) -> None:
    for i, (m, n, k, groups, tables) in enumerate(SHAPES):
        p = problem(bits, m, n, k, groups, max(tables, 1), zero=i % 2 == 1, seed=i)
        for isa in ROWS:
            assert np.array_equal(linear_int8(p, isa), linear_int8(p, "scalar")), (isa, m, n, k)


@EVERY
def test_every_length_up_to_four_vectors(isa: str) -> None:
    for k in range(1, 131):
        p = problem(3 if k % 2 else 4, 2, 3, k, seed=k)
        w = p.weight()
        assert np.array_equal(decode(p, isa), w)
        assert np.all(np.abs(linear_float(p, isa) - p.x.numpy().astype(np.float64) @ w.T) <= float_bound(p)), k
        assert np.array_equal(linear_int8(p, isa), linear_int8(p, "scalar")), k


@EVERY
@pytest.mark.parametrize("levels", [(-128, 127), (-127, 127), (-8, 7), (-1, 1), (0, 1), (-64, 65), (-65, 65), (7, 7)])
def test_extreme_levels_and_activations_do_not_saturate(isa: str, levels: tuple[int, int]) -> None:
    """All products at their largest and of one sign: a wrong form would saturate. Spans 129 and 130 are the border."""
    for k, groups in ((64, 1), (256, 1), (96, 3), (512, 2), (1000, 1)):
        p = problem(1, 3, 5, k, groups, zero=False)
        p.levels = torch.tensor([levels], dtype=torch.int8)
        p.scale = torch.ones_like(p.scale)
        for codes in (np.zeros_like(p.raw), np.ones_like(p.raw), p.raw):
            p.raw, p.codes = codes, torch.from_numpy(np.packbits(codes.astype(np.uint8), axis=1, bitorder="little"))
            for x in (np.ones(k), -np.ones(k), np.where(np.arange(k) % 2, 1, -1)):
                p.x = torch.from_numpy(np.broadcast_to(x * 127, (3, k)).astype(np.float32).copy())
                exact = p.x.numpy().astype(np.float64) @ p.weight(p.levels).T  # x is whole: scale 1, nothing rounded
                assert np.array_equal(linear_int8(p, isa), exact)


@EVERY
def test_activations_round_to_even_and_never_reach_minus_128(isa: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])
    q = kernels.quantize(x, 1, isa)
    assert q.q[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -127, 126] and q.scale[0, 0] == 1.0 and not q.q[0, 8:].any()
    hard = torch.tensor(
        [[3e38, -3e38], [1e-30, -1e-31], [1e-38, 1e-45], [0.0, -0.0], [float("inf"), 1.0], [1.0, float("nan")]]
    )
    q = kernels.quantize(hard, 1, isa)
    assert q.q[:, :2].tolist() == [[127, -127], [127, -13], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert not q.scale[2:4].any() and q.scale[4:, 0].isnan().all()


@EVERY
def test_non_finite_activations_stay_in_their_token(isa: str) -> None:
    p = problem(4, 3, 5, 96, 3)
    p.x[1, 40] = float("nan")
    for run in (linear_float, linear_int8):
        y = run(p, isa)
        assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@EVERY
def test_integer_tables_of_any_width(isa: str) -> None:
    """Consecutive levels have a path without a table."""
    for bits in range(1, 9):
        p = problem(bits, 3, 9, 100, 2)
        p.table = torch.arange(2**bits).float()[None] - 2 ** (bits - 1)
        p.levels = p.table.to(torch.int8)
        assert np.array_equal(decode(p, isa), p.weight())
        assert np.array_equal(linear_int8(p, isa), linear_int8(p, "scalar"))


@EVERY
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_memory_and_nothing_read_or_written_outside(isa: str, offset: int) -> None:
    """Buffers at odd addresses, between guards: codes that would change the answer, and outputs that must survive."""

    def shifted(t: torch.Tensor, fill: float) -> torch.Tensor:
        room = torch.full((t.numel() + 128,), fill, dtype=t.dtype)
        view = room[offset : offset + t.numel()].view(t.shape)
        return view.copy_(t)

    for bits, k in ((3, 45), (4, 64), (5, 70), (8, 33), (1, 9)):
        p = problem(bits, 3, 7, k)
        want = [linear_float(p, isa), linear_int8(p, isa), decode(p, isa)]
        p.x, p.codes, p.table = shifted(p.x, float("nan")), shifted(p.codes, 255), shifted(p.table, float("nan"))
        p.scale, p.zero, p.levels = shifted(p.scale, float("nan")), shifted(p.zero, float("nan")), shifted(p.levels, 99)
        for a, b in zip(want, [linear_float(p, isa), linear_int8(p, isa), decode(p, isa)]):
            assert np.array_equal(a, b)
        int8 = (p.x, shifted(p.packed(), 255), shifted(torch.zeros(7), float("nan")))
        for op, args in (("linear_float", p.float_args), ("linear_int8", int8)):
            room = torch.full((3 * 7 + 16,), 7.5)
            y = room[offset : offset + 3 * 7].view(3, 7)
            getattr(kernels._extension(), op)(*args, y, 1, isa)
            assert (room[:offset] == 7.5).all() and (room[offset + 3 * 7 :] == 7.5).all()
            assert np.array_equal(y.numpy(), want[op == "linear_int8"])
        room = torch.full((7 * k + 16,), 7.5)
        kernels._extension().decode(
            p.codes, p.table, p.scale, p.zero, bits, None, room[offset : offset + 7 * k].view(7, k), 1, isa
        )
        assert (room[:offset] == 7.5).all() and (room[offset + 7 * k :] == 7.5).all()


@EVERY
def test_results_do_not_depend_on_threads_or_on_the_other_tokens(isa: str) -> None:
    p = problem(4, 300 if isa != "scalar" else 20, 90, 192, 3)
    threads = torch.get_num_threads()
    for run in (linear_float, linear_int8):
        torch.set_num_threads(1)
        one = run(p, isa)
        torch.set_num_threads(2)
        assert np.array_equal(run(p, isa), one)
        torch.set_num_threads(threads)
        alone = Problem(p.x[11:12].contiguous(), p.codes, p.table, p.levels, p.scale, p.zero, p.bits, p.raw)
        assert np.array_equal(run(alone, isa)[0], one[11])


@EVERY
def test_rows_of_an_embedding(isa: str) -> None:
    p = problem(6, 1, 11, 37, 1)
    ids = torch.tensor([10, 0, 0, 5])
    assert np.array_equal(decode(p, isa, ids), p.weight()[ids])
    for bad in (11, -1, 2**40):
        with pytest.raises(IndexError, match=str(bad)):
            decode(p, isa, torch.tensor([0, bad]))


def _broken(**change: object) -> tuple:
    p = problem(4, 2, 6, 32, 2)
    args = dict(zip(("x", "codes", "table", "scale", "zero", "bits"), p.float_args))
    return tuple((args | change).values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 0}, "1 to 8"),
        ({"bits": 9}, "1 to 8"),
        ({"bits": 3}, "need"),
        ({"x": torch.zeros(2, 31)}, "groups|need"),
        ({"x": torch.zeros(2, 0)}, "K is 0"),
        ({"codes": torch.zeros(6, 15, dtype=torch.uint8)}, "need"),
        ({"scale": torch.zeros(5, 2)}, "scale has shape"),
        ({"scale": torch.zeros(6, 5)}, "divide"),
        ({"scale": torch.zeros(6, 0)}, "scale has shape"),
        ({"zero": torch.zeros(6, 1)}, "zero has shape"),
        ({"table": torch.zeros(2, 16)}, "table has shape"),
        ({"table": torch.zeros(1, 15)}, "table has shape"),
        ({"x": torch.zeros(2, 32, dtype=torch.float64)}, "contiguous CPU tensors"),
        ({"x": torch.zeros(32, 2).T}, "contiguous CPU tensors"),
        ({"codes": torch.zeros(6, 16, dtype=torch.int8)}, "contiguous CPU tensors"),
        ({"x": torch.zeros(32)}, "contiguous CPU tensors"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change: dict, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        kernels.linear_float(*_broken(**change))


def test_wrong_outputs_are_refused() -> None:
    p = problem(4, 2, 6, 32, 2)
    for shape in ((2, 5), (1, 6), (6, 2)):
        with pytest.raises(ValueError, match="y has shape"):
            kernels._extension().linear_float(*p.float_args, torch.zeros(shape), 1, "")


@EVERY
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_no_load_leaves_a_buffer(isa: str) -> None:
    """Every input ends where an unreadable page begins: one byte read too far ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep = []

    def at_the_edge(t: torch.Tensor) -> torch.Tensor:
        size = -(-max(t.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        room = mmap.mmap(-1, size + mmap.PAGESIZE)
        keep.append(room)
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        array = np.frombuffer(room, dtype=np.uint8, count=t.nbytes, offset=size - t.nbytes)
        return torch.from_numpy(array).view(t.dtype).view(t.shape).copy_(t)

    for bits in range(1, 9):
        for k, groups in ((1, 1), (37, 1), (64, 2), (129, 3), (300, 1)):
            p = problem(bits, 3, 5, k, groups)
            want = [linear_float(p, isa), linear_int8(p, isa), decode(p, isa)]
            for name in ("x", "codes", "table", "levels", "scale", "zero"):
                setattr(p, name, at_the_edge(getattr(p, name)))
            packed = at_the_edge(p.packed())
            int8 = kernels.linear_int8(p.x, packed, 5, isa=isa).numpy()
            for a, b in zip(want, [linear_float(p, isa), int8, decode(p, isa)]):
                assert np.array_equal(a, b)
