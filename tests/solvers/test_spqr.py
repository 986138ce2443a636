"""SpQR: GPTQ without outliers, the card's bits, and leave-one-out errors."""

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format, QuantizedTensor, decode, encode, fit
from lowbit.formats.stores import bilevel_values, load_bilevel, store_bilevel
from lowbit.solvers import find
from lowbit.solvers.spqr import solve, without_outliers
from lowbit.statistics import LayerStatistics, output_error


def problem(out: int = 32, in_: int = 64) -> tuple[torch.Tensor, LayerStatistics]:
    x = torch.randn(400, in_) @ (torch.eye(in_) + 0.3 * torch.randn(in_, in_) / in_**0.5)
    return torch.randn(out, in_), LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def test_without_outliers_it_is_gptq_with_real_zeros():
    w, stats = problem()
    fmt = Format.parse("uint3-g16-zreal")
    found = solve(w, stats, fmt, tau=float("inf"), damping=0.01)
    plain = {"damping": 0.01, "act_order": False, "static_groups": False, "weighted": False, "refit": False}
    gptq = find("gptq").solve(w, stats, fmt, **{**find("gptq").options, **plain})
    assert not found.exceptions
    assert torch.equal(found.codes, gptq.codes) and torch.equal(found.w_hat(), gptq.w_hat())


def test_bits_equal_the_cards_formula():
    w, stats = problem(64, 256)
    qt = solve(w, stats, Format.parse("uint3-g16-zreal-q3x16"), tau=float("inf")).quantized()
    assert qt.bits_per_weight == 3.625
    w[::7, ::50] *= 10
    solution = solve(w, stats, Format.parse("uint3-g16-zreal-q3x16"), tau=0.2)
    qt, rate = solution.quantized(), solution.notes["outliers"]
    assert rate > 0.005
    csr_pointers = 32 * (64 + 1) / w.numel()
    assert qt.bits_per_weight <= 3.625 + 32 * rate + csr_pointers  # gap codes are cheaper than CSR here
    assert qt.bits_per_weight > 3.625 + 16 * rate
    assert torch.equal(QuantizedTensor.from_tensors(qt.meta(), qt.tensors()).dequantize(), qt.dequantize())


def test_leaving_the_extreme_weight_out_never_raises_the_error_of_the_others():
    torch.manual_seed(0)
    w, u, fmt = torch.randn(200, 16), torch.rand(16) + 0.5, Format.parse("uint3-g16-zreal-fp32")
    w[:, 5] *= 8
    grid = fit(w, fmt)
    whole = ((decode(encode(w, grid, fmt), grid, fmt) - w) / u).square()
    rest = w.clone()
    rest[:, 5] = (w.sum(1) - w[:, 5]) / 15
    grid = fit(rest, fmt)
    left = ((decode(encode(rest, grid, fmt), grid, fmt) - rest) / u).square()
    left[:, 5] = 0
    extreme = w.abs().argmax(1) == 5
    assert (left.sum(1) <= whole.sum(1))[extreme].float().mean() > 0.95
    threshold = float((whole.sum(1) - left.sum(1))[extreme].median())
    likely = (without_outliers(w, u, threshold, fmt) != w)[extreme]
    assert 0.4 < likely[:, 5].float().mean() < 0.6  # half of them gain more than the median


def test_planted_outliers_are_kept_and_the_error_approaches_that_without_them():
    torch.manual_seed(2)
    w, stats = problem(64, 128)
    planted = torch.rand(w.shape) < 0.005
    w = torch.where(planted, w.sign() * (w.abs() + 1) * 10, w)
    solution = solve(w, stats, Format.parse("uint3-g16-zreal-q3x16"))
    mask = solution.exceptions[0].mask
    assert mask[planted].float().mean() > 0.95
    clean = solve(w * ~planted, stats, Format.parse("uint3-g16-zreal-q3x16"), tau=float("inf"))
    error = output_error(w, solution.w_hat(), stats.gram)
    assert error < 1.3 * output_error(w * ~planted, clean.w_hat(), stats.gram)


def test_scales_of_sixteen_rows_share_their_range():
    x = torch.rand(37, 5) + 0.1
    tensors = store_bilevel(x, "scale")
    assert tensors["scale_step"].shape == (3, 5) and tensors["scale"].numel() == -(-37 * 5 * 3 // 8)
    found = load_bilevel(tensors, "scale", (37, 5))
    assert torch.equal(found, bilevel_values(x))
    again = store_bilevel(found, "scale")
    assert all(torch.equal(t, again[k]) for k, t in tensors.items())
    for i in range(0, 37, 16):
        span = x[i : i + 16].amax(0) - x[i : i + 16].amin(0)
        assert ((found - x)[i : i + 16].abs() <= span / 14 + 1e-3).all()


def test_formats_are_checked():
    w, stats = problem()
    with pytest.raises(FormatError, match="real zero"):
        solve(w, stats, Format.parse("uint3-g16"))
    with pytest.raises(FormatError, match="--method spqr"):
        find("rtn").solve(w, None, Format.parse("uint3-g16-zreal-q3x16"))
    with pytest.raises(FormatError, match="real zeros"):
        Format.parse("uint3-g16-q3x16")
