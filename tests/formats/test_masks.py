"""Mask codecs: any mask comes back, damaged ones are refused, the index costs what the bound says."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import decode_mask, encode_mask, mask_specs
from lowbit.formats.masks import CODECS, best_codec

SHAPE = (3, 40)
ADVERSARIAL = {
    "empty": torch.zeros(SHAPE, dtype=torch.bool),
    "full": torch.ones(SHAPE, dtype=torch.bool),
    "ends": torch.arange(40).eq(39).expand(SHAPE),
    "starts": torch.arange(40).eq(0).expand(SHAPE),
    "one row": torch.tensor([[False], [True], [False]]).expand(SHAPE),
    "last of all": torch.arange(120).eq(119).reshape(SHAPE),
    "no rows": torch.zeros(0, 40, dtype=torch.bool),
    "no columns": torch.zeros(3, 0, dtype=torch.bool),
}


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_round_trip(mask: Tensor, codec: str, gap_bits: "int | None" = None) -> None:
    meta, tensors = encode_mask(mask, codec, gap_bits)
    specs = mask_specs(meta, tuple(mask.shape))
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == specs
    assert meta["count"] == int(mask.sum())
    assert torch.equal(decode_mask(meta, tensors, tuple(mask.shape)), mask)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("codec", [*CODECS, "auto"])
def test_adversarial_masks_come_back(name: str, codec: str) -> None:
    check_round_trip(ADVERSARIAL[name], codec)


@pytest.mark.parametrize("gap_bits", range(1, 9))
def test_every_gap_width(gap_bits: int) -> None:
    mask = torch.zeros(2, 1100, dtype=torch.bool)
    mask[0, [0, 1, 2, 3, 4, 258, 259, 515, 1099]] = (
        True  # gaps on both sides of every m = 2**b - 1, and multiples of it
    )
    mask[1, torch.arange(0, 45).cumsum(0)] = True
    check_round_trip(mask, "gap", gap_bits)


@given(st.integers(0, 4), st.integers(0, 70), st.floats(0, 1), st.integers(0, 99), st.sampled_from([*CODECS, "auto"]))
def test_any_mask_comes_back(out: int, in_: int, density: float, seed: int, codec: str) -> None:
    check_round_trip(torch.rand(out, in_, generator=torch.Generator().manual_seed(seed)) < density, codec)


@pytest.mark.parametrize("in_", [65536, 65537])
def test_csr_columns_of_long_rows(in_: int) -> None:
    mask = torch.zeros(2, in_, dtype=torch.bool)
    mask[0, [0, 32767, 32768, in_ - 1]] = True
    mask[1, in_ - 1] = True
    check_round_trip(mask, "csr")
    assert encode_mask(mask, "csr")[1]["mask_columns"].element_size() == (2 if in_ == 65536 else 4)


def slow_gap_codes(row: list[bool], bits: int) -> list[int]:
    """The card's pseudocode, with 0 as the escape."""
    codes, before, m = [], -1, 2**bits - 1
    for i, here in enumerate(row):
        if here:
            gap = i - before
            while gap > m:
                codes.append(0)
                gap -= m
            codes.append(gap)
            before = i
    return codes


def test_gap_codes_against_the_plain_loop() -> None:
    mask = torch.rand(5, 90) < torch.tensor([0.0, 0.02, 0.1, 0.5, 1.0])[:, None]
    for bits in (2, 3, 5):
        meta, tensors = encode_mask(mask, "gap", bits)
        rows = [slow_gap_codes(row, bits) for row in mask.tolist()]
        number = sum(code << (i * bits) for i, code in enumerate(chain.from_iterable(rows)))
        assert bytes(tensors["mask_codes"].tolist()) == number.to_bytes(len(tensors["mask_codes"]), "little")
        low, width = min(map(len, rows)), (max(map(len, rows)) - min(map(len, rows))).bit_length()
        assert (meta["row_min"], meta["row_bits"], meta["codes"]) == (low, width, sum(map(len, rows)))
        counts = sum((len(row) - low) << (i * width) for i, row in enumerate(rows))
        assert bytes(tensors["mask_rows"].tolist()) == counts.to_bytes(len(tensors["mask_rows"]), "little")


def test_auto_is_the_smallest_and_gap_picks_its_best_width() -> None:
    chosen = set()
    for density in (0.0005, 0.01, 0.05, 0.3, 0.6):
        mask = torch.rand(40, 1000) < density
        sizes = {codec: nbytes(encode_mask(mask, codec)[1]) for codec in CODECS}
        widths = [nbytes(encode_mask(mask, "gap", bits)[1]) for bits in range(1, 9)]
        assert sizes["gap"] == min(widths)
        meta, tensors = encode_mask(mask)
        assert nbytes(tensors) == min(sizes.values()) and meta["codec"] == best_codec(mask)[0]
        chosen.add(meta["codec"])
    assert {"gap", "bitmap"} <= chosen
    one = torch.zeros(1, 60000, dtype=torch.bool)
    one[0, 59999] = True
    assert best_codec(one) == ("csr", None)


@pytest.mark.parametrize(("density", "bits", "expected"), [(0.05, 6, 0.312), (0.05, 5, 0.3136), (0.0825, 5, 0.442)])
def test_index_cost_lies_between_entropy_and_bound(density: float, bits: int, expected: float) -> None:
    out, in_ = 256, 4096
    places = torch.rand(out, in_, generator=torch.Generator().manual_seed(0)).topk(round(density * in_), 1).indices
    mask = torch.zeros(out, in_, dtype=torch.bool).scatter(1, places, True)
    meta, tensors = encode_mask(mask, "gap", bits)
    cost = meta["codes"] * bits / mask.numel()
    m, g = 2**bits - 1, density
    bound = g * bits * (1 + 1 / (math.exp(g * m) - 1))
    exact = g * bits * (1 + 1 / ((1 - g) ** -m - 1))  # gaps are geometric
    entropy = -g * math.log2(g) - (1 - g) * math.log2(1 - g)
    assert entropy < cost <= bound and 0.98 * bound < cost
    assert cost == pytest.approx(exact, rel=0.01) and cost == pytest.approx(expected, rel=0.01)
    assert 8 * nbytes(tensors) / mask.numel() - cost < 0.0025  # what rows that decode on their own cost


GOLDEN = {
    "bitmap": {"mask": "1000000001008000a0"},
    "csr": {"mask_rows": "00000000010000000200000005000000", "mask_columns": "04000800070015001700"},
    "gap": {"mask_codes": "85105c", "mask_rows": "0801"},
}


def golden_mask() -> Tensor:
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[[0, 1, 2, 2, 2], [4, 8, 7, 21, 23]] = True
    return mask


@pytest.mark.parametrize("codec", CODECS)
def test_golden_bytes(codec: str) -> None:  # changing these changes people's files
    meta, tensors = encode_mask(golden_mask(), codec, 3)
    assert {k: bytes(t.view(torch.uint8).tolist()).hex() for k, t in tensors.items()} == GOLDEN[codec]
    if codec == "gap":
        assert meta == {"codec": "gap", "count": 5, "bits": 3, "codes": 8, "row_bits": 3, "row_min": 1}


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_streams_are_refused_or_are_another_mask(codec: str) -> None:
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(3)) < 0.1
    meta, tensors = encode_mask(mask, codec)
    refused = 0
    for key, t in tensors.items():
        for at in range(t.numel() * t.element_size()):
            for flip in (1, 128):
                raw = t.clone().view(torch.uint8)
                raw[at] ^= flip
                damaged = tensors | {key: raw.view(t.dtype)}
                try:
                    found = decode_mask(meta, damaged, (6, 50))
                except FormatError:
                    refused += 1
                else:  # e.g. a place moved by one: a mask that could have been written
                    assert int(found.sum()) == meta["count"]
    assert refused > 20


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_descriptions_are_refused(codec: str) -> None:
    meta, tensors = encode_mask(golden_mask(), codec, 3)
    for key in meta:
        for value in (None, -1, 10**9, 1.5, True, "gap2", [], {}):
            with pytest.raises(FormatError):
                decode_mask(meta | {key: value}, tensors, (3, 24))
        with pytest.raises(FormatError, match="damaged"):
            mask_specs({k: v for k, v in meta.items() if k != key}, (3, 24))
    with pytest.raises(FormatError):
        decode_mask(meta | {"more": 1}, tensors, (3, 24))
    with pytest.raises(FormatError):
        decode_mask(meta | {"count": meta["count"] - 1}, tensors, (3, 24))
    for key in tensors:
        for bad in (tensors[key][:-1], tensors[key].float(), tensors[key][None]):
            with pytest.raises(FormatError, match="missing or misshapen"):
                decode_mask(meta, tensors | {key: bad}, (3, 24))


def damaged_gap(codes: list[int], counts: list[int], count: int, in_: int = 24) -> None:
    from lowbit.formats import pack_bits

    meta = {"codec": "gap", "count": count, "bits": 3, "codes": len(codes), "row_bits": 8, "row_min": 0}
    tensors = {
        "mask_codes": pack_bits(torch.tensor(codes, dtype=torch.uint8), 3),
        "mask_rows": torch.tensor(counts, dtype=torch.uint8),
    }
    decode_mask(meta, tensors, (len(counts), in_))


def test_impossible_gap_streams() -> None:
    damaged_gap([7, 7, 7, 3], [4, 0], 4)
    for codes, counts, count, why in (
        ([7, 7, 7, 4], [4, 0], 4, "past column 23"),
        ([0, 0, 0, 0, 1], [5, 0], 1, "past column 23"),
        ([1, 0], [2, 0], 1, "ends in an escape"),
        ([1, 1], [1, 0], 2, "do not add up"),
        ([1, 1], [200, 0], 2, "do not add up"),
        ([0, 1], [2, 0], 2, "it marks 1 places, not 2"),
    ):
        with pytest.raises(FormatError, match=why):
            damaged_gap(codes, counts, count)


def test_impossible_csr() -> None:
    meta, tensors = encode_mask(golden_mask(), "csr")
    for key, values, why in (
        ("mask_rows", [0, 1, 2, 4], "do not rise from 0 to the count"),
        ("mask_rows", [1, 1, 2, 5], "do not rise from 0 to the count"),
        ("mask_rows", [0, 3, 2, 5], "do not rise from 0 to the count"),
        ("mask_columns", [4, 8, 7, 21, 24], r"outside 0 \.\. 23"),
        ("mask_columns", [4, 8, 7, 21, -1], r"outside 0 \.\. 23"),
        ("mask_columns", [4, 8, 21, 7, 23], "columns of a row do not rise"),
        ("mask_columns", [4, 8, 7, 7, 23], "columns of a row do not rise"),
    ):
        with pytest.raises(FormatError, match=why):
            decode_mask(meta, tensors | {key: torch.tensor(values).to(tensors[key].dtype)}, (3, 24))


def test_bad_requests() -> None:
    for mask in (torch.zeros(3, 4), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(FormatError, match="bool matrix"):
            encode_mask(mask)
    with pytest.raises(FormatError, match="'gap'"):
        encode_mask(golden_mask(), "gab")
    with pytest.raises(FormatError, match="use 1 to 8"):
        encode_mask(golden_mask(), "gap", 9)
