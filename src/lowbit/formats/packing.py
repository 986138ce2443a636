"""Bit packing: codes of 1 to 8 bits as one little-endian bit stream; three-level codes five to a byte.

    bits:  code i occupies bits [i*b, (i+1)*b) of the stream, low bits first          ceil(n*b/8) bytes
    trits: byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4   (3**5 = 243 <= 256)              ceil(n/5) bytes, 1.6 bits a code

Padding (at most 7 bits, or four trits of 0) stands at the very end. Both ways run without a Python loop over codes.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError

_TRITS = (1, 3, 9, 27, 81)


def packed_bytes(n: int, bits: int, packing: str = "bits") -> int:
    """Bytes that n codes take."""
    return -(-n // 5) if packing == "trits" else -(-n * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (any shape, uint8 below 2**bits) into a 1-D uint8 stream. Raises FormatError on larger codes.

    >>> pack_bits(torch.tensor([0, 1, 2, 2], dtype=torch.uint8), 2).tolist()
    [164]
    """
    flat, n = _checked(codes, 2**bits), codes.numel()
    if bits == 8:
        return flat.clone()
    eights = torch.nn.functional.pad(flat, (0, -n % 8)).reshape(-1, 8)  # 8 codes fill exactly `bits` bytes
    out = torch.zeros(eights.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, byte] |= eights[:, i] << shift
        if shift + bits > 8:
            out[:, byte + 1] |= eights[:, i] >> (8 - shift)
    return out.reshape(-1)[: packed_bytes(n, bits)].clone()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes of a stream, as uint8. Raises FormatError where it is not exactly as long as n codes need."""
    _check_length(packed, packed_bytes(n, bits))
    if bits == 8:
        return packed.clone()
    rows = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    out = torch.empty(rows.shape[0], 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, i] = rows[:, byte] >> shift
        if shift + bits > 8:
            out[:, i] |= rows[:, byte + 1] << (8 - shift)
    return (out & (2**bits - 1)).reshape(-1)[:n].clone()


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes in {0, 1, 2} five to a byte."""
    flat = torch.nn.functional.pad(_checked(codes, 3), (0, -codes.numel() % 5)).reshape(-1, 5)
    weights = torch.tensor(_TRITS, dtype=torch.uint8, device=codes.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The first n trits. Raises FormatError on a wrong length or a byte above 242."""
    _check_length(packed, packed_bytes(n, 2, "trits"))
    if packed.numel() and int(packed.max()) > 242:
        raise FormatError("a byte above 242 is not five trits: the codes are damaged.")
    digits = [(packed // p) % 3 for p in _TRITS]
    return torch.stack(digits, 1).reshape(-1)[:n].clone()


def pack(codes: Tensor, bits: int, packing: str = "bits") -> Tensor:
    """Pack by a level set's (bits, packing)."""
    return pack_trits(codes) if packing == "trits" else pack_bits(codes, bits)


def unpack(packed: Tensor, bits: int, n: int, packing: str = "bits") -> Tensor:
    """Unpack by a level set's (bits, packing)."""
    return unpack_trits(packed, n) if packing == "trits" else unpack_bits(packed, bits, n)


def _checked(codes: Tensor, limit: int) -> Tensor:
    if codes.dtype != torch.uint8:
        raise FormatError(f"codes are {codes.dtype}, not torch.uint8: encode the weights first.")
    if codes.numel() and int(codes.max()) >= limit:
        raise FormatError(f"code {int(codes.max())} does not fit: codes here are 0 .. {limit - 1}.")
    return codes.reshape(-1)


def _check_length(packed: Tensor, n_bytes: int) -> None:
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != n_bytes:
        raise FormatError(f"packed codes are {tuple(packed.shape)} {packed.dtype}, needed ({n_bytes},) torch.uint8.")
