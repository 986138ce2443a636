"""Scale rules against slow plain Python, and what they must keep: fixed points, bounds, odd blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, decode, encode, fit, levels, quantize
from lowbit.formats.scales import RULES, SHRINKS, threshold_codes

EVERY = [
    *(
        "int1",
        "int2-g8",
        "int4-g8",
        "int8",
        "uint1",
        "uint4-g8",
        "uint8",
        "uint3-zreal",
        "int3-zreal",
        "binary",
        "ternary",
    ),
    *(
        "binary-zreal",
        "ternary-zreal",
        "ternary-median",
        "ternary-tbt",
        "ternary-twn",
        "nf4-g8-fp32",
        "nf4-zreal",
        "pot3",
    ),
    *("pot4nz-g8", "pot2nz_s2-tensor", "fp4_e2m1-g8", "fp6_e3m2-bf16", "fp8_e4m3", "fp8_e5m2", "uint4-g8-search"),
    *("int3-g8-lstsq", "uint3-lstsq", "uint3-zreal-lstsq", "nf4-g8-search", "ternary-lstsq", "int4-g8-double"),
    *(
        "uint4-g8-double",
        "uint4-g8-zreal-double",
        "int4-g8-e8m0",
        "int4-tile2x8",
        "binary-tensor",
        "kmeans2",
        "kmeans3-tensor",
    ),
    *("int4-half_away", "fp4_e2m1-g32-e8m0-mx", "mxint8-g32-e8m0-mx", "fp8_e4m3-g32-e8m0-mx"),
]


def w_hat(text: str, w: Tensor, importance: "Tensor | None" = None) -> Tensor:
    return quantize(w, Format.parse(text), importance).dequantize()


def mse(text: str, w: Tensor) -> float:
    return float((w_hat(text, w) - w).square().mean())


# ---------------------------------------------------------------- reference


def half(x: float) -> float:
    """The fp16 value nearest to x."""
    return float(torch.tensor(x, dtype=torch.float64).half())


def slow_minmax(row: list[float], bits: int) -> tuple[float, int, list[int]]:
    """Card 1 of the post-training cards: integer zero, 0 inside the range, scale in fp16."""
    low, high, top = min(0.0, *row), max(0.0, *row), 2**bits - 1
    if low == high:
        low, high = -1.0, 1.0
    scale = half((high - low) / top)
    zero = max(0, min(top, round(-low / scale)))
    return scale, zero, [max(0, min(top, round(v / scale) + zero)) for v in row]


def slow_absmax(row: list[float], values: tuple[float, ...]) -> tuple[float, list[int]]:
    scale = half(max(abs(v) for v in row) / min(-values[0], values[-1]))
    codes = []
    for v in row:
        gaps = [abs(v / scale - level) if scale else abs(level) for level in values]
        tied = [i for i, gap in enumerate(gaps) if gap == min(gaps)]
        codes.append(min(tied, key=lambda i: (i - values.index(0.0)) % 2) if 0.0 in values else tied[-1])
    return scale, codes


def test_minmax_against_plain_python() -> None:
    w = torch.randint(-40, 41, (12, 16)) / 8  # multiples of 1/8: ties do happen
    w[0] = 0
    w[1] = 3
    for bits in (2, 4, 8):
        qt = quantize(w, Format.parse(f"uint{bits}"))
        scales, zeros, _ = qt.grid()
        for row, codes, scale, zero in zip(w.tolist(), qt.part_codes().tolist(), scales, zeros):
            assert (float(scale), int(zero), codes) == slow_minmax(row, bits)


@pytest.mark.parametrize("name", ["int3", "int4", "int8", "fp4_e2m1", "pot3", "ternary-absmax"])
def test_absmax_against_plain_python(name: str) -> None:
    w = torch.randint(-28, 29, (6, 32)) / 8
    w[:, 0] = 3.5  # reach 7 gives scale 1/2: exact, with ties
    w[5] = 0
    fmt = Format.parse(name)
    qt = quantize(w, fmt)
    for row, codes, scale in zip(w.tolist(), qt.part_codes().tolist(), qt.grid().scale):
        assert (float(scale), codes) == slow_absmax(row, fmt.levels.values)


def slow_search(row: list[float], bits: int) -> float:
    """The least sum |w_hat - w|**2.4 over the 80 shrunken ranges."""
    best, top = math.inf, 2**bits - 1
    for p in SHRINKS:
        scale = half((max(0.0, *row) * p - min(0.0, *row) * p) / top)
        zero = max(0, min(top, round(-min(0.0, *row) * p / scale)))
        codes = [max(0, min(top, round(v / scale) + zero)) for v in row]
        best = min(best, sum(abs((q - zero) * scale - v) ** 2.4 for q, v in zip(codes, row)))
    return best


def test_search_finds_the_least_error_of_all_candidates() -> None:
    assert [round(100 * p) for p in SHRINKS] == list(range(100, 20, -1))
    w = torch.distributions.StudentT(3.0).sample((8, 32))
    found = (w_hat("uint3-search", w) - w).double().abs().pow(2.4).sum(1)
    for error, row in zip(found.tolist(), w.tolist()):
        assert error == pytest.approx(slow_search(row, 3), rel=1e-4)


def test_the_simple_rules() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, -6.0, 0.5], [0.0, 0.0, 0.0, 1.0, -1.0]])
    size = w.abs()
    scale = {text: quantize(w, Format.parse(text)).grid().scale[:, 0] for text in EVERY if text.startswith("ternary")}
    assert torch.equal(scale["ternary"], size.mean(1).half().float())
    assert scale["ternary-median"].tolist() == [2.0, 0.0]
    assert torch.equal(scale["ternary-tbt"], (size.mean(1) * 4 / 3).half().float())
    assert scale["ternary-twn"].tolist() == [3.666015625, 1.0]  # fp16 of (2 + 3 + 6) / 3, those above 0.7 * 2.5
    centred = quantize(w, Format.parse("binary-zreal"))
    mu = w.mean(1, keepdim=True)
    expected = mu + (w - mu).abs().mean(1, keepdim=True) * torch.where(w >= mu, 1.0, -1.0)
    assert torch.allclose(centred.dequantize(), expected, rtol=2e-3)
    even = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    assert quantize(even, Format.parse("ternary-median")).grid().scale.item() == 2.5


def test_binary_of_two_values_is_exact_with_a_real_zero() -> None:
    w = torch.tensor([[0.25, 0.75, 0.75, 0.25], [-1.0, 3.0, 3.0, -1.0]])
    assert torch.equal(w_hat("binary-zreal", w), w)  # mean 0.5 and 1, deviation 0.25 and 2


def test_sign_of_zero_is_plus_one() -> None:
    for name in ("binary", "int1", "pot2nz"):
        qt = quantize(torch.tensor([[0.0, -0.0, 1.0, -1.0]]), Format.parse(name))
        assert bool((qt.dequantize()[0, :2] > 0).all())


# ---------------------------------------------------------------- properties

finite = st.one_of(st.just(0.0), st.floats(2.0**-99, 1000, width=32), st.floats(-1000, -(2.0**-99), width=32))


@pytest.mark.parametrize("text", ["int4", "uint4", "uint4-zreal", "int8", "fp4_e2m1", "fp8_e4m3", "nf4", "pot3nz"])
@settings(max_examples=12)
@given(st.lists(finite, min_size=1, max_size=12))
def test_error_is_at_most_half_a_gap(text: str, row: list[float]) -> None:
    fmt, w = Format.parse(text).with_(scale_dtype="fp32"), torch.tensor([row])
    qt = quantize(w, fmt)
    scale, zero, _ = qt.grid()
    step = float(fmt.levels.table().diff().max()) * scale
    slack = 2e-7 * w.abs().max()  # fp32 division and product, one rounding each
    if fmt.zero == "int":  # the rounded zero may push an end out by half a step
        step = 2 * step
    elif zero is not None:  # fp16 places the block to 2**-11 of its distance, on either end
        slack = slack + (zero.abs() + 16) * scale * 2**-10
    assert bool(((qt.dequantize() - w).abs() <= 0.5001 * step + slack).all())


@pytest.mark.parametrize("text", ["int4", "uint4", "nf4", "fp6_e2m3", "pot4", "ternary-absmax", "fp4_e2m1-g32-e8m0-mx"])
def test_requantising_is_a_fixed_point(text: str) -> None:
    fmt, w = Format.parse(text), torch.randn(8, 32)
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    codes = encode(blocks, grid, fmt)
    assert torch.equal(encode(decode(codes, grid, fmt), grid, fmt), codes)


def test_search_and_least_squares_never_lose() -> None:
    w = torch.distributions.StudentT(3.0).sample((24, 64))
    for base in ("int2", "uint4", "uint3-zreal", "pot3nz"):
        rules = ("minmax" if "u" in base else "absmax", "search", "lstsq")
        plain, searched, squares = ((w_hat(f"{base}-{rule}", w) - w).double().abs() for rule in rules)
        assert bool((searched.pow(2.4).sum(1) <= plain.pow(2.4).sum(1) * (1 + 1e-5)).all()), base
        assert float(squares.square().sum()) <= float(searched.square().sum()) * (1 + 1e-6), base


def test_error_energy_follows_the_number_of_levels() -> None:
    w = torch.rand(64, 256) - 0.5
    assert mse("uint4", w) / mse("uint8", w) == pytest.approx((255 / 15) ** 2, rel=0.1)


@pytest.mark.parametrize(
    "text", ["int4", "uint4", "ternary", "binary", "nf4", "fp4_e2m1", "pot3", "int3-lstsq", "uint3-search"]
)
def test_scaling_by_a_power_of_two_scales_everything(text: str) -> None:
    w = torch.randn(4, 32)
    assert torch.equal(w_hat(text, 4 * w), 4 * w_hat(text, w))


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("minmax",)])
def test_negating_negates(rule: str) -> None:
    w = torch.randn(4, 33)  # ties aside
    assert torch.equal(w_hat(f"ternary-{rule}", -w), -w_hat(f"ternary-{rule}", w))


# ---------------------------------------------------------------- odd blocks


@pytest.mark.parametrize("text", EVERY)
def test_zeros_stay_zero(text: str) -> None:
    w = torch.randn(4, 32)
    w[1] = 0
    found = w_hat(text, torch.zeros(4, 32))
    assert float(found.abs().max()) <= 2.0**-120  # E8M0 has no zero
    if "tensor" not in text and "tile" not in text:
        assert float(w_hat(text, w)[1].abs().max()) <= 2.0**-120


@pytest.mark.parametrize("text", EVERY)
def test_constants_and_magnitudes(text: str) -> None:
    fmt = Format.parse(text)
    if fmt.scale_dtype in ("fp16", "bf16") and fmt.levels.values:
        fmt = fmt.with_(scale_dtype="fp32")
    within = (
        0.25 if fmt.scale_rule == "mx" else 0.143 if fmt.scale_dtype == "e8m0" else 1 / 3 if "tbt" in text else 2.0**-10
    )
    for value in (-3.0, 0.001, 700.0):
        w = torch.full((4, 32), value)
        assert float((quantize(w, fmt).dequantize() - w).abs().max()) <= within * 1.0001 * abs(value)
    for size in (1e-30, 1e4):
        w = torch.randn(4, 32) * size
        found = w_hat(text, w)  # scales below 2**-24 become that in fp16: as good as zero
        assert bool(torch.isfinite(found).all())
        assert float(found.abs().max()) <= 5 * float(w.abs().max()) + 2.0**-24


@pytest.mark.parametrize(
    "text", ["int4-fp32", "uint4-fp32", "int4-bf16", "uint4-zreal-fp32", "binary-bf16", "nf4-fp32"]
)
def test_huge_weights_with_a_wide_scale(text: str) -> None:
    w = torch.randn(4, 32) * 1e37
    error = (w_hat(text, w) - w).abs().max() / w.abs().max()
    assert float(error) < (1.0 if "binary" in text else 0.2)


def test_weights_too_large_for_an_fp16_scale() -> None:
    with pytest.raises(FormatError, match="does not fit fp16"):
        quantize(torch.full((2, 4), 1e6), Format.parse("int4"))
    with pytest.raises(FormatError, match="does not fit fp32"):
        quantize(torch.tensor([[3e38, -3e38]]), Format.parse("uint4-fp32"))


@pytest.mark.parametrize(
    "text", ["uint4-zreal", "uint2-zreal", "uint4-zreal-search", "uint4-zreal-lstsq", "int3-zreal"]
)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.1])
def test_blocks_far_from_zero_with_a_real_zero(text: str, spread: float) -> None:
    w = 5 + spread * torch.randn(8, 32)
    error = (w_hat(text, w) - w).abs().max()
    assert float(error) <= 2 * spread + 5 * 2.0**-10  # fp16 places the block to half a unit of its eleven bits


def test_double_quantized_scales_keep_blocks_where_they_are() -> None:
    w = 5 + torch.randn(64, 32) * torch.logspace(-2, 0, 64)[:, None]  # scales differ a hundredfold: coarse steps
    error = (w_hat("uint4-zreal-double", w) - w).abs().amax(1)
    assert float(error[:8].max()) < 0.06  # codes of those scales are off by up to a fifth, and 5 / scale is about 2000


def test_one_outlier_in_a_block() -> None:
    w = torch.randn(1, 64) * 0.01
    w[0, 7] = 10
    for text in ("int4-g32", "uint4-g32", "nf4-g32", "mxfp4", "int4-g32-search"):
        found = w_hat(text, w)
        assert float((found - w)[0, 32:].abs().max()) < 0.006 and float(found[0, 7]) > 2  # only its own block suffers


# ---------------------------------------------------------------- importance


@pytest.mark.parametrize("text", [t for t in EVERY if "mx" not in t])
def test_weights_of_importance_zero_are_left_out(text: str) -> None:
    w, h = torch.randn(4, 32), torch.ones(4, 32)
    spoiled = w.clone()
    spoiled[:, ::8], h[:, ::8] = 300.0, 0.0
    fmt = Format.parse(text)
    kept = torch.arange(32) % 8 != 0
    if fmt.blocks.cols == 8:  # the same blocks without those weights
        fmt_small = fmt.with_(blocks=type(fmt.blocks)(fmt.blocks.rows, 7))
    else:
        fmt_small = fmt
    alone = quantize(w[:, kept], fmt_small).dequantize()
    found = quantize(spoiled, fmt, h).dequantize()[:, kept]
    assert torch.allclose(found, alone, rtol=1e-5, atol=1e-6)


def test_importance_steers_searched_scales() -> None:
    w = torch.randn(16, 32)
    h = torch.rand(16, 32) ** 4
    for text in ("int2-lstsq", "uint2-lstsq", "uint2-zreal-lstsq"):
        steered, plain = (((w_hat(text, w, i) - w).square() * h).sum() for i in (h, None))
        assert float(steered) < float(plain)


def test_importance_of_all_zero_counts_as_uniform() -> None:
    w = torch.randn(3, 16)
    for text in ("int3-lstsq", "uint3-search", "ternary", "uint4"):
        assert torch.equal(w_hat(text, w, torch.zeros(3, 16)), w_hat(text, w, torch.ones(3, 16)))


# ---------------------------------------------------------------- MX


def test_mx_of_the_card() -> None:
    qt = quantize(torch.full((1, 32), 6.0), Format.parse("mxfp4"))
    assert qt.tensors()["scale"].tolist() == [[127]] and torch.equal(qt.dequantize(), torch.full((1, 32), 6.0))


@pytest.mark.parametrize(
    ("alias", "emax"),
    [("mxfp4", 2), ("mxfp6_e2m3", 2), ("mxfp6_e3m2", 4), ("mxfp8_e4m3", 8), ("mxfp8_e5m2", 15), ("mxint8", 0)],
)
def test_mx_shared_exponent(alias: str, emax: int) -> None:
    just_below = 2.0**20 * (1 - 2.0**-24)  # floor(log2) is 19; log2 in fp32 says 20
    for largest, floor in (
        (1.0, 0),
        (1.5, 0),
        (just_below, 19),
        (2.0**20, 20),
        (2.0**-130, -130),
        (1e-44, -147),
        (3e38, 127),
    ):
        w = torch.zeros(1, 32)
        w[0, 3] = -largest
        code = quantize(w, Format.parse(alias)).tensors()["scale"].item()
        assert code - 127 == max(-127, min(127, floor - emax)), largest


def test_mx_saturates_and_flushes() -> None:
    w = torch.zeros(1, 32)
    w[0, 0] = 7.9  # scale 1, largest level 6
    assert w_hat("mxfp4", w)[0, 0] == 6
    w[0, 0] = 2.0**-140  # below half the smallest level of the smallest scale
    assert float(w_hat("mxfp4", w).abs().max()) == 0


# ---------------------------------------------------------------- thresholds


def test_threshold_codes() -> None:
    w = torch.tensor([[1.0, -2.0, 0.5, -0.5, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scale = threshold_codes(w, torch.tensor([[0.75], [1.0]]))
    assert codes.tolist() == [[2, 0, 1, 1, 2], [1, 1, 1, 1, 1]] and scale[:, 0].tolist() == [2.0, 0.0]


def test_stochastic_search_uses_nearest_for_its_scales() -> None:
    w = torch.randn(2, 16)
    for name in ("int3", "pot2"):
        formats = [Format(levels(name), scale_rule="lstsq", rounding=rounding) for rounding in ("even", "stochastic")]
        assert torch.equal(*(fit(w, fmt).scale for fmt in formats))
