"""The compiled loops against the Python loops they stand for."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from lowbit.formats import Format
from lowbit.solvers import _columns, _descent, gptq
from lowbit.solvers._columns import GridHooks, solve_columns
from lowbit.statistics import LayerStatistics, drift_target, output_error
from tests.solvers.test_columns import problem

FORMATS = [
    "uint3-g8-search",
    "uint4-g8-zreal",
    "int4-g8",
    "nf4-g8",
    "ternary-g8",
    "pot4-g8",
    "fp4_e2m1-g8",
    "uint2-channel",
]


def both_ways(run):
    """What the compiled loop and the Python loop give."""
    assert _columns.knows(Format.parse("int4-g8")), "the extension is not built"
    native = run()
    with patch.object(_columns, "knows", lambda fmt: False):
        return native, run()


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_column_loop(fmt: str, rows: int) -> None:
    w, gram = problem(rows, 72)

    def run():
        hooks = GridHooks(Format.parse(fmt), *w.shape, static=True)
        loop = solve_columns(w, gram, hooks, act_order=True, block=32)
        return hooks.result_codes(), loop.loss

    (codes, loss), (expected, expected_loss) = both_ways(run)
    assert (codes != expected).float().mean() < 0.01  # sums in another order may tip a tie
    assert loss == pytest.approx(expected_loss, rel=1e-2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_sweep(fmt: str) -> None:
    w, gram = problem(70, 72)

    def run():
        hooks = GridHooks(Format.parse(fmt), *w.shape, static=True)
        solve_columns(w, gram, hooks, act_order=True)
        q = gptq.Solution(hooks.result_codes(), hooks.grid, hooks.format).w_hat()
        _descent.descend(w, q, gram, hooks, damping=0.01, block=32)
        return hooks.result_codes()

    codes, expected = both_ways(run)
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("fmt", FORMATS)
def test_sweeps_never_raise_the_damped_error(fmt: str) -> None:
    w, gram = problem(40, 72)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(72)
    statistics = LayerStatistics(gram, torch.ones(72), 200)
    found = [gptq.solve(w, statistics, Format.parse(fmt), damping=0.1, sweeps=n) for n in range(4)]
    errors = [output_error(w, s.w_hat(), damped) for s in found]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
    assert errors[3] < errors[0]


def drifted(tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerStatistics]:
    g = torch.Generator().manual_seed(1)
    x_float = torch.randn(tokens, 24, generator=g) @ (torch.eye(24) + torch.randn(24, 24, generator=g) / 3)
    x = x_float @ (torch.eye(24) * 0.9) + 0.1 * torch.randn(tokens, 24, generator=g)
    statistics = LayerStatistics(x.T @ x / tokens, x.abs().mean(0), tokens, (x_float - x).T @ x / tokens)
    return torch.randn(6, 24, generator=g), x, x_float, statistics


def test_the_moved_target_differs_from_the_float_outputs_by_a_constant() -> None:
    w, x, x_float, statistics = drifted()
    target = drift_target(w, statistics, damping=0.0)
    differences = []
    for seed in range(3):
        q = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
        aimed = (x_float @ w.T - x @ q.T).square().sum() / len(x)
        differences.append(float(aimed) - output_error(target, q, statistics.gram))
    assert differences == pytest.approx([differences[0]] * 3, rel=1e-3)
    assert differences[0] > 0


def test_following_the_float_model_brings_the_outputs_nearer_to_its_own() -> None:
    w, x, x_float, statistics = drifted()
    fmt = Format.parse("uint4-g8-search")
    errors = [
        float((x_float @ w.T - x @ gptq.solve(w, statistics, fmt, drift=drift).w_hat().T).square().sum())
        for drift in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_without_drift_the_target_is_the_weight() -> None:
    w, gram = problem()
    assert drift_target(w, LayerStatistics(gram, torch.ones(24), 200)) is w
    still = LayerStatistics(gram, torch.ones(24), 200, torch.zeros(24, 24))
    assert torch.equal(drift_target(w, still), w)
