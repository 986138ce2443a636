"""Formats: level sets, blocks, scale rules, mask codecs, packing, and the quantized tensor that counts its own bits."""

from lowbit.formats.blocks import Blocks
from lowbit.formats.format import Format, Grid, decode, encode, fit
from lowbit.formats.levels import LevelSet, levels
from lowbit.formats.packing import pack_bits, unpack_bits
from lowbit.formats.tensor import Part, QuantizedTensor, quantize, tensor_specs

__all__ = [
    "Blocks",
    "Format",
    "Grid",
    "LevelSet",
    "Part",
    "QuantizedTensor",
    "decode",
    "encode",
    "fit",
    "levels",
    "pack_bits",
    "quantize",
    "tensor_specs",
    "unpack_bits",
]
