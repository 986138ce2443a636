"""Tiles of different widths: they come back, cost what they say, and impossible ones are refused."""

import pytest
import torch

from lowbit.errors import FormatError, ShapeError
from lowbit.formats import (
    Format,
    QuantizedTensor,
    from_tiles,
    put_tiles,
    quantize,
    quantize_tiles,
    take_tiles,
    tensor_specs,
    with_exceptions,
)

FORMATS = [Format.parse(f) for f in ("int2-g16", "uint3-tile4x32", "nf4-channel", "int8-tensor", "ternary-g8")]
TILE = (4, 32)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(low: int = -1, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, len(FORMATS), (3, 4), generator=torch.Generator().manual_seed(seed))


def test_every_tile_is_quantized_as_it_would_be_alone() -> None:
    w, choice = weight(12, 128), choices().clamp(max=2)  # formats whose blocks lie within a tile
    w_hat = quantize_tiles(w, TILE, choice, FORMATS[:3]).dequantize()
    for i in range(3):
        for j in range(4):
            at = (slice(4 * i, 4 * i + 4), slice(32 * j, 32 * j + 32))
            alone = torch.zeros(TILE) if choice[i, j] < 0 else quantize(w[at], FORMATS[choice[i, j]]).dequantize()
            assert torch.equal(w_hat[at], alone)


def test_a_file_holds_all_of_it() -> None:
    q = quantize_tiles(weight(12, 128), TILE, choices(), FORMATS)
    assert {k: (tuple(t.shape), t.dtype) for k, t in q.tensors().items()} == tensor_specs(q.meta())
    again = QuantizedTensor.from_tensors(q.meta(), q.tensors())
    assert torch.equal(again.dequantize(), q.dequantize())
    assert q.tiles == TILE and quantize(weight(4, 32), FORMATS[0]).tiles is None


def test_bits_are_counted() -> None:
    """Half of the tiles 2 bits, a quarter 8, a quarter nothing; scales fp16, one bit a tile and part."""
    choice = torch.tensor([[0, 0, 1, -1]] * 8)
    formats = [Format.parse("int2-g32"), Format.parse("int8-tile4x32")]
    q = quantize_tiles(weight(32, 128), TILE, choice, formats)
    assert q.bits_per_weight == 0.5 * (2 + 16 / 32) + 0.25 * (8 + 16 / 128) + 2 * 32 / (32 * 128)
    assert (q.dequantize()[:, 96:] == 0).all()


def test_convolutions_and_importance() -> None:
    w = weight(8, 16, 2, 2)
    h = torch.ones_like(w)
    h[0] = 0
    fmt = [Format.parse("int3-tile8x8-lstsq")]
    choice = torch.zeros(1, 8, dtype=torch.int64)
    q = quantize_tiles(w, (8, 8), choice, fmt, h)
    assert q.dequantize().shape == w.shape
    assert not torch.equal(q.dequantize(), quantize_tiles(w, (8, 8), choice, fmt).dequantize())


def test_exceptions_replace_tiles() -> None:
    w = weight(12, 128)
    mask = w.abs() > 2
    q = with_exceptions(quantize_tiles(w, TILE, choices(0), FORMATS), w, mask, "raw_fp32")
    assert torch.equal(q.dequantize()[mask], w[mask])
    assert torch.equal(q.dequantize()[~mask], q.base().dequantize()[~mask])
    assert torch.equal(QuantizedTensor.from_tensors(q.meta(), q.tensors()).dequantize(), q.dequantize())
    with pytest.raises(FormatError, match="overlaps"):
        with_exceptions(q, w, mask, "raw_fp32")


def test_take_and_put_are_inverse() -> None:
    w, owned = weight(12, 128), choices() > 1
    stack = take_tiles(w, owned, TILE)
    assert stack.shape == (4 * int(owned.sum()), 32)
    put = torch.zeros_like(w)
    put_tiles(put, owned, TILE, stack)
    assert torch.equal(take_tiles(put, owned, TILE), stack)
    mask = owned.repeat_interleave(4, 0).repeat_interleave(32, 1)
    assert torch.equal(put, w * mask)
    q = quantize_tiles(w, TILE, owned.long() - 1, FORMATS[:1])
    assert torch.equal(q.stack(0).dequantize(), take_tiles(q.dequantize(), q.owned_tiles(0), TILE))


@pytest.mark.parametrize(
    ("tile", "choice", "error", "says"),
    [
        ((5, 32), torch.zeros(2, 4), ShapeError, "do not divide"),
        ((4, 32), torch.zeros(3, 3), ShapeError, "is \\(3, 4\\)"),
        ((4, 32), torch.full((3, 4), 1), FormatError, "there are 1"),
        ((4, 32), torch.full((3, 4), -2), FormatError, "there are 1"),
        ((4, 32), torch.full((3, 4), -1), FormatError, "no tile"),
        ((4, 4), torch.zeros(3, 32), FormatError, "multiple of 8"),
        ((4, 64), torch.zeros(3, 2), ShapeError, "multiple of group"),
    ],
)
def test_what_cannot_be_is_refused(tile: tuple, choice: torch.Tensor, error: type, says: str) -> None:
    fmt = Format.parse("int2-g48" if tile == (4, 64) else "int2-tensor")
    with pytest.raises(error, match=says):
        quantize_tiles(weight(12, 128), tile, choice.long(), [fmt])


def test_codes_that_do_not_fit_their_tiles_are_refused() -> None:
    q = quantize(weight(8, 32), FORMATS[0])
    with pytest.raises(ShapeError, match="codes of format 0"):
        from_tiles((12, 128), TILE, torch.zeros(3, 4).long(), [(q.part_codes(), q.grid(), FORMATS[0])])


def damaged(**change: object) -> dict:
    meta = quantize_tiles(weight(12, 128), TILE, choices(0), FORMATS).meta()
    meta["parts"][1]["mask"] = meta["parts"][1]["mask"] | change
    return meta


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 3},
        {"cols": 8},
        {"count": 1},
        {"cols": 0},
        {"rows": 24},
        {"rows": "4"},
        {"codec": "bitmap"},
        {"more": 1},
    ],
)
def test_damaged_descriptions_are_refused(change: dict) -> None:
    with pytest.raises(FormatError):
        tensor_specs(damaged(**change))


def test_damaged_owners_are_refused() -> None:
    q = quantize_tiles(weight(12, 128), TILE, torch.arange(12).reshape(3, 4) % 2, FORMATS[:2])
    for key, value in (("mask", 0x56), ("mask", 0xFF), ("part1_mask", 0xA9)):
        tensors = {k: t.clone() for k, t in q.tensors().items()}
        tensors[key][0] = value
        with pytest.raises(FormatError, match="tiles mask is damaged|overlaps"):
            QuantizedTensor.from_tensors(q.meta(), tensors)
    swapped = {k: t.clone() for k, t in q.tensors().items()}
    swapped["part1_mask"] = swapped["mask"]  # counts agree, places overlap
    with pytest.raises(FormatError, match="overlaps"):
        QuantizedTensor.from_tensors(q.meta(), swapped)


def test_parts_out_of_order_are_refused() -> None:
    w = weight(12, 128)
    tiled = quantize_tiles(w, TILE, choices(0).clamp(max=1), FORMATS[:2])
    mixed = with_exceptions(tiled, w, w > 2, "raw_fp16").meta()
    for order in ((2, 0, 1), (0, 2, 1), (2,)):
        with pytest.raises(FormatError, match="first part is dense"):
            tensor_specs(mixed | {"parts": [mixed["parts"][i] for i in order]})
    dense = quantize(w, FORMATS[2]).meta()["parts"]
    with pytest.raises(FormatError, match="first part is dense"):
        tensor_specs({"shape": [12, 128], "parts": dense + mixed["parts"][:1]})


def test_formats_nobody_chooses_leave_no_part() -> None:
    formats = [*FORMATS, Format.parse("kmeans2-channel")]
    q = quantize_tiles(weight(12, 128), TILE, torch.full((3, 4), 1), formats)
    assert [p.meta()["format"] for p in q.parts] == ["uint3-tile4x32"]
