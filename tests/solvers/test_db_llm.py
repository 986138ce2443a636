"""DB-LLM: the start is rounding to -s, 0, s, 2 s; two numbers a group; learning the levels lowers the error."""

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format, QuantizedTensor, fit
from lowbit.solvers import find
from lowbit.solvers.db_llm import solve
from lowbit.statistics import LayerStatistics, output_error

DUAL = Format.parse("kmeans2-g32-dual")


def problem(out: int = 32, in_: int = 64) -> tuple[torch.Tensor, LayerStatistics]:
    x = torch.randn(400, in_) @ (torch.eye(in_) + 0.3 * torch.randn(in_, in_) / in_**0.5)
    return torch.randn(out, in_), LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def planes(w: torch.Tensor, a1: torch.Tensor, a2: torch.Tensor) -> torch.Tensor:
    """The card's assignment: the first plane by its own threshold, then the second for what is left."""
    w1 = (w - (a1 + a2) / 2 >= 0).float()
    w2 = (-(w - a1 * w1) + a2 / 2 >= 0).float()
    return a1 * w1 + a2 * w2


def test_at_the_start_the_planes_are_the_nearest_of_four_levels():
    w, _ = problem()
    found = solve(w, None, DUAL, learned=False).w_hat()
    s = (w.reshape(-1, 32).abs().amax(1, keepdim=True) / 2).half().float()
    expected = planes(w.reshape(-1, 32), 2 * s, -s).reshape(w.shape)
    assert (found == expected).float().mean() > 0.999  # fp16's 2 s may round apart
    step = found.reshape(-1, 32) / s
    assert torch.allclose(step, step.round(), atol=2e-3) and step.min() >= -1.01 and step.max() <= 2.01


def test_bits_are_two_and_two_numbers_a_group_and_the_file_says_it_all():
    w, stats = problem()
    solution = solve(w, stats, DUAL)
    qt = solution.quantized()
    assert qt.bits_per_weight == 2 + 32 / 32
    again = QuantizedTensor.from_tensors(qt.meta(), qt.tensors())
    assert torch.equal(again.dequantize(), solution.w_hat())
    levels = again.grid().table
    a1, a2 = levels[:, -1], levels[:, 0]
    assert (a1 > 0).all() and (a2 < 0).all()
    middle = torch.stack([torch.zeros_like(a1), a1 + a2], 1).sort(1).values
    assert torch.equal(levels[:, 1:3], middle)


def test_learning_the_levels_lowers_the_error_on_weights_and_on_outputs():
    torch.manual_seed(0)
    w, stats = problem()
    fixed, moved = (solve(w, None, DUAL, learned=x).w_hat() for x in (False, True))
    assert (moved - w).square().mean() < 0.8 * (fixed - w).square().mean()
    errors = [output_error(w, q, stats.gram) for q in (fixed, moved, solve(w, stats, DUAL).w_hat())]
    assert errors[2] < 0.8 * errors[1] < errors[0]
    plain = find("gptq").solve(w, stats, DUAL, refit=False, sweeps=0)
    refitted = find("gptq").solve(w, stats, DUAL, refit=True, sweeps=0)
    a, b = (output_error(w, s.w_hat(), stats.gram) for s in (plain, refitted))
    assert b < a


def test_planted_planes_are_found():
    b = torch.rand(2, 40, 32) < 0.5
    b[:, :, 0], b[0, :, 1], b[1, :, 1] = True, True, False
    a1, a2 = torch.full((40, 1), 1.5), torch.full((40, 1), -0.625)
    w = a1 * b[0] + a2 * b[1]
    grid = fit(w, Format.parse("kmeans2-g32-dual"))
    assert torch.allclose(grid.table, torch.tensor([-0.625, 0, 0.875, 1.5]).expand(40, 4), atol=1e-3)


def test_formats_are_checked():
    with pytest.raises(FormatError, match="two binary planes"):
        solve(*problem(), Format.parse("uint2-g32"))
    with pytest.raises(FormatError, match="four levels"):
        Format.parse("kmeans3-g32-dual")
