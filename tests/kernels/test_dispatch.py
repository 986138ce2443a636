"""Which row runs: the best one, the forced one, or a refusal that says what to type."""

import multiprocessing

import numpy as np
import pytest
import torch

from lowbit.errors import KernelError
from lowbit.runtime import kernels
from tests.kernels.reference import ROWS, problem


def test_scalar_is_always_there_and_last() -> None:
    for op in {op for op, _, _ in kernels._extension().table()}:
        rows = [row for row in kernels._extension().table() if row[0] == op]
        assert rows[-1][1] == "scalar" and rows[-1][2]


@pytest.mark.parametrize("isa", ROWS)
def test_the_forced_row_is_the_active_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", isa)
    assert kernels.active_isa() == isa
    table = kernels.rows()
    assert {row["isa"] for row in table if row["active"] and row["op"] in ("linear_float", "linear_int8")} == {isa}
    best = kernels.ISAS.index(isa)  # an operation without such a row takes its next one
    assert all(kernels.ISAS.index(row["isa"]) >= best for row in table if row["active"])
    assert {(row["op"], row["format"]) for row in table if row["active"]} >= {
        (o, f) for o in kernels.OPS for f in kernels.FAMILIES
    }
    assert {row["selfcheck"] for row in table} <= {"ok", "not supported"}
    p, used = problem(4, 1, 3, 8), []
    monkeypatch.setattr(kernels, "_call", lambda fn, *args: used.append(args[-1]))
    kernels.linear_float(*p.float_args)
    assert used == [isa]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "scalar,avx2"])
def test_an_unknown_row_says_what_to_type(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", isa)
    with pytest.raises(
        KernelError, match=rf"LOWBIT_ISA={isa} is unknown or not supported.*unset it, or type .*LOWBIT_ISA=scalar"
    ):
        kernels.active_isa()


def test_an_empty_variable_means_the_best_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", "")
    assert kernels.active_isa() == ROWS[0]


@pytest.mark.parametrize(
    ("op", "isa"),
    [
        (op, isa)
        for op in kernels.OPS
        for name, isa, supported in kernels._extension().table()
        if supported and name == kernels._TABLE_OF.get(op, op)
    ],
)
def test_the_self_check_refuses_a_wrong_row(op: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant one wrong number in one operation of one row, for 6-bit codes: the check must find it and name it."""
    run = kernels._run

    def wrong(name: str, p: kernels._Problem, row: str) -> np.ndarray:
        y = run(name, p, row)
        if name == op and row == isa and p.bits == 6:
            y.reshape(-1)[-1] += 1e-3 * np.abs(y).max() + 1e-3
        return y

    monkeypatch.setenv("LOWBIT_ISA", isa)
    monkeypatch.setattr(kernels, "_run", wrong)
    kernels._agrees.cache_clear()
    kernels._checked_isa.cache_clear()
    try:
        with pytest.raises(KernelError, match=f"{op}/table256/{isa}.*refused"):
            kernels.active_isa()
        with pytest.raises(KernelError):
            kernels.linear_float(*problem(4, 1, 3, 8).float_args)
        failed = [(r["op"], r["format"], r["isa"]) for r in kernels.rows() if r["selfcheck"] == "failed"]
        assert (op, "table256", isa) in failed
    finally:
        kernels._agrees.cache_clear()
        kernels._checked_isa.cache_clear()


def test_a_missing_extension_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lowbit._kernels", None)
    monkeypatch.delattr("lowbit._kernels", raising=False)
    kernels._extension.cache_clear()
    try:
        with pytest.raises(KernelError, match="pip install"):
            kernels._extension()
    finally:
        kernels._extension.cache_clear()


def _child(queue: "multiprocessing.Queue") -> None:
    torch.set_num_threads(2)
    p = problem(4, 64, 96, 192, 3)
    queue.put(kernels.linear_float(*p.float_args).sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_thread_pool_survives_a_fork() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    want = (
        kernels.linear_float(*problem(4, 64, 96, 192, 3).float_args).sum().item()
    )  # the parent's pool has workers now
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=30) == want
    finally:
        child.join(5)
        child.kill()
