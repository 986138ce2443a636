"""Mask codecs (bitmap first; CSR and gap codes follow)."""

from typing import Any

import torch
from torch import Tensor

from lowbit.formats.packing import pack_bits, packed_bytes, unpack_bits


def encode_mask(mask: Tensor, codec: str = "bitmap") -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """mask (out, in) bool -> (meta, tensors named mask_*)."""
    return {"codec": "bitmap", "count": int(mask.sum())}, {"mask": pack_bits(mask.to(torch.uint8), 1)}


def decode_mask(meta: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The inverse of `encode_mask`."""
    return unpack_bits(tensors["mask"], 1, shape[0] * shape[1]).bool().reshape(shape)


def mask_specs(meta: dict[str, Any], shape: tuple[int, int]) -> "dict[str, tuple[tuple[int, ...], torch.dtype]]":
    """Name -> (shape, dtype) of the stored mask tensors."""
    return {"mask": ((packed_bytes(shape[0] * shape[1], 1),), torch.uint8)}
