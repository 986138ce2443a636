"""ICQuant: the index costs what theory says, the second grid what was counted, and gamma = 0 nothing at all."""

import math

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format, QuantizedTensor, encode_mask, quantize
from lowbit.solvers import find
from lowbit.solvers.icquant import outliers, solve, tails
from lowbit.statistics import LayerStatistics, output_error


def heavy(rows: int = 32, cols: int = 128) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((rows, cols))


def statistics(cols: int = 128) -> LayerStatistics:
    x = torch.randn(400, cols) @ (torch.eye(cols) + 0.3 * torch.randn(cols, cols) / cols**0.5)
    return LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


@pytest.mark.parametrize(("gamma", "bits", "known"), [(0.05, 6, 0.313), (0.0825, 5, 0.447)])
def test_the_index_of_uniform_places_stays_under_the_bound(gamma, bits, known):
    m, cols = 2**bits - 1, 4096
    bound = gamma * bits * (1 + 1 / (math.exp(gamma * m) - 1))
    assert bound == pytest.approx(known, abs=5e-4)
    mask = outliers(torch.randn(256, cols), gamma)
    meta, _ = encode_mask(mask, "gap", bits)
    found = meta["codes"] * bits / mask.numel()
    assert 0.98 * bound < found <= bound


def test_as_many_outliers_as_asked_ties_broken_by_place():
    w = torch.tensor([[1.0, -1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert outliers(w, 0.5).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert outliers(w, 0.0).sum() == 0 and outliers(w, 1.0).all()


@pytest.mark.parametrize("text", ["kmeans2-channel", "uint2-channel", "kmeans3-g64-shared", "uint3-g64-search"])
def test_gamma_zero_is_the_base_quantizer(text):
    w, fmt = heavy(), Format.parse(text)
    found = solve(w, None, fmt, gamma=0.0)
    assert not found.exceptions
    assert torch.equal(found.quantized().dequantize(), quantize(w, fmt).dequantize())


@pytest.mark.parametrize("text", ["kmeans2-channel", "kmeans2-channel-shared", "uint2-channel", "uint3-g64"])
@pytest.mark.parametrize("feedback", [False, True])
def test_bits_are_codes_index_and_grids(text, feedback):
    w, fmt = heavy(), Format.parse(text)
    qt = solve(w, statistics(), fmt, feedback=feedback).quantized()
    again = QuantizedTensor.from_tensors(qt.meta(), qt.tensors())
    assert torch.equal(again.dequantize(), qt.dequantize())
    mask_bytes = sum(t.numel() for k, t in qt.tensors().items() if "mask" in k)
    shared = fmt.scale_rule == "shared"
    levels, rows = 2**fmt.levels.bits, len(w)
    outlier_grid = 2 * (levels + rows) if shared else 2 * levels * rows
    assert qt.nbytes == quantize(w, fmt).nbytes + mask_bytes + outlier_grid
    assert qt.meta()["parts"][1]["codes"] == "dense"


def test_nearest_levels_and_tails_by_hand():
    w = torch.tensor([[-8.0, -6.0, -0.5, 0.0, 0.2, 0.5, 6.0, 10.0]])
    qt = solve(w, None, Format.parse("uint2-channel-fp32"), gamma=0.5).quantized()
    assert qt.grid(1).table.tolist() == [[-8.0, -6.0, 6.0, 10.0]]
    assert torch.equal(qt.dequantize()[qt.mask(1)], w[qt.mask(1)])
    assert float(qt.grid().scale) == pytest.approx(1 / 3)  # the inliers' range alone
    one_side = tails(w.abs(), outliers(w, 0.5), 2)
    assert one_side.table.tolist() == [[6.0, 6.0, 10.0, 10.0]]
    assert tails(w, torch.zeros_like(w).bool(), 1).table.tolist() == [[0.0, 0.0]]


def test_outliers_halve_the_range_and_the_error_at_equal_total_bits():
    torch.manual_seed(0)
    w = torch.where(torch.rand(64, 1024) < 0.05, torch.randn(64, 1024) * 2, torch.randn(64, 1024) * 0.5)
    ic = solve(w, None, Format.parse("uint2-channel"))
    rtn = quantize(w, Format.parse("uint2-g32"))
    assert ic.quantized().bits_per_weight < rtn.bits_per_weight
    assert (ic.w_hat() - w).square().mean() < 0.85 * (rtn.dequantize() - w).square().mean()


def test_feedback_and_closed_form_levels_each_lower_the_output_error():
    torch.manual_seed(1)
    w, stats, fmt = heavy(), statistics(), Format.parse("kmeans2-channel")
    errors = [
        output_error(w, solve(w, stats, fmt, feedback=f, refit=r).w_hat(), stats.gram)
        for f, r in ((False, False), (True, False), (True, True))
    ]
    assert errors[2] < errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.75 * output_error(
        w, find("gptq").solve(w, stats, Format.parse("uint2-g32")).w_hat(), stats.gram
    )


def test_rows_of_a_stacked_solution_are_the_rows():
    w, stats = heavy(), statistics()
    whole = solve(w, stats, Format.parse("kmeans2-channel-shared"))
    joined = [whole.rows(0, 10).quantized().dequantize(), whole.rows(10, 32).quantized().dequantize()]
    assert torch.equal(torch.cat(joined), whole.quantized().dequantize())


def test_fisher_weights_the_levels_where_it_is_known():
    w, stats = heavy(), statistics()
    fisher = torch.zeros_like(w)
    fisher[:, :8] = 1
    weighted = LayerStatistics(stats.gram, stats.abs_mean, 400, fisher=fisher)
    plain, found = (solve(w, s, Format.parse("kmeans2-channel"), feedback=False).w_hat() for s in (stats, weighted))
    assert (found - w)[:, :8].square().sum() < 0.3 * (plain - w)[:, :8].square().sum()


def test_formats_without_all_codes_are_refused():
    for text in ("ternary-channel", "int2-tile2x64"):
        with pytest.raises(FormatError, match="icquant needs"):
            solve(heavy(), None, Format.parse(text))


@pytest.mark.parametrize("lift", [64, 3])  # at 3 many a weight strays into the other table, and blocks are done again
def test_the_compiled_loop_finds_what_the_python_loop_finds(lift, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr("lowbit.solvers._native.LIFT", lift)
    w, stats, fmt = heavy(), statistics(), Format.parse("kmeans2-g64-shared")
    fast = solve(w, stats, fmt)
    monkeypatch.setattr("lowbit.solvers._split.extension", lambda: None)
    slow = solve(w, stats, fmt)
    assert (fast.codes == slow.codes).float().mean() > 0.98  # a tie may fall apart, and columns after it
    a, b = (output_error(w, s.w_hat(), stats.gram) for s in (fast, slow))
    assert a == pytest.approx(b, rel=0.02)
