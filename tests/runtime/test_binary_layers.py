"""Layers of bits times bits against their own formula in torch: on levels exactly, after float steps closely."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import FormatError, KernelError, ShapeError
from lowbit.formats import Format, quantize
from lowbit.runtime import prepare
from lowbit.runtime.binary_layers import PackedBinaryConv2d, PackedBinaryLinear


def levels(*shape: int, ternary: bool = False) -> Tensor:
    return torch.randint(-1, 2, shape).float() if ternary else torch.where(torch.randn(*shape) > 0, 1.0, -1.0)


def options(inputs: str, channels: int) -> dict:
    high = torch.rand(channels) * 0.4
    return {"inputs": inputs, "threshold": high, "low": high - 0.6 if inputs == "ternary" else None}


@pytest.mark.parametrize("inputs", ["sign", "unit", "ternary"])
@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_its_formula(inputs: str, ternary: bool, groups: int) -> None:
    w = levels(6, 10 // groups, 3, 3, ternary=ternary)
    conv = {"stride": 2, "padding": (2, 1), "dilation": (1, 2), "groups": groups}
    layer = PackedBinaryConv2d.from_float(w, **options(inputs, 10), **conv)
    x = torch.randn(2, 10, 9, 8)
    assert torch.equal(layer(x), layer.reference(x)), "levels: exact"
    scaled = PackedBinaryConv2d.from_float(w, torch.rand(6), torch.randn(6), **options(inputs, 10), **conv)
    assert torch.allclose(scaled(x), scaled.reference(x), atol=1e-5)
    assert torch.equal(scaled(x[0]), scaled(x)[0]) and scaled(x.half()).dtype == torch.float16


@pytest.mark.parametrize("inputs", ["sign", "unit", "ternary"])
@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("pad", [-1, 0, 1])
def test_a_depthwise_convolution_is_its_formula(inputs: str, ternary: bool, pad: int) -> None:
    w, pad = levels(21, 1, 3, 2, ternary=ternary), pad if inputs == "sign" else 0
    conv = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 21, "pad": pad}
    layer = PackedBinaryConv2d.from_float(w, **options(inputs, 21), **conv)
    x = torch.randn(2, 21, 9, 8)
    x[0, :, 0, 0] = layer.high  # a tie is up
    assert torch.equal(layer(x), layer.reference(x)), "levels: exact"
    assert layer._ready().depthwise is not None
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer.reference(x))
    bits, _ = layer._ready().plan.run(x)
    assert torch.equal(layer(x), bits), "as the kernels of bits have it"
    extra = {"prelu": torch.rand(3, 21)}
    scaled = PackedBinaryConv2d.from_float(w, torch.rand(21), torch.randn(21), **options(inputs, 21), **conv)
    bent = PackedBinaryConv2d.from_float(w, torch.rand(21), torch.randn(21), **options(inputs, 21), **conv, **extra)
    for one in (scaled, bent):
        residual = torch.randn_like(one(x))
        assert torch.allclose(one(x, residual), one.reference(x, residual), atol=1e-5)


@pytest.mark.parametrize("inputs", ["sign", "unit", "ternary"])
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 3, 37), (0, 37)])
def test_a_linear_layer_is_its_formula(inputs: str, shape: tuple[int, ...]) -> None:
    given = options(inputs, 37)
    layer = PackedBinaryLinear.from_float(levels(11, 37), **given)
    x = torch.randn(shape)
    up = (x >= given["threshold"]).float()
    a = 2 * up - 1 if inputs == "sign" else up
    a = a if given["low"] is None else a - (x <= given["low"]).float()
    assert torch.equal(layer(x), a @ layer.dequantize().T)
    assert torch.equal(layer(x, torch.ones(*shape[:-1], 11)), a @ layer.dequantize().T + 1)


@pytest.mark.parametrize("pad", [-1, 0, 1])
def test_outside_the_image_lies_the_level_pad(pad: int) -> None:
    layer = PackedBinaryConv2d.from_float(levels(5, 33, 3, 3), padding="same", pad=pad)
    x = torch.randn(1, 33, 1, 2)
    assert torch.equal(layer(x), layer.reference(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_batch_norm_is_folded_whatever_its_sign(bias: bool) -> None:
    norm = nn.BatchNorm2d(7).eval()
    for t in (norm.running_mean, norm.weight.data, norm.bias.data):
        assert t is not None
        t.normal_()
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2)
    layer = PackedBinaryConv2d.from_float(levels(7, 5, 3, 3), torch.rand(7), torch.randn(7) if bias else None)
    x = torch.randn(2, 5, 6, 6)
    want = norm(layer(x))
    assert torch.allclose(layer.fold(norm)(x), want, atol=1e-4)
    with pytest.raises(FormatError, match="running statistics"):
        layer.fold(nn.GroupNorm(1, 7))


def test_bits_pass_from_layer_to_layer() -> None:
    first = PackedBinaryConv2d.from_float(levels(40, 8, 3, 3), torch.rand(40), prelu=torch.randn(3, 40), padding=1)
    second = PackedBinaryConv2d.from_float(levels(9, 40, 3, 3), threshold=torch.randn(40), padding=1)
    x, residual = torch.randn(2, 8, 5, 5), torch.randn(2, 40, 5, 5)
    y, bits = first.with_bits(x, second.high, residual)
    assert y is not None and torch.allclose(y, first.reference(x, residual), atol=1e-5)
    assert torch.equal(second(bits), second(y))
    assert first.with_bits(x, second.high, residual, want_y=False)[0] is None


def test_a_quantized_tensor_becomes_a_layer() -> None:
    w = torch.randn(6, 4, 3, 3)
    for name in ("binary-channel", "ternary-channel", "binary-tensor"):
        qt = quantize(w, Format.parse(name))
        layer = PackedBinaryConv2d.from_quantized(qt, padding=1)
        x = torch.randn(1, 4, 5, 5)
        a = torch.where(x >= 0, 1.0, -1.0)
        assert torch.allclose(layer(x), nn.functional.conv2d(a, qt.dequantize(), padding=1), atol=1e-5)
        assert set(layer.state_dict()) == set(qt.tensors()), "thresholds of 0 are not stored"
    with pytest.raises(FormatError, match="no format of a binary layer"):
        PackedBinaryConv2d.from_quantized(quantize(w, Format.parse("int4-channel")))(torch.randn(1, 4, 5, 5))


def test_copies_pickles_state_and_changed_buffers() -> None:
    layer = PackedBinaryLinear.from_float(levels(6, 20), torch.rand(6), torch.randn(6))
    x = torch.randn(3, 20)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y) and torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other = PackedBinaryLinear.from_float(levels(6, 20), torch.rand(6), torch.randn(6))
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    layer.high = torch.full((20,), 9.0)
    assert torch.equal(layer(x), layer(torch.full((3, 20), -1.0)))


def test_export_and_fakes_see_the_operators() -> None:
    layer = PackedBinaryConv2d.from_float(levels(8, 4, 3, 3), padding=1)
    x = torch.randn(2, 4, 6, 6)
    assert prepare(layer) == 1
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_what_cannot_be_is_refused() -> None:
    layer = PackedBinaryConv2d.from_float(levels(8, 4, 3, 3))
    with pytest.raises(ShapeError, match="needs .batch, 4, height, width"):
        layer(torch.randn(1, 3, 5, 5))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        layer(torch.randn(1, 4, 2, 5))
    with pytest.raises(KernelError, match="no gradient"):
        layer(torch.randn(1, 4, 5, 5, requires_grad=True))
    with pytest.raises(FormatError, match="not -1, 0 and 1"):
        PackedBinaryLinear.from_float(torch.randn(3, 4))
    with pytest.raises(FormatError, match="two thresholds"):
        PackedBinaryLinear.from_float(levels(3, 4), inputs="ternary")
    with pytest.raises(FormatError, match="pad=1"):
        PackedBinaryConv2d.from_float(levels(3, 4, 1, 1), inputs="unit", pad=1)
    with pytest.raises(ShapeError, match="gain has shape"):
        PackedBinaryLinear.from_float(levels(3, 4), gain=torch.ones(4))
    with pytest.raises(ShapeError, match="features"):
        PackedBinaryLinear.from_float(levels(3, 4))(torch.randn(2, 5))
