"""Bit-plane products: every row of the table against torch's float64 convolution, exactly."""

import ctypes
import mmap
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import KernelError, ShapeError
from lowbit.runtime import binary_kernels as bk
from lowbit.runtime import kernels

ROWS = [isa for op, isa, supported in kernels._extension().binary_table() if op == "binary_dot" and supported]
EVERY = pytest.mark.parametrize("isa", ROWS)
KINDS = pytest.mark.parametrize("kind", bk.KINDS)

# B, C, H, W, N, kh, kw, groups, stride, padding, dilation, pad: nothing, one, odd, kernel larger than the image,
# words and vectors just full and just over, depthwise
CASES = [
    (0, 5, 4, 4, 3, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0),
    (2, 5, 4, 4, 0, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0),
    (1, 1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 0),
    (2, 3, 1, 1, 5, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0),
    (1, 31, 7, 7, 17, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), -1),
    (1, 32, 9, 8, 16, 3, 3, 1, (2, 2), (1, 1, 1, 1), (1, 1), 0),
    (2, 33, 5, 12, 65, 2, 4, 1, (1, 2), (0, 1, 3, 2), (2, 1), 1),
    (1, 64, 10, 11, 64, 3, 3, 1, (1, 1), (2, 2, 2, 2), (2, 2), 0),
    (1, 70, 6, 6, 48, 5, 1, 2, (1, 1), (2, 2, 0, 0), (1, 1), 0),
    (1, 12, 5, 5, 12, 3, 3, 12, (1, 1), (1, 1, 1, 1), (1, 1), 0),
    (3, 257, 1, 1, 130, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 0),
    (1, 8, 3, 70, 4, 3, 3, 1, (3, 3), (4, 4, 4, 4), (3, 3), 0),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:  # the problems are too small for two, in torch's reference above all
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """A random problem, its exact answer, and the call."""

    def __init__(self, kind: str, case: tuple, seed: int = 0) -> None:
        b, c, h, w, n, kh, kw, self.groups, stride, padding, dilation, pad = case
        random = np.random.default_rng(seed)
        self.inputs, weights = kind.split("_")
        self.levels = torch.from_numpy(random.integers(-1, 2, (n, c // self.groups, kh, kw)))
        if weights == "binary":
            self.levels = torch.where(self.levels >= 0, 1, -1)
        elif self.levels.numel():
            self.levels.view(-1)[0] = 0  # else a small one may be binary
        self.x = torch.from_numpy(random.standard_normal((b, c, h, w), dtype=np.float32))
        self.high = torch.from_numpy(random.standard_normal(c, dtype=np.float32)) * 0.2 + 0.2
        self.low = self.high - 0.6 if self.inputs == "ternary" else None
        self.geometry = bk.Geometry(stride, padding, dilation, pad if self.inputs == "sign" else 0)

    def input_levels(self) -> Tensor:
        up = self.x >= self.high.reshape(-1, 1, 1)
        if self.inputs == "sign":
            return torch.where(up, 1.0, -1.0).double()
        return up.double() - (0 if self.low is None else (self.x <= self.low.reshape(-1, 1, 1)).double())

    def dot(self) -> Tensor:
        top, bottom, left, right = self.geometry.padding
        a = F.pad(self.input_levels(), (left, right, top, bottom), value=float(self.geometry.pad))
        n, _, kh, kw = self.levels.shape
        if not len(a) or not n:
            return a.new_empty(len(a), n, *self.geometry.out_size(*self.x.shape[2:], (kh, kw)))
        return F.conv2d(a, self.levels.double(), None, self.geometry.stride, 0, self.geometry.dilation, self.groups)

    def weight(self, isa: str) -> bk.BinaryWeight:
        return bk.weight(self.levels, self.inputs, self.groups, isa)

    def run(self, isa: str, x: "Tensor | None" = None, w: "bk.BinaryWeight | None" = None) -> Tensor:
        then = bk.Epilogue(torch.ones(len(self.levels)))
        y, _ = bk.conv2d(
            self.x if x is None else x, w or self.weight(isa), self.geometry, then, self.high, self.low, isa=isa
        )
        assert y is not None
        return y


@EVERY
@KINDS
def test_any_shape(isa: str, kind: str) -> None:
    for seed, case in enumerate(CASES):
        c = Case(kind, case, seed)
        assert torch.equal(c.run(isa).double(), c.dot()), case
        channels_last = c.x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(c.run(isa, channels_last).double(), c.dot()), case
        strided = torch.stack([c.x, c.x + 1], -1)[..., 0]  # neither: every second number
        assert torch.equal(c.run(isa, strided).double(), c.dot()), case
        bits = bk.binarize(c.x, c.high, c.low, c.groups, isa)
        assert torch.equal(c.run(isa, bits).double(), c.dot()), case


@EVERY
@KINDS
def test_every_number_of_channels_and_outputs(isa: str, kind: str) -> None:
    for n in (*range(1, 20), 31, 32, 33, 35, 47, 48, 49, 63, 64, 65, 66, 67, 79, 80, 81, 82, 83, 95, 96, 97):
        case = (1, n, 1, 3, 99 - n, 1, 2, 1, (1, 1), (0, 0, 1, 0), (1, 1), 0)
        c = Case(kind, case, n)
        assert torch.equal(c.run(isa).double(), c.dot()), n


@EVERY
@KINDS
def test_long_sums_at_their_extremes_do_not_overflow(isa: str, kind: str) -> None:
    """Every product +1, or every product -1: 8-bit counts hold 15 words, 16-bit counts 65280 levels."""
    inputs, weights = kind.split("_")
    for k, sign in ((480, -1), (481, 1), (65_280, -1), (65_313, 1), (140_000, -1)):
        c = Case(kind, (3, k, 1, 1, 5, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 0))
        c.x = torch.ones_like(c.x)
        c.high = torch.zeros_like(c.high)
        c.low = None if c.low is None else c.high - 1
        c.levels = torch.full_like(c.levels, sign)
        if weights == "ternary" and inputs != "ternary":
            c.levels[0, 0] = 0  # else it is binary
        w = c.weight(isa)
        assert bk.KINDS[w.kind] == kind
        want = c.levels.sum((1, 2, 3)).expand(3, 5)
        assert torch.equal(c.run(isa, w=w).reshape(3, 5).long(), want), k
        if inputs == "sign":  # inputs of -1
            assert torch.equal(c.run(isa, -c.x, w).reshape(3, 5).long(), -want), k


@EVERY
@pytest.mark.parametrize("layout_of", ROWS)
def test_a_weight_prepared_for_another_row_is_laid_out_again(isa: str, layout_of: str) -> None:
    for kind in bk.KINDS:
        c = Case(kind, CASES[8])
        assert torch.equal(c.run(isa, w=c.weight(layout_of)).double(), c.dot())


@EVERY
def test_signs_of_zero_ties_and_nan(isa: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("nan"), float("inf"), -float("inf"), 1.0]).reshape(1, 8, 1, 1)
    bits = bk.binarize(x, torch.zeros(8), isa=isa)
    assert bits.flatten().tolist() == [0b10100111]
    at = bk.binarize(
        torch.full((1, 3, 1, 1), 0.5), torch.tensor([0.5, 0.4999, 0.5001]), torch.tensor([0.5, 0.4, 0.6]), isa=isa
    )
    assert at.flatten().tolist() == [0b011, 0b101]


@EVERY
def test_what_follows_is_the_same_float_steps(isa: str) -> None:
    """scale, bias, residual, RPReLU and the next layer's bits, one float32 rounding each; with and without each."""
    for n in (1, 16, 33, 70):
        c = Case("sign_binary", (2, 40, 5, 6, n, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0), n)
        scale, bias, high = torch.randn(3, n).unbind()
        residual, prelu = torch.randn(2, n, 5, 6), torch.randn(3, n)
        for which in range(16):
            then = bk.Epilogue(
                scale, bias if which & 1 else None, residual if which & 2 else None, prelu if which & 4 else None,
                high if which & 8 else None,
            )  # fmt: skip
            y, bits = bk.conv2d(c.x, c.weight(isa), c.geometry, then, c.high, isa=isa)
            want = c.dot().float() * scale.reshape(-1, 1, 1)
            want = want + bias.reshape(-1, 1, 1) if which & 1 else want
            want = want + residual if which & 2 else want
            if which & 4:
                want = want - prelu[0].reshape(-1, 1, 1)
                want = torch.where(want > 0, want, want * prelu[1].reshape(-1, 1, 1)) + prelu[2].reshape(-1, 1, 1)
            assert y is not None and torch.equal(y, want)
            assert (bits is None) == (which < 8)
            if bits is not None:
                flags = (want >= high.reshape(-1, 1, 1)).permute(0, 2, 3, 1)
                assert torch.equal(bits.reshape(2, 5, 6, -1), bk.bits(flags))
                only_bits = bk.conv2d(c.x, c.weight(isa), c.geometry, then, c.high, want_y=False, isa=isa)
                assert only_bits[0] is None and torch.equal(only_bits[1], bits)


@EVERY
def test_results_do_not_depend_on_threads_or_on_the_other_images(isa: str) -> None:
    c = Case("sign_binary", (3, 128, 14, 14, 96, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0))
    if isa == "scalar":
        c = Case("sign_binary", (3, 40, 9, 9, 40, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0))
    one = c.run(isa)
    torch.set_num_threads(2)
    assert torch.equal(c.run(isa), one)
    assert torch.equal(c.run(isa, c.x[1:2])[0], one[1])


@EVERY
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_no_load_leaves_a_buffer(isa: str) -> None:
    """Every input ends where an unreadable page begins: one byte read too far ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep = []

    def at_the_edge(t: Tensor) -> Tensor:
        size = -(-max(t.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        room = mmap.mmap(-1, size + mmap.PAGESIZE)
        keep.append(room)
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        array = np.frombuffer(room, dtype=np.uint8, count=t.nbytes, offset=size - t.nbytes)
        return torch.from_numpy(array).view(t.dtype).view(t.shape).copy_(t)

    for kind in bk.KINDS:
        for case in (CASES[3], CASES[6], CASES[8], CASES[10]):
            c = Case(kind, case)
            want, w, bits = c.dot(), c.weight(isa), bk.binarize(c.x, c.high, c.low, c.groups, isa)
            tensors = {k: at_the_edge(getattr(w, k)) for k in ("rows", "fast", "base", "tap_sum")}
            w = w._replace(**tensors)
            c.x, c.high = at_the_edge(c.x), at_the_edge(c.high)
            c.low = None if c.low is None else at_the_edge(c.low)
            assert torch.equal(c.run(isa, w=w).double(), want)
            assert torch.equal(c.run(isa, at_the_edge(bits), w).double(), want)


@EVERY
def test_nothing_is_written_outside(isa: str) -> None:
    c = Case("sign_binary", (1, 40, 3, 3, 35, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0))
    plan = bk.Plan(c.weight(isa), c.geometry, bk.Epilogue(torch.ones(35)), c.high, isa=isa)
    size, words, next_high = 9 * 35, 9 * 2, torch.zeros(35)
    for offset in (1, 2, 3):
        y, bits = torch.full((size + 64,), 7.5), torch.full((words + 64,), 77, dtype=torch.int32)
        plan._plan.run(
            c.x.data_ptr(), (1, 3, 3, 3, 3), (40 * 9, 1, 9), 0, next_high.data_ptr(),
            y[offset:].data_ptr(), bits[offset:].data_ptr(), 1,
        )  # fmt: skip
        assert (y[:offset] == 7.5).all() and (y[offset + size :] == 7.5).all()
        assert (bits[:offset] == 77).all() and (bits[offset + words :] == 77).all()
        assert torch.equal(y[offset : offset + size].reshape(3, 3, 35).permute(2, 0, 1).double(), c.dot()[0])


@pytest.mark.parametrize("isa", ROWS)
@pytest.mark.parametrize("op", bk.OPS)
def test_the_self_check_refuses_a_wrong_row(op: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant one wrong number in one operation of one row: the check must find it and name it."""
    run = bk._run

    def wrong(name: str, kind: str, p: bk._Problem, row: str) -> np.ndarray:
        y = run(name, kind, p, row).copy()
        if name == op and row == isa and kind == "sign_ternary":
            y[-1] += 1
        return y

    monkeypatch.setenv("LOWBIT_ISA", isa)
    monkeypatch.setattr(bk, "_run", wrong)
    bk._agrees.cache_clear()
    bk._checked.cache_clear()
    try:
        with pytest.raises(KernelError, match=f"{op}/sign_ternary/{isa}.*refused"):
            bk.checked_isa()
        assert not bk._agrees(op, "sign_ternary", isa) and bk._agrees(op, "sign_binary", isa)
    finally:
        bk._agrees.cache_clear()
        bk._checked.cache_clear()


@EVERY
def test_the_forced_row_is_the_active_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", isa)
    assert bk.checked_isa() == isa
    assert {r["isa"] for r in bk.rows() if r["active"]} == {isa}
    assert {r["selfcheck"] for r in bk.rows()} <= {"ok", "not supported"}


def test_sizes_that_contradict_each_other_are_refused() -> None:
    c = Case("sign_binary", CASES[7])
    w, then = c.weight("scalar"), bk.Epilogue(torch.ones(64))
    broken = [
        (w._replace(rows=w.rows[:, :8].contiguous()), c.geometry, then, "kernel of 3 x 3"),
        (w._replace(rows=w.rows[..., :1].contiguous()), c.geometry, then, "weight has shape"),
        (w._replace(fast=w.fast[1:].contiguous()), c.geometry, then, "wrong size"),
        (w._replace(kind=9), c.geometry, then, "kind is 9"),
        (w._replace(layout=3), c.geometry, then, "layout is 3"),
        (w._replace(groups=3), c.geometry, then, "groups"),
        (w._replace(base=w.base[1:]), c.geometry, then, "base and scale"),
        (w._replace(tap_sum=w.tap_sum[1:]), c.geometry, then, "tap_sum"),
        (w, c.geometry._replace(pad=2), then, "pad is 2"),
        (w, c.geometry._replace(stride=(0, 1)), then, "impossible"),
        (w, c.geometry, bk.Epilogue(torch.ones(63)), "base and scale"),
        (w, c.geometry, then._replace(bias=torch.ones(65)), "bias has shape"),
        (w, c.geometry, then._replace(prelu=torch.ones(2, 64)), "prelu has shape"),
    ]
    for weight, geometry, epilogue, says in broken:
        with pytest.raises(KernelError, match=says):
            bk.Plan(weight, geometry, epilogue, c.high)
    plan = bk.Plan(w, c.geometry, then, c.high)
    for x, says in (
        (c.x[:, :63], "63 channels"),
        (c.x.double(), "no floats"),
        (torch.zeros(1, 2, 2, 1, 1, 3, dtype=torch.int32), "no bits"),
    ):
        with pytest.raises(KernelError, match=says):
            plan.run(x)
    with pytest.raises(KernelError, match="residual is"):
        plan.run(c.x, torch.zeros(1, 64, 3, 3))
    with pytest.raises(KernelError, match="next_high is"):
        plan.run(c.x, next_high=torch.zeros(63))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        bk.Plan(w, bk.Geometry(), then, c.high).run(c.x[:, :, :2])
    with pytest.raises(KernelError, match="thresholds"):
        bk.Plan(w, c.geometry, then).run(c.x)
    grouped = Case("sign_binary", CASES[8])
    with pytest.raises(KernelError, match="without groups"):
        bk.conv2d(
            grouped.x,
            grouped.weight("scalar"),
            grouped.geometry,
            bk.Epilogue(torch.ones(48), next_high=torch.ones(48)),
            grouped.high,
        )
    with pytest.raises(ShapeError, match="cannot be multiplied"):
        bk.weight(torch.ones(3, 4, 1, 1), groups=2)
    with pytest.raises(KernelError, match="is unknown"):
        bk.weight(torch.ones(3, 4), "signs")
