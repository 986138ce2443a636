"""RTN, HQQ and AWQ against their cards' checks."""

import pytest
import torch

from lowbit.errors import RecipeError
from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.solvers import find, table
from lowbit.solvers.awq import channel_scale, smooth
from lowbit.solvers.hqq import half_quadratic_step, shrink
from lowbit.statistics import LayerStatistics, output_error


def heavy_tailed(rows: int = 64, cols: int = 64) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((rows, cols))


def test_every_method_has_a_source_a_format_and_a_docstring():
    for name, spec in table().items():
        assert spec.source and spec.title
        assert spec.default_format(4, 64).blocks.cols == 64
        assert spec.default_format(4, -1).blocks.cols == -1
        assert spec.solve.__doc__, name


def test_unknown_method_names_the_near_ones():
    with pytest.raises(RecipeError, match="'gptq'"):
        find("gtpq")


def test_methods_that_need_data_say_so():
    for name in ("gptq", "awq"):
        with pytest.raises(RecipeError, match="--data"):
            find(name).solve(torch.randn(4, 8), None, Format.parse("uint4-g8"))


def test_searched_rtn_is_never_worse_in_its_own_norm():
    w, fmt = heavy_tailed(), Format.parse("uint3-g32")
    error = {
        s: (find("rtn").solve(w, None, fmt, search=s).w_hat() - w).abs().pow(2.4).reshape(-1, 32).sum(1)
        for s in (False, True)
    }
    assert (error[True] <= error[False] * (1 + 1e-5)).all()
    assert error[True].sum() < 0.9 * error[False].sum()


def test_hqq_beats_its_start_on_heavy_tails():
    w, fmt = heavy_tailed(), Format.parse("uint4-g64-zreal-minmax")
    start = find("rtn").solve(w, None, fmt).w_hat()
    found = find("hqq").solve(w, None, fmt).w_hat()
    assert (found - w).abs().mean() < 0.97 * (start - w).abs().mean()


def test_hqq_with_vanishing_beta_gives_the_least_squares_zero():
    w, fmt = heavy_tailed(8), Format.parse("uint3-g64-zreal-minmax")
    grid = fit(w, fmt)
    zero = half_quadratic_step(w, grid, fmt, p=0.7, beta=1e-9)
    codes = encode(w, grid, fmt).float()
    expected = codes.mean(1) - w.mean(1) / grid.scale[:, 0]
    assert torch.allclose(zero[:, 0], expected, atol=2e-3 * float(expected.abs().max()))
    for nudge in (-0.05, 0.05):
        nudged, best = (decode(codes.to(torch.uint8), Grid(grid.scale, zero + d), fmt) for d in (nudge, 0.0))
        assert ((nudged - w) ** 2).sum() > ((best - w) ** 2).sum()


def test_shrink_is_the_soft_threshold_at_p_one_and_zero_at_zero():
    d = torch.tensor([-3.0, -0.05, 0.0, 0.2, 1.0])
    assert torch.allclose(shrink(d, 1.0, 10.0), torch.tensor([-2.9, 0.0, 0.0, 0.1, 0.9]))
    assert shrink(torch.zeros(3), 0.7, 10.0).tolist() == [0, 0, 0]


def statistics(x: torch.Tensor) -> LayerStatistics:
    return LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def test_awq_recovers_most_of_the_error_of_salient_channels():
    torch.manual_seed(1)
    x = torch.randn(400, 128)
    x[:, ::64] *= 30  # one channel in 64
    w, stats, fmt = torch.randn(64, 128), statistics(x), Format.parse("uint3-g64")
    t = smooth([w], stats, fmt)
    rtn = find("rtn").solve(w, None, fmt).w_hat()
    awq = find("awq").solve(w * t, stats.rescaled(t), fmt).w_hat() / t
    assert output_error(w, awq, stats.gram) < 0.5 * output_error(w, rtn, stats.gram)


def test_awq_with_equal_channels_is_plain_rounding():
    stats = LayerStatistics(torch.eye(16), torch.ones(16), 100)
    assert torch.equal(smooth([torch.randn(8, 16)], stats, Format.parse("uint4-g16")), torch.ones(16))
    assert torch.allclose(channel_scale(torch.full((16,), 3.0), 0.5), torch.ones(16))


def test_awq_clip_never_raises_the_groups_errors():
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    w, stats, fmt = heavy_tailed(16, 64), statistics(x), Format.parse("uint2-g32")
    diagonal_blocks = torch.block_diag(stats.gram[:32, :32], stats.gram[32:, 32:])
    with_clip, without = (find("awq").solve(w, stats, fmt, clip=c).w_hat() for c in (True, False))
    assert output_error(w, with_clip, diagonal_blocks) < output_error(w, without, diagonal_blocks)
