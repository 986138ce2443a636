"""Formats: level sets, blocks, scale rules, mask codecs, packing, and the quantized tensor that counts its own bits."""

from lowbit.formats.blocks import Blocks
from lowbit.formats.exceptions import split_quantize, with_exceptions, with_part
from lowbit.formats.format import Format, Grid, decode, encode, fit
from lowbit.formats.kmeans import kmeans_table
from lowbit.formats.levels import LevelSet, levels
from lowbit.formats.masks import decode_mask, encode_mask, mask_specs
from lowbit.formats.packing import pack_bits, unpack_bits
from lowbit.formats.tensor import Part, QuantizedTensor, quantize, tensor_specs
from lowbit.formats.tiles import from_tiles, put_tiles, quantize_tiles, take_tiles

__all__ = [
    "Blocks",
    "Format",
    "Grid",
    "LevelSet",
    "Part",
    "QuantizedTensor",
    "decode",
    "decode_mask",
    "encode",
    "encode_mask",
    "fit",
    "from_tiles",
    "kmeans_table",
    "levels",
    "mask_specs",
    "pack_bits",
    "put_tiles",
    "quantize",
    "quantize_tiles",
    "split_quantize",
    "take_tiles",
    "tensor_specs",
    "unpack_bits",
    "with_exceptions",
    "with_part",
]
