"""Layers: the parts that papers add to an architecture. Plain modules; one file each."""

from lowbit.layers._spec import LayerSpec, keep_float
from lowbit.layers.binary_block import BinaryBlock
from lowbit.layers.euclid import EuclidConv2d, EuclidLinear, to_euclid
from lowbit.layers.random_bias import random_bias_
from lowbit.layers.rprelu import RPReLU

__all__ = [
    "BinaryBlock",
    "EuclidConv2d",
    "EuclidLinear",
    "LayerSpec",
    "RPReLU",
    "keep_float",
    "random_bias_",
    "to_euclid",
]
