"""PoTPTQ: decoding by an integer add, and each step lowers its loss."""

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats import Format, Grid, decode, encode
from lowbit.solvers.potptq import first_scale, refined, solve
from lowbit.statistics import LayerStatistics, output_error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_is_an_integer_add_on_the_exponent(bits):
    fmt = Format.parse(f"pot{bits}nz-channel-fp32")
    scale = torch.rand(64, 1) + 2.0**-10
    codes = torch.arange(2**bits, dtype=torch.uint8).expand(64, -1)
    found = decode(codes, Grid(scale), fmt)
    half = 2 ** (bits - 1)
    exponent = torch.where(codes >= half, codes.int() - half, half - 1 - codes.int())
    sign = torch.where(codes >= half, 0, -(2**31)).int()
    by_add = (scale.view(torch.int32) + (exponent << 23)) ^ sign
    assert torch.equal(found.view(torch.int32), by_add)


@pytest.mark.slow
def test_steps_on_normal_weights_reach_the_known_errors():
    torch.manual_seed(0)
    w = torch.randn(500, 128)
    for bits, known in ((2, 0.1551), (3, 0.0394), (4, 0.0314)):
        fmt = Format.parse(f"pot{bits}nz-channel")
        grid = Grid(first_scale(w, fmt))
        error = float((decode(encode(w, grid, fmt), grid, fmt) - w).square().mean())
        assert error == pytest.approx(known, rel=0.02)
        seed = Grid(w.abs().amax(1, keepdim=True) / fmt.levels.values[-1])
        assert float((decode(encode(w, seed, fmt), seed, fmt) - w).square().mean()) > 1.1 * error


def test_each_step_lowers_the_output_error_and_orthonormal_inputs_leave_the_weights_error():
    torch.manual_seed(1)
    w, fmt = torch.randn(48, 128), Format.parse("pot3nz-g64")
    x = torch.randn(500, 128) @ (torch.eye(128) + 0.5 * torch.randn(128, 128) / 11)
    stats = LayerStatistics(x.T @ x / 500, x.abs().mean(0), 500)
    blocks = fmt.blocks.split(w)
    largest = Grid((blocks.abs().amax(1, keepdim=True) / 8).half().float())
    absmax = fmt.blocks.merge(decode(encode(blocks, largest, fmt), largest, fmt), *w.shape)
    errors = [
        output_error(w, q, stats.gram) for q in (absmax, solve(w, None, fmt).w_hat(), solve(w, stats, fmt).w_hat())
    ]
    assert errors[0] > errors[1] > 1.01 * errors[2]
    start = first_scale(blocks, fmt)
    moved = refined(w, start, fmt, torch.eye(128), 10, 5e-3, 0.0)
    loss = [((decode(encode(blocks, Grid(s), fmt), Grid(s), fmt) - blocks) ** 2).sum() for s in (start, moved)]
    assert loss[1] <= loss[0]


def test_zero_counts_as_positive_and_bits_are_counted():
    w = torch.randn(8, 128)
    w[0, 0] = 0
    solution = solve(w, None, Format.parse("pot2nz-g128"))
    assert solution.w_hat()[0, 0] > 0
    assert solution.quantized().bits_per_weight == 2.125
    with pytest.raises(FormatError, match="powers of two"):
        solve(w, None, Format.parse("int3-g64"))
