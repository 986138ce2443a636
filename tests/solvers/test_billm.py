"""BiLLM: orders of binarization, exact cases, and honest bits."""

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format, QuantizedTensor
from lowbit.solvers.billm import binary, residual_binary, salient_columns, solve, split_binary
from lowbit.statistics import LayerStatistics, output_error


def rebuilt(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return found[0].gather(1, found[1].long())


def problem(out: int = 48, in_: int = 128) -> tuple[torch.Tensor, LayerStatistics]:
    x = torch.randn(400, in_) @ (torch.eye(in_) + 0.3 * torch.randn(in_, in_) / in_**0.5)
    return torch.randn(out, in_), LayerStatistics(x.T @ x / len(x), x.abs().mean(0), len(x))


def test_the_errors_of_one_group_two_groups_and_order_two_fall_in_that_order():
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    errors = [float((rebuilt(f(w)) - w).square().mean()) for f in (binary, split_binary, residual_binary)]
    assert errors[0] == pytest.approx(1 - 2 / torch.pi, rel=0.03)  # of a normal distribution
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[0]


def test_one_group_is_the_closed_form_and_two_values_are_exact():
    w = torch.tensor([[1.0, 3.0, 3.0, 1.0], [-2.0, -2.0, 5.0, 5.0]])
    assert torch.equal(rebuilt(binary(w)), w)
    x = torch.randn(5, 40)
    levels, codes = binary(x)
    mu = x.mean(1, keepdim=True)
    assert torch.allclose(levels.mean(1, keepdim=True), mu, atol=1e-6)
    assert torch.allclose(levels.diff(dim=1) / 2, (x - mu).abs().mean(1, keepdim=True), atol=1e-6)
    assert torch.equal(codes.bool(), x >= mu)


def test_salient_columns_are_those_of_large_weights():
    torch.manual_seed(1)
    w = torch.randn(64, 128)
    w[:, [3, 70]] *= 20
    mask = salient_columns(w, torch.ones(128))
    assert mask[[3, 70]].all() and 2 <= mask.sum() <= 49
    small = salient_columns(w, torch.where(torch.arange(128) == 70, 1e4, 1.0))  # U_jj large: the column costs little
    assert small[3] and not (small[70] and small.sum() == 1)


def test_honest_bits_are_three_at_the_published_block():
    w, stats = problem(64, 256)
    solution = solve(w, stats, Format.parse("kmeans2-g128"))
    qt = solution.quantized()
    assert qt.bits_per_weight == pytest.approx(2 + 64 / 128 * 2 + 1 / 64)  # two tables a row and block, a bit a column
    again = QuantizedTensor.from_tensors(qt.meta(), qt.tensors())
    assert torch.equal(again.dequantize(), solution.w_hat())
    assert torch.equal(solution.rows(3, 9).w_hat(), solution.w_hat()[3:9])


def test_error_feedback_between_blocks_helps():
    torch.manual_seed(3)
    w, stats = problem()
    flat = LayerStatistics(torch.eye(128), torch.ones(128), 400)
    fmt = Format.parse("kmeans2-g32")
    fed, plain = (output_error(w, solve(w, s, fmt).w_hat(), stats.gram) for s in (stats, flat))
    assert fed < plain
    once = torch.cat(
        [
            split_binary(w[:, i : i + 32])[0].gather(1, split_binary(w[:, i : i + 32])[1].long())
            for i in range(0, 128, 32)
        ],
        1,
    )
    assert fed < output_error(w, once, stats.gram)


def test_other_formats_are_refused():
    with pytest.raises(FormatError, match="kmeans2-g128"):
        solve(*problem(), Format.parse("uint2-g64"))
