"""Bit streams: right against plain Python, the same bytes for ever, and no code accepted that does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import pack_bits, unpack_bits
from lowbit.formats.packing import pack_trits, packed_bytes, unpack_trits


def slow_pack(codes: list[int], bits: int) -> bytes:
    """One big integer: code i occupies bits [i*b, (i+1)*b)."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def as_codes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))


@given(streams())
def test_packs_like_one_big_integer_and_back(stream: tuple[int, list[int]]) -> None:
    bits, codes = stream
    packed = pack_bits(as_codes(codes), bits)
    assert bytes(packed.tolist()) == slow_pack(codes, bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(st.lists(st.integers(0, 2), max_size=23))
def test_trits_go_five_to_a_byte_and_back(codes: list[int]) -> None:
    padded = codes + [0] * (-len(codes) % 5)
    expected = [sum(c * 3**k for k, c in enumerate(padded[i : i + 5])) for i in range(0, len(padded), 5)]
    packed = pack_trits(as_codes(codes))
    assert packed.tolist() == expected and len(packed) == packed_bytes(len(codes), 2, "trits")
    assert unpack_trits(packed, len(codes)).tolist() == codes


GOLDEN = {  # changing these lines changes people's files
    1: "ffff07",
    2: "f5f5f5f535",
    3: "e9df6ce9df6ce901",
    4: "d1f795bb597f1d33d107",
    5: "a19d57d2dea9bcd3c298b15f",
    6: "41733e45b2ed69f91e6d38ce517f03",
    7: "81c6e959486ef6e9f2fbd00a8fe6d1de0d",
    8: "010d274f85c91b7be965ef872de1a373513d37",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_bytes(bits: int) -> None:
    codes = [(7 * i * i + 5 * i + 1) % 2**bits for i in range(19)]
    assert bytes(pack_bits(as_codes(codes), bits).tolist()).hex() == GOLDEN[bits]


def test_golden_trits() -> None:
    assert pack_trits(as_codes([2, 1, 0, 0, 1, 2, 2, 2, 2, 2, 0, 1])).tolist() == [86, 242, 3]


def test_any_shape_and_stride_is_flattened_in_row_major_order() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6) % 8
    assert torch.equal(pack_bits(codes.T, 3), pack_bits(codes.T.contiguous().reshape(-1), 3))
    assert pack_bits(torch.zeros(0, 7, dtype=torch.uint8), 5).numel() == 0


def test_packing_does_not_share_memory() -> None:
    codes = as_codes([1, 2, 3])
    packed = pack_bits(codes, 8)
    codes[0] = 9
    assert packed.tolist() == [1, 2, 3]
    back = unpack_bits(packed, 8, 3)
    packed[0] = 7
    assert back.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bits(as_codes([0, 8]), 3), r"code 8 does not fit: codes here are 0 \.\. 7"),
        (lambda: pack_trits(as_codes([3])), "code 3 does not fit"),
        (lambda: pack_bits(torch.zeros(3), 3), "not torch.uint8: encode the weights first"),
        (lambda: unpack_bits(as_codes([0, 0]), 3, 8), r"needed \(3,\)"),
        (lambda: unpack_bits(as_codes([0, 0, 0, 0]), 3, 8), r"needed \(3,\)"),
        (lambda: unpack_trits(as_codes([0, 0]), 5), r"needed \(1,\)"),
        (lambda: unpack_bits(torch.zeros(3), 3, 8), "torch.float32, needed"),
        (lambda: unpack_bits(torch.zeros(1, 3, dtype=torch.uint8), 3, 8), r"needed \(3,\)"),
        (lambda: unpack_trits(as_codes([243]), 5), "above 242"),
    ],
)
def test_refuses_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()
