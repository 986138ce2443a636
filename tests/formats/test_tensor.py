"""QuantizedTensor: every input shape and dtype, exact counting, golden bytes, and a reader that believes nothing."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.formats import Format, QuantizedTensor, quantize, split_quantize, tensor_specs
from lowbit.formats.levels import LEVEL_SET_NAMES

SAMPLES = [
    *("int4-g8", "uint4-g8", "uint3-g8-zreal", "int8-channel", "binary-channel", "ternary-tensor", "nf4-g8-fp32"),
    *(
        "kmeans3-channel",
        "kmeans2-tensor",
        "kmeans3-g8-shared",
        "uint4-g8-double",
        "int4-g8-bf16",
        "int5-tile2x8",
        "fp4_e2m1-g8-e8m0-mx",
    ),
]


def stored_shapes(qt: QuantizedTensor) -> dict[str, Any]:
    return {key: (tuple(t.shape), t.dtype) for key, t in qt.tensors().items()}


def reread(qt: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor.from_tensors(json.loads(json.dumps(qt.meta())), qt.tensors())


# ---------------------------------------------------------------- shapes, dtypes, odd inputs


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("shape", [(4, 16), (1, 8), (2, 2, 2, 4), (6, 8, 1), (0, 8), (2, 0), (0, 0)])
def test_every_shape_packs_counts_and_reads_back(text: str, shape: tuple[int, ...]) -> None:
    fmt, w = Format.parse(text), torch.randn(shape)
    if fmt.blocks.rows > 1 and shape[0] % 2:
        with pytest.raises(ShapeError):
            quantize(w, fmt)
        return
    qt = quantize(w, fmt)
    again = reread(qt)
    assert stored_shapes(qt) == tensor_specs(qt.meta())
    assert qt.shape == shape and qt.dequantize().shape == shape
    assert torch.equal(again.dequantize(), qt.dequantize()) and again.meta() == qt.meta()
    assert qt.nbytes == sum(t.numel() * t.element_size() for t in qt.tensors().values())
    assert qt.bits_per_weight == 8 * qt.nbytes / max(w.numel(), 1)


@pytest.mark.parametrize("name", LEVEL_SET_NAMES)
def test_one_weight(name: str) -> None:
    for value in (0.75, -2.0, 0.0):
        qt = quantize(torch.tensor([[value]]), Format.parse(f"{name}-channel"))
        found = float(reread(qt).dequantize())
        assert found == pytest.approx(value, rel=0.02) or (name.startswith("uint1") and value == 0.0)


def test_half_precision_strided_and_integer_inputs() -> None:
    w = torch.randn(8, 16)
    fmt = Format.parse("uint4-g8-search")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(quantize(w.to(dtype), fmt).dequantize(), quantize(w.to(dtype).float(), fmt).dequantize())
    strided = torch.randn(16, 24).T[::3]
    assert not strided.is_contiguous()
    assert torch.equal(quantize(strided, fmt).dequantize(), quantize(strided.contiguous(), fmt).dequantize())
    assert quantize(w, fmt).dequantize(torch.bfloat16).dtype == torch.bfloat16
    whole = torch.arange(-7, 8).expand(2, 15)
    assert torch.equal(quantize(whole, Format.parse("int4")).dequantize(), whole.float())
    parameter = torch.nn.Parameter(w.clone())
    assert not quantize(parameter, fmt).dequantize().requires_grad


def test_quantizing_leaves_the_weight_alone() -> None:
    w = torch.randn(4, 16)
    before = w.clone()
    for text in [*SAMPLES, "uint3-search", "int3-lstsq"]:
        quantize(w, Format.parse(text), torch.rand(4, 16))
        assert torch.equal(w, before), text


def test_a_kernel_of_four_dimensions_groups_along_everything_but_out() -> None:
    w = torch.randn(4, 3, 2, 4)
    qt = quantize(w, Format.parse("int4-g8"))
    assert torch.equal(
        qt.dequantize(), quantize(w.reshape(4, 24), Format.parse("int4-g8")).dequantize().reshape(w.shape)
    )
    assert qt.tensors()["scale"].shape == (4, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_counted(bad: float) -> None:
    w = torch.zeros(3, 4)
    w[1, 2] = bad
    with pytest.raises(FormatError, match="1 of 12 weights are NaN or infinite"):
        quantize(w, Format.parse("int4"))
    with pytest.raises(FormatError, match="NaN or infinite"):
        quantize(torch.full((1, 2), 1e300, dtype=torch.float64), Format.parse("int4-fp32"))


def test_wrong_inputs() -> None:
    w, fmt = torch.randn(4, 8), Format.parse("int4")
    with pytest.raises(ShapeError, match="has no rows of weights"):
        quantize(torch.randn(4), fmt)
    with pytest.raises(ShapeError, match=r"importance is \(8,\), needed one per weight, \(4, 8\)"):
        quantize(w, fmt, torch.ones(8))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(FormatError, match="importance holds"):
            quantize(w, fmt, torch.full((4, 8), bad))


def test_stochastic_quantization_is_seeded() -> None:
    w, fmt = torch.randn(8, 64), Format.parse("int4-stochastic")
    first, second, other = (
        quantize(w, fmt, generator=torch.Generator().manual_seed(s)).dequantize() for s in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert "stochastic" in quantize(w, fmt).meta()["parts"][0]["format"]


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("mxfp4", (8, 64), 4.25),
        ("mxfp6_e2m3", (8, 64), 6.25),
        ("mxfp6_e3m2", (8, 64), 6.25),
        ("mxfp8_e4m3", (8, 64), 8.25),
        ("mxfp8_e5m2", (8, 64), 8.25),
        ("mxint8", (8, 64), 8.25),
        ("nf4-g64-fp32", (8, 64), 4.5),
        ("nf4-g64-double", (256, 4096), 4 + 8 / 64 + 32 / 16384),  # 4.127
        ("int4-g64", (8, 64), 4 + 16 / 64),
        ("uint4-g64", (8, 64), 4 + 20 / 64),
        ("uint3-g64", (8, 64), 3 + 19 / 64),
        ("uint4-g64-zreal", (8, 64), 4 + 32 / 64),
        ("int5-g128-bf16", (8, 128), 5 + 16 / 128),
        ("pot3nz-g128", (8, 128), 3.125),
        ("binary-channel", (8, 64), 1 + 16 / 64),
        ("ternary-channel", (8, 80), 1.6 + 16 / 80),
        ("ternary-tensor", (100, 100), 1.6 + 16 / 10_000),
        ("int7-tensor", (8, 64), 7 + 16 / 512),
        ("int4-tile4x32", (8, 64), 4 + 16 / 128),
        ("kmeans2-channel", (8, 4096), 2 + 4 * 16 / 4096),
        ("kmeans2-g128", (8, 1024), 2 + 4 * 16 / 128),
        ("kmeans2-g64-shared", (64, 1024), 2 + 16 / 64 + 4 * 16 / 2**16),
        ("kmeans3-g32-shared-double", (64, 1024), 3 + 8 / 32 + 32 / 8192 + 8 * 16 / 2**16),
        ("int3-channel", (1, 3), 8 * (2 + 2) / 3),  # nine bits take two bytes
    ],
)
def test_bits_per_weight_counted_from_bytes(text: str, shape: tuple[int, int], bits: float) -> None:
    assert quantize(torch.randn(shape), Format.parse(text)).bits_per_weight == pytest.approx(bits, abs=1e-9)


# ---------------------------------------------------------------- golden bytes


def golden_weight() -> Tensor:
    return (torch.arange(32).reshape(2, 16) * 7 % 31 - 15) / 16


GOLDEN: dict[str, dict[str, str]] = {  # changing these changes people's files
    "int4-g8": {
        "codes": "41b83e961d84fc63da52c84fa72e961c",
        "scale": "4930003049304930",
    },
    "uint4-g8": {
        "codes": "40b72fa60d84fc63d940b82fb71f950d",
        "scale": "772f772f772f332f",
        "zero": "8887",
    },
    "uint3-g8-zreal": {
        "codes": "10fb8c86d86734c43eeb331a",
        "scale": "003400340034b733",
        "zero": "804300438042c743",
    },
    "int8-channel": {
        "codes": "013c78b3ee235e99d5094580bbf72b67a2dd124d88c4ff346faae61a5691cc01",
        "scale": "8f1f8f1f",
    },
    "binary-channel": {
        "codes": "98397366",
        "scale": "e0370838",
    },
    "ternary-tensor": {
        "codes": "e13f4b196a5902",
        "scale": "f837",
    },
    "nf4-g8-fp32": {
        "codes": "20c61f940e72fc51ea30d82fb61e940d",
        "scale": "0000703f0000603f0000703f0000703f",
    },
    "kmeans3-channel": {
        "codes": "10fdac87e86735443feb211a",
        "table": "40bb40b980b700b300a8003280362b3aabba80b880b500b0002e8034ab38c03a",
    },
    "kmeans2-tensor": {
        "codes": "9493934e4e3e3939",
        "table": "30ba80b40033c039",
    },
    "uint4-g8-double": {
        "codes": "40b72fa61d84fc63d940b82fb71f950d",
        "scale": "fffffff6",
        "scale_step": "00dfef39",
        "zero": "8887",
    },
    "int4-g8-bf16": {
        "codes": "41b83e961d84fc63da52c84fa72e961c",
        "scale": "093e003e093e093e",
    },
    "int5-tile2x8": {
        "codes": "013ddb0b9b5a2478bd69740f15f13fae72b2640e",
        "scale": "002c002c",
    },
    "fp4_e2m1-g8-e8m0-mx": {
        "codes": "10c60ea30d71ed41eb20d81eb50e930d",
        "scale": "7c7c7c7c",
    },
}
SPLIT = {
    "codes": "9153424a4e6e3eb9",
    "scale": "0038ab3800380038",
    "zero": "a5",
    "part1_mask_codes": "4130",
    "part1_mask_rows": "28",
    "part1_codes": "01ff01",
    "part1_scale": "8f1f8f1f",
}


def hexes(qt: QuantizedTensor) -> dict[str, str]:
    return {k: bytes(t.contiguous().view(torch.uint8).reshape(-1).tolist()).hex() for k, t in qt.tensors().items()}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_tensor(text: str) -> None:
    assert hexes(quantize(golden_weight(), Format.parse(text))) == GOLDEN[text]


def test_golden_split() -> None:
    w = golden_weight()
    qt = split_quantize(w, w.abs() > 0.9, Format.parse("uint2-g8"), Format.parse("int8-channel"), codec="gap")
    mask = {"codec": "gap", "count": 3, "bits": 2, "codes": 7, "row_bits": 3, "row_min": 1}
    assert qt.meta() == {"shape": [2, 16], "parts": [{"format": "uint2-g8"}, {"format": "int8-channel", "mask": mask}]}
    assert hexes(qt) == SPLIT


@pytest.mark.parametrize("text", SAMPLES)
def test_storing_what_was_loaded_gives_the_same_bytes(text: str) -> None:
    qt = quantize(torch.randn(4, 16), Format.parse(text))
    again = QuantizedTensor.from_codes(qt.part_codes(), qt.grid(), qt.format, qt.shape)
    assert hexes(again) == hexes(qt)


# ---------------------------------------------------------------- distrust


def samples() -> list[QuantizedTensor]:
    w = torch.randn(4, 16)
    mask = torch.rand(4, 16) < 0.2
    split = [
        split_quantize(w, mask, Format.parse("uint2-g8"), e, c)
        for e, c in (
            ("raw_fp16", "bitmap"),
            (Format.parse("int4-channel"), "csr"),
            (Format.parse("kmeans2-tensor"), "gap"),
        )
    ]
    return [quantize(w, Format.parse(text)) for text in SAMPLES] + split


def tampered_tensors(tensors: dict[str, Tensor]) -> "list[dict[str, Any]]":
    changed: list[dict[str, Any]] = [{}, tensors | {"more": torch.zeros(1)}]
    for key, t in tensors.items():
        rest = {k: v for k, v in tensors.items() if k != key}
        other = torch.float64 if t.dtype != torch.float64 else torch.float32
        changed += [rest, rest | {key + "_": t}, rest | {key.upper(): t}, rest | {key: None}, rest | {key: t.tolist()}]
        changed += [rest | {key: v} for v in (t[:-1], t[None], t.reshape(-1, 1, 1), t.to(other), t[..., :0])]
        changed += [rest | {key: torch.cat([t, t])}]
    return changed


def test_wrong_tensors_are_refused() -> None:
    for qt in samples():
        for tensors in tampered_tensors(qt.tensors()):
            with pytest.raises((FormatError, ShapeError)):
                QuantizedTensor.from_tensors(qt.meta(), tensors)


JUNK = [None, True, -1, 0, 3.5, 2**70, "", "int4", "4", [], {}, [1], [[2, 2]], {"codec": "gap"}, float("nan"), b"x"]


def tampered(meta: Any) -> "list[Any]":
    """Every value in a nested description replaced by junk, every key dropped, doubled or renamed."""
    changed: list[Any] = list(JUNK)
    if isinstance(meta, dict):
        changed += [meta | {"unknown": 1}]
        for key, value in meta.items():
            rest = {k: v for k, v in meta.items() if k != key}
            changed += [rest, rest | {key + "x": value}] + [meta | {key: v} for v in tampered(value)]
    if isinstance(meta, list):
        changed += [meta[:-1], meta + meta, [*meta, 1], meta[::-1]]
        for i, value in enumerate(meta):
            changed += [[*meta[:i], v, *meta[i + 1 :]] for v in tampered(value)]
    if isinstance(meta, str):
        changed += [
            meta + "-g3",
            meta.upper(),
            meta[:-1],
            meta + "8",
            meta + "\n",
            "kmeans8",
            "uint8-g8",
            "raw_fp32",
            "fp8_e4m3",
        ]
    return changed


def test_wrong_descriptions_are_refused_or_mean_the_same_tensors() -> None:
    refused = accepted = 0
    for qt in samples():
        for meta in tampered(qt.meta()):
            try:
                other = QuantizedTensor.from_tensors(meta, qt.tensors())
            except (FormatError, ShapeError):
                refused += 1
                continue
            accepted += 1  # e.g. [4, 16] reversed: another tensor with the same bytes, which a checksum must tell apart
            assert torch.isfinite(other.dequantize()).all() and stored_shapes(other) == stored_shapes(qt)
    assert refused > 1000 and accepted < refused / 50


@pytest.mark.parametrize(
    ("text", "key", "value", "message"),
    [
        ("int4-g8", "scale", float("nan"), "holds NaN or infinity"),
        ("int4-g8", "scale", float("inf"), "holds NaN or infinity"),
        ("int4-g8", "scale", -1.0, "negative"),
        ("uint4-g8-double", "scale_step", -1.0, "negative"),
        ("uint4-g8-double", "scale_step", float("nan"), "holds NaN or infinity"),
        ("fp4_e2m1-g8-e8m0-mx", "scale", 255, "NaN scale"),
        ("uint3-g8-zreal", "zero", float("inf"), "holds NaN or infinity"),
        ("kmeans3-channel", "table", float("nan"), "holds NaN or infinity"),
        ("fp4_e2m1-g8-e8m0-mx", "codes", 255, "holds code 15 of 15 levels"),
        ("ternary-tensor", "codes", 243, "above 242"),
    ],
)
def test_impossible_numbers_are_refused(text: str, key: str, value: float, message: str) -> None:
    qt = quantize(torch.randn(4, 16), Format.parse(text))
    tensors = {k: t.clone() for k, t in qt.tensors().items()}
    tensors[key].view(-1)[0] = value
    with pytest.raises(FormatError, match=message):
        QuantizedTensor.from_tensors(qt.meta(), tensors)


def test_descriptions_are_taken_literally() -> None:
    qt = quantize(torch.randn(1, 16), Format.parse("int4"))
    part = qt.meta()["parts"][0]
    for shape in ([1.0, 16], [True, 16], ["1", 16], [1, -16], [2**41, 0], [1, 2**41]):
        with pytest.raises(FormatError, match="impossible shape|damaged"):
            QuantizedTensor.from_tensors({"shape": shape, "parts": [part]}, qt.tensors())
    for meta in (qt.meta() | {"rotated": True}, {"shape": [1, 16], "parts": [part | {"rotated": True}]}):
        with pytest.raises(FormatError, match="unknown fields"):
            QuantizedTensor.from_tensors(meta, qt.tensors())


def test_parts_must_be_disjoint_and_masked() -> None:
    w = torch.randn(2, 16)
    mask = w > 0.5
    qt = split_quantize(w, mask, Format.parse("int4"), codec="bitmap")
    part = qt.meta()["parts"][1]
    twice = {"shape": [2, 16], "parts": [*qt.meta()["parts"], part]}
    tensors = qt.tensors() | {k.replace("part1", "part2"): t for k, t in qt.tensors().items() if k.startswith("part1")}
    with pytest.raises(FormatError, match="part 2 overlaps"):
        QuantizedTensor.from_tensors(twice, tensors)
    with pytest.raises(FormatError, match="first part is dense"):
        tensor_specs({"shape": [2, 16], "parts": [{"format": "raw_fp16"}]})
    with pytest.raises(FormatError, match="first part is dense"):
        tensor_specs({"shape": [2, 16], "parts": [{"format": "int4"}, {"format": "int4"}]})
