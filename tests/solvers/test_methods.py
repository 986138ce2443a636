"""RTN, HQQ and AWQ against their cards' checks."""

import numpy as np
import pytest
import torch

from lowbit.errors import FormatError, RecipeError
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
        bits = spec.bits if spec.widths else 4
        assert spec.default_format(bits, 64).blocks.cols == 64
        assert spec.default_format(bits, -1).blocks.cols == -1
        assert spec.default_format(spec.bits, spec.group)
        if spec.widths:
            with pytest.raises(FormatError, match="leave --bits out"):
                spec.default_format(8, 64)
        assert spec.solve.__doc__, name


def test_unknown_method_names_the_near_ones():
    with pytest.raises(RecipeError, match="'gptq'"):
        find("gtpq")


def test_methods_that_need_data_say_so():
    for name, spec in table().items():
        if spec.needs_data:
            with pytest.raises(RecipeError, match="--data"):
                find(name).solve(torch.randn(4, 8), None, spec.default_format(spec.bits, 8))


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


def slow_hqq(w, bits, p, beta, kappa, iterations):
    """(scale, zero, mean error of every iterate) of one group in float64; zeros as fp16 keeps them."""
    top = 2**bits - 1
    scale = float(np.float16(np.float32(w.max() - w.min()) / top))
    zeros, errors = [float(np.float16(-w.min() / scale))], []
    for _ in range(iterations + 1):
        codes = np.clip(np.round(w / scale + zeros[-1]), 0, top)
        d = w - (codes - zeros[-1]) * scale
        errors.append(np.abs(d).mean())
        with np.errstate(divide="ignore"):
            kept = np.sign(d) * np.maximum(np.abs(d) - np.abs(d) ** (p - 1) / beta, 0)
        zeros.append(float(np.float16(np.mean(codes - (w - kept) / scale))))
        beta *= kappa
    return scale, zeros[:-1], errors


@pytest.mark.parametrize(("p", "beta", "kappa"), [(0.7, 10.0, 1.01), (0.5, 3.0, 2.0), (1.0, 10.0, 1.01)])
def test_hqq_equals_the_slow_iteration_and_keeps_the_best(p, beta, kappa):
    fmt, stopped_early = Format.parse("uint2-g64-zreal-minmax"), 0
    for row in heavy_tailed(12).numpy():
        scale, zeros, errors = slow_hqq(row.astype(float), 2, p, beta, kappa, 20)
        last = next((i for i in range(1, 21) if errors[i] >= errors[i - 1]), 21) - 1
        stopped_early += last < 20
        found = find("hqq").solve(torch.from_numpy(row)[None], None, fmt, p=p, beta=beta, kappa=kappa)
        assert float(found.grid.scale) == scale
        assert float(found.grid.zero) == pytest.approx(zeros[last], abs=2e-3)
        assert errors[last] == min(errors[: last + 2])
    assert stopped_early > 3  # so keeping the best is not the same as keeping the last


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


WEIGHTS = {
    "one row": lambda: torch.randn(1, 32),
    "one column": lambda: torch.randn(8, 1),
    "one weight": lambda: torch.randn(1, 1),
    "zeros": lambda: torch.zeros(4, 32),
    "a constant": lambda: torch.full((4, 32), 0.3),
    "all negative": lambda: -torch.rand(4, 32) - 5,
    "an outlier": lambda: torch.randn(4, 32).index_fill(1, torch.tensor(5), 3e4),
}
INPUTS = {
    "always zero": lambda x: x * 0,
    "one direction": lambda x: x[:1].expand(5, -1),
    "all channels alike": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "huge": lambda x: x * 1e8,
    "tiny": lambda x: x * 1e-12,
    "some channels dead": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
}


QUICK = ("zeros", "one row", "one column", "an outlier")


@pytest.mark.parametrize("weights", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WEIGHTS])
@pytest.mark.parametrize("name", sorted(table()))
def test_no_weights_and_no_inputs_break_a_method(name, weights):
    """The answer is finite; of the method that minimises the output error, it is no worse than no weights at all."""
    for inputs in INPUTS:
        torch.manual_seed(0)
        assert problem(name, WEIGHTS[weights](), INPUTS[inputs]) is None, inputs


def problem(name, w, inputs):
    stats, spec = statistics(inputs(torch.randn(100, w.shape[1]))), find(name)
    fmt = spec.default_format(spec.bits if spec.widths else 4, 16 if w.shape[1] > 1 else -1)
    w_hat = spec.solve(w, stats, fmt).quantized().dequantize()
    if not torch.isfinite(w_hat).all():
        return "weights that are no numbers"
    bound = 1.001 * output_error(w, torch.zeros_like(w), stats.gram)
    if name == "gptq" and output_error(w, w_hat, stats.gram) > bound:
        return "worse than no weights"
    if spec.smooth is not None:
        t = spec.smooth([w], stats, fmt)
        if not (torch.isfinite(t).all() and (t > 0).all() and torch.isfinite(stats.rescaled(t).gram).all()):
            return "factors that are no positive numbers"
    return None


def test_awq_channel_scale_by_hand():
    a = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(channel_scale(a, 0.5), torch.tensor([0.5, 1.0, 2.0]))  # largest * smallest = 1
    assert torch.allclose(channel_scale(a, 1.0), torch.tensor([0.25, 1.0, 4.0]))
    assert torch.isfinite(channel_scale(torch.tensor([0.0, 1.0]), 0.95)).all()  # a dead channel


def test_awq_takes_the_best_of_twenty_exponents_on_the_outputs():
    torch.manual_seed(2)
    x = torch.randn(300, 32) @ torch.randn(32, 32) * torch.logspace(-1, 1, 32)
    fmt, stats = Format.parse("uint3-g16"), statistics(x)
    best = set()
    for scale in (0.3, 1.0, 3.0):
        w = torch.randn(8, 32) * torch.logspace(0, -scale, 32)
        losses = []
        for i in range(20):
            t = channel_scale(stats.abs_mean, i / 20)
            w_hat = find("rtn").solve(w * t, None, fmt).w_hat() / t
            losses.append(float(((x @ (w_hat - w).T).double() ** 2).sum()))
        best.add(losses.index(min(losses)))
        assert torch.allclose(
            smooth([w[:3], w[3:]], stats, fmt), channel_scale(stats.abs_mean, min(best, key=lambda i: losses[i]) / 20)
        )
    assert len(best) > 1 and max(best) > 5, best  # the search had something to find


def test_awq_with_equal_channels_is_plain_rounding():
    stats = LayerStatistics(torch.eye(16), torch.ones(16), 100)
    assert torch.equal(smooth([torch.randn(8, 16)], stats, Format.parse("uint4-g16")), torch.ones(16))
    assert torch.allclose(channel_scale(torch.full((16,), 3.0), 0.5), torch.ones(16))


def test_awq_clips_each_group_to_the_best_of_ten_ranges():
    torch.manual_seed(3)
    x, w, fmt = torch.randn(200, 32), heavy_tailed(6, 32), Format.parse("uint2-g16")
    w[:, ::16] *= 8
    found = find("awq").solve(w, statistics(x), fmt).w_hat()
    chosen = []
    for r in range(6):
        for at in (slice(0, 16), slice(16, 32)):
            group, losses, rounded = w[r : r + 1, at], [], []
            for i in range(10):
                c = group.abs().max() * (1 - i / 20)
                rounded.append(decode(encode(group, grid := fit(group.clamp(-c, c), fmt), fmt), grid, fmt))
                losses.append(float(((x[:, at] @ (rounded[-1] - group).T) ** 2).sum()))
            chosen.append(losses.index(min(losses)))
            assert torch.equal(found[r : r + 1, at], rounded[chosen[-1]])
    assert len(set(chosen)) > 3 and max(chosen) == 9, chosen  # the search had something to find


def test_awq_clip_never_raises_the_groups_errors():
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    w, stats, fmt = heavy_tailed(16, 64), statistics(x), Format.parse("uint2-g32")
    diagonal_blocks = torch.block_diag(stats.gram[:32, :32], stats.gram[32:, 32:])
    with_clip, without = (find("awq").solve(w, stats, fmt, clip=c).w_hat() for c in (True, False))
    assert output_error(w, with_clip, diagonal_blocks) < output_error(w, without, diagonal_blocks)
