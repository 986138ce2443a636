"""Exceptions in a part of their own: exact where raw, fitted apart, and never in the way of the dense part."""

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats import Blocks, Format, Grid, QuantizedTensor, quantize, split_quantize, with_exceptions, with_part
from lowbit.formats.masks import CODECS

DENSE = [
    "uint2-g16",
    "int3-channel",
    "ternary-channel",
    "binary-g16-zreal",
    "kmeans2-channel",
    "uint3-g16-search",
    "int2-tensor",
]


def outliers(shape: tuple[int, ...] = (6, 32)) -> tuple[Tensor, Tensor]:
    w = torch.randn(shape) * 0.1
    mask = torch.rand(shape) < 0.08
    mask.view(shape[0], -1)[1] = False  # a row without exceptions
    return torch.where(mask, w * 50, w), mask


def reread(qt: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_tensors(qt.meta(), qt.tensors())


@pytest.mark.parametrize("codec", [*CODECS, "auto"])
@pytest.mark.parametrize("raw", ["raw_fp16", "raw_bf16", "raw_fp32"])
def test_raw_exceptions_come_back_as_stored(codec: str, raw: str) -> None:
    w, mask = outliers()
    qt = split_quantize(w, mask, Format.parse("uint2-g16"), raw, codec)
    dtype = {"raw_fp16": torch.float16, "raw_bf16": torch.bfloat16, "raw_fp32": torch.float32}[raw]
    found = reread(qt).dequantize()
    assert torch.equal(found[mask], w[mask].to(dtype).float())
    assert torch.equal(qt.mask(1), mask) and torch.equal(found, qt.dequantize())
    extra = int(mask.sum()) * dtype.itemsize + sum(
        t.numel() * t.element_size() for k, t in qt.tensors().items() if "mask" in k
    )
    assert qt.nbytes == quantize(w, Format.parse("uint2-g16")).nbytes + extra


@pytest.mark.parametrize("text", DENSE)
def test_the_dense_part_does_not_see_the_exceptions(text: str) -> None:
    w, mask = outliers()
    fmt = Format.parse(text)
    one, other = (split_quantize(torch.where(mask, x, w), mask, fmt, "raw_fp32") for x in (w, 7 * w))
    for key, t in one.tensors().items():
        if key != "part1_values":
            assert torch.equal(t, other.tensors()[key]), key
    alone = quantize(w, fmt).dequantize()
    assert (one.dequantize() - w)[~mask].square().sum() < (alone - w)[~mask].square().sum()


def test_the_dense_scale_is_that_of_the_kept_weights() -> None:
    w, mask = outliers()
    qt = split_quantize(w, mask, Format.parse("ternary-channel-fp32"))
    kept = torch.stack([row[~m].abs().mean() for row, m in zip(w, mask)])
    assert torch.allclose(qt.grid().scale[:, 0], kept, rtol=1e-6)
    h = torch.rand(w.shape)
    h[0] = 0
    importance = split_quantize(w, mask, Format.parse("ternary-channel-fp32"), importance=h)
    assert torch.allclose(importance.grid().scale[:, 0], kept, rtol=1e-6)


@pytest.mark.parametrize("text", [*DENSE, "uint2-g16-zreal-stochastic", "int2-stochastic"])
def test_dense_codes_at_masked_places_are_the_nearest_to_zero(text: str) -> None:
    w, mask = outliers()
    qt = split_quantize(w, mask, Format.parse(text), "raw_fp16")
    fmt, grid, codes = qt.format, qt.grid(), qt.part_codes()
    blocks = fmt.blocks.split(codes)
    n_levels = len(fmt.levels.values) or grid.table.shape[1]
    every = torch.arange(n_levels, dtype=torch.uint8).expand(len(blocks), -1)
    from lowbit.formats import decode

    smallest = decode(every, grid, fmt).abs().min(1, keepdim=True).values.expand(blocks.shape)
    assert torch.equal(decode(blocks, grid, fmt).abs()[fmt.blocks.split(mask)], smallest[fmt.blocks.split(mask)])


@pytest.mark.parametrize(
    "text",
    [
        "int4-channel",
        "int4-tensor",
        "uint3-channel",
        "uint4-channel-zreal",
        "ternary-channel",
        "nf4-tensor-bf16",
        "kmeans2-channel",
        "kmeans3-tensor",
        "kmeans2-g8",
        "kmeans2-channel-shared",
        "uint3-g16-zreal",
        "int3-channel-lstsq",
        "int4-channel-double",
        "fp4_e2m1-channel-e8m0",
    ],
)
def test_coded_exceptions_are_the_codes_of_their_row(text: str) -> None:
    w, mask = outliers()
    fmt = Format.parse(text)
    qt = split_quantize(w, mask, Format.parse("uint2-g16"), fmt, "gap")
    found = reread(qt).dequantize()
    if fmt.blocks.rows == -1:
        expected = quantize(w[mask][None], fmt).dequantize()[0]
        assert torch.allclose(found[mask], expected, rtol=1e-6)
    elif fmt.blocks.cols != -1:
        for row, m, f in zip(w.reshape(-1, size := fmt.blocks.cols), mask.reshape(-1, size), found.reshape(-1, size)):
            if m.any():
                assert torch.allclose(f[m], quantize(row[m][None], fmt.with_(blocks=Blocks(1, -1))).dequantize()[0])
    elif fmt.scale_dtype != "double" and fmt.scale_rule != "shared":
        for row, m, f in zip(w, mask, found):
            if m.any():
                assert torch.allclose(f[m], quantize(row[m][None], fmt).dequantize()[0], rtol=1e-6)
    assert (found - w)[mask].abs().max() < w.abs().max() * 0.6
    assert torch.isfinite(found).all()


def test_convolutions_importance_and_several_parts() -> None:
    w, mask = outliers((4, 2, 4, 4))
    h = torch.rand(w.shape)
    qt = split_quantize(w, mask, Format.parse("int2-lstsq"), Format.parse("int4-channel-search"), importance=h)
    assert qt.dequantize().shape == w.shape
    second = (torch.rand(w.shape) < 0.1) & ~mask
    more = with_exceptions(qt, w, second, "raw_fp16", "csr")
    found = reread(more).dequantize()
    assert len(more.parts) == 3 and torch.equal(found[second], w[second].half().float())
    assert torch.equal(found[~second], qt.dequantize()[~second])
    with pytest.raises(FormatError, match="overlaps an earlier part"):
        with_exceptions(more, w, second, "raw_fp16")


@pytest.mark.parametrize("exceptions", ["raw_fp16", Format.parse("uint4-channel"), Format.parse("kmeans2-tensor")])
@pytest.mark.parametrize("fill", [False, True])
def test_no_exceptions_and_nothing_but_exceptions(exceptions: "Format | str", fill: bool) -> None:
    w = torch.randn(3, 8)
    mask = torch.full((3, 8), fill)
    qt = split_quantize(w, mask, Format.parse("int4"), exceptions)
    found = reread(qt).dequantize()
    dense = quantize(w, Format.parse("int4"))
    if not fill:
        assert torch.equal(found, dense.dequantize())
    elif isinstance(exceptions, str):
        assert torch.equal(found, w.half().float()) and not qt.parts[0].tensors["scale"].any()
    empty = split_quantize(torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.bool), Format.parse("int4"), exceptions)
    assert reread(empty).dequantize().shape == (0, 8)


def test_exceptions_lower_the_error_at_equal_bits() -> None:
    """Card 8: on rows with tails, taking 5% out at 2 bits beats the plain grid that spends as many bits."""
    w = torch.distributions.StudentT(3.0).sample((64, 1024))
    mask = torch.zeros_like(w, dtype=torch.bool).scatter(1, w.abs().topk(51, 1).indices, True)
    split = split_quantize(w, mask, Format.parse("uint2-channel"), Format.parse("uint2-channel"))
    plain = quantize(w, Format.parse("uint3-channel"))
    assert split.bits_per_weight < 2.6 < plain.bits_per_weight
    assert (split.dequantize() - w).square().mean() < (plain.dequantize() - w).square().mean()
    assert split.parts[1].mask is not None and split.parts[1].mask["codec"] == "gap"


def test_wrong_requests() -> None:
    w, mask = outliers()
    fmt = Format.parse("int4")
    for bad in (mask[:, :5], mask.float()):
        with pytest.raises(ShapeError, match="the mask is"):
            split_quantize(w, bad, fmt)
    with pytest.raises(ShapeError, match="the quantized tensor"):
        with_exceptions(quantize(w, fmt), w[:3], mask[:3])
    with pytest.raises(FormatError, match="unknown exceptions 'raw'"):
        split_quantize(w, mask, fmt, "raw")
    with pytest.raises(FormatError, match="use int4-channel or -tensor"):
        split_quantize(w, mask, fmt, Format.parse("int4-tile2x8"))
    with pytest.raises(FormatError, match="does not fit raw_fp16: use raw_bf16"):
        split_quantize(torch.where(mask, 1e6, w), mask, fmt)
    with pytest.raises(FormatError, match="NaN or infinite"):
        split_quantize(torch.where(mask, torch.nan, w), mask, fmt)


@pytest.mark.parametrize("text", ["kmeans2-channel", "kmeans2-g16", "uint2-channel-zreal", "kmeans2-channel-shared"])
def test_codes_among_the_dense_ones_cost_a_mask_and_a_grid_only(text: str) -> None:
    w, mask = outliers()
    fmt = Format.parse(text)
    apart = split_quantize(w, mask, fmt, fmt, "gap")
    codes = apart.part_codes()
    codes[mask] = apart.part_codes(1)
    dense = QuantizedTensor.from_codes(codes, apart.grid(), fmt)
    inside = with_part(dense, mask, fmt, apart.grid(1), codec="gap")
    assert torch.equal(inside.part_codes(1), apart.part_codes(1))
    assert torch.equal(reread(inside).dequantize(), apart.dequantize())
    assert inside.nbytes == apart.nbytes - apart.tensors()["part1_codes"].numel()
    assert inside.meta()["parts"][1]["codes"] == "dense"


def test_codes_that_cannot_stand_among_the_dense_ones_are_refused() -> None:
    w, mask = outliers()
    dense = quantize(w, Format.parse("uint2-g16"))
    for text in ("uint3-channel", "ternary-channel"):
        qt = with_part(dense, mask, Format.parse(text), Grid(torch.ones(6, 1), torch.zeros(6, 1)))
        with pytest.raises(FormatError, match="cannot keep its codes among"):
            reread(qt)
    first = {"shape": [6, 32], "parts": [dense.meta()["parts"][0] | {"codes": "dense"}]}
    with pytest.raises(FormatError, match="cannot keep its codes"):
        QuantizedTensor.from_tensors(first, dense.tensors())


def test_a_mask_of_columns_costs_one_bit_a_column() -> None:
    w, columns = torch.randn(8, 32), torch.rand(32) < 0.3
    qt = split_quantize(w, columns.expand(8, -1), Format.parse("int2-g16"), "raw_fp32")
    assert qt.tensors()["part1_mask"].numel() == 4 and qt.meta()["parts"][1]["mask"]["codec"] == "columns"
    assert torch.equal(reread(qt).dequantize()[:, columns], w[:, columns])
    with pytest.raises(FormatError, match="rows of this mask differ"):
        split_quantize(w, w > 1, Format.parse("int2-g16"), "raw_fp32", "columns")
