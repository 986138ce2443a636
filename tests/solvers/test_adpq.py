"""AdpQ: the LASSO's survivors, its empty case, an interior optimum; and the column loop after it."""

import pytest
import torch

from lowbit.formats import Format, quantize
from lowbit.solvers import find
from lowbit.solvers.adpq import lasso_lambda, separate, shrunk, solve, survives
from lowbit.statistics import LayerStatistics, output_error


def weights(out: int = 64, in_: int = 256) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((out, in_))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
def test_survivors_of_the_lasso_are_the_weights_above_the_root_of_lambda(alpha):
    w = weights()
    lam = lasso_lambda(w, alpha)
    mask = survives(w, lam)
    assert torch.equal(mask, w.abs() > lam**0.5)
    apart = (w.abs() - lam**0.5).abs() > 1e-5  # at the threshold itself rounding decides
    assert torch.equal((shrunk(w, lam) != 0)[apart], mask[apart])
    assert int(mask.sum()) == round(alpha * w.numel())


def test_the_closed_form_minimises_the_lasso():
    w, lam = torch.tensor([0.5, -1.5, 3.0]), 1.0
    best = shrunk(w, lam)

    def loss(x):
        return (x - w) ** 2 / 2 + lam * x.abs() / w.abs()

    for nudge in (-0.01, 0.01):
        assert (loss(best + nudge) > loss(best)).all()
    assert shrunk(torch.zeros(2), lam).tolist() == [0, 0]


def test_none_survives_is_plain_rounding_and_all_is_the_other_format():
    w, fmt = weights(), Format.parse("uint3-g64")
    assert torch.equal(solve(w, None, fmt, alpha=0.0).w_hat(), find("rtn").solve(w, None, fmt).w_hat())
    everything = solve(w, None, fmt, alpha=1.0).w_hat()
    assert torch.equal(everything, quantize(w, Format.parse("uint8-channel")).dequantize())


def test_separation_never_widens_the_step_of_the_core():
    w, fmt = weights(), Format.parse("uint3-g64-fp32")
    steps = [separate(w, fmt, alpha, 8).grid.scale for alpha in (0.0, 0.02, 0.05)]
    assert (steps[1] <= steps[0]).all() and (steps[2] <= steps[1]).all()


def test_error_against_total_bits_has_an_interior_optimum():
    torch.manual_seed(0)
    w, fmt = weights(64, 1024), Format.parse("uint3-g128")
    cost = []
    for alpha in (0.0, 0.01, 0.03, 0.05, 0.2):
        solution = solve(w, None, fmt, alpha=alpha)
        error = float((solution.w_hat() - w).square().mean())
        cost.append(error * 4 ** solution.quantized().bits_per_weight)  # a bit more is worth a quarter of the error
    assert 0 < cost.index(min(cost)) < 4


def test_precalibration_feeds_the_error_of_the_same_split_forward():
    torch.manual_seed(1)
    w = weights(32, 64)
    x = torch.randn(400, 64) @ (torch.eye(64) + 0.3 * torch.randn(64, 64) / 8)
    stats, fmt = LayerStatistics(x.T @ x / 400, x.abs().mean(0), 400), Format.parse("uint2-g64-search")
    mask = separate(w, fmt, 0.05, 8).mask
    found = find("precalibration").solve(w, stats, fmt)
    assert torch.equal(found.exceptions[0].mask, mask)
    errors = [output_error(w, s.w_hat(), stats.gram) for s in (found, solve(w, None, fmt))]
    assert errors[0] < 0.9 * errors[1]
    gptq = find("gptq").solve(w, stats, fmt, act_order=True)
    assert errors[0] < output_error(w, gptq.w_hat(), stats.gram)  # heavy tails: it pays to take them out
