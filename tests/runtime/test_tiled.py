"""Packed layers over tiles of different widths: the values of the tiles, whatever meets in one matrix."""

import pytest
import torch

from lowbit.formats import Format, quantize_tiles, with_exceptions
from lowbit.runtime import PackedConv2d, PackedEmbedding, PackedLinear
from lowbit.runtime.kernel_weight import dense_weight
from lowbit.runtime.tiled import fitting

MIXES = {
    "unsigned": ["uint2-g16", "uint3-tile8x32", "uint4-g32"],
    "signed": ["int2-g16", "int3-channel", "int5-tensor"],
    "with and without a zero": ["int4-g32", "uint2-g32-zreal", "ternary-g8"],
    "tables": ["nf4-g32", "fp4_e2m1-g16-e8m0-mx", "int2-g16"],
    "more levels than fit": ["nf4-g32", "int8-g32", "fp8_e4m3-channel"],
    "a table for each row": ["kmeans2-channel", "int2-g16"],
    "tables only": ["kmeans2-channel", "kmeans3-tensor"],
}


def tiled(formats: list[str], out: int = 24, in_: int = 128, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(out, in_, generator=random)
    choice = torch.randint(-1, len(formats), (out // 8, in_ // 32), generator=random)
    choice[0, : len(formats)] = torch.arange(len(formats))
    return w, quantize_tiles(w, (8, 32), choice, [Format.parse(f) for f in formats])


@pytest.mark.parametrize("mix", MIXES)
def test_a_linear_layer_of_tiles(mix: str) -> None:
    w, qt = tiled(MIXES[mix])
    for q in (qt, with_exceptions(qt, w, w.abs() > 2, "raw_fp16")):
        layer, w_hat = PackedLinear.from_quantized(q), q.dequantize()
        for tokens in (1, 9):
            x = torch.randn(tokens, 128)
            assert torch.allclose(layer(x), x @ w_hat.T, atol=2e-4)
            layer.activations = "int8"
            assert float((layer(x) - x @ w_hat.T).norm() / (x @ w_hat.T).norm()) < 0.03
            layer.activations = "float"


def test_what_fits() -> None:
    assert fitting(tiled(MIXES["unsigned"])[1]) == [0, 1, 2]
    assert dense_weight(tiled(MIXES["unsigned"])[1]).bits == 4
    assert dense_weight(tiled(["int2-g16", "int3-g16"])[1]).bits == 3
    assert fitting(tiled(MIXES["a table for each row"])[1]) == [1]


def test_embeddings_and_convolutions() -> None:
    _, qt = tiled(MIXES["unsigned"])
    ids = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(PackedEmbedding.from_quantized(qt)(ids), qt.dequantize()[ids])
    w = torch.randn(8, 8, 2, 2)
    q = quantize_tiles(
        w, (4, 8), torch.tensor([[0, 1, 1, -1], [1, 0, 0, 1]]), [Format.parse(f) for f in ("uint2-g8", "uint4-g8")]
    )
    x = torch.randn(2, 8, 5, 5)
    assert torch.allclose(PackedConv2d.from_quantized(q)(x), torch.nn.functional.conv2d(x, q.dequantize()), atol=1e-4)
