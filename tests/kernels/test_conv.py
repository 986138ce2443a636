"""The int8 convolution: every row against the formula, exactly; any shape, any strides, extreme codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import KernelError, ShapeError
from lowbit.formats import Blocks, Format, Grid, QuantizedTensor, levels, quantize
from lowbit.runtime import conv_kernels as ck
from lowbit.runtime import kernels
from lowbit.runtime.binary_kernels import Geometry, _dot
from lowbit.runtime.conv_layer import PackedConv2d

ISAS = [isa for _, isa, supported in kernels._extension().conv_table() if supported]
G = Geometry


def weight(n: int, c: int, kh: int, kw: int, name: str = "int4", extreme: "int | None" = None) -> QuantizedTensor:
    """Random codes, or all the same; scales of powers of two, so that floats are exact."""
    fmt = Format(levels(name), Blocks(1, -1), scale_dtype="fp32")
    last = len(fmt.levels.values)
    codes = torch.randint(last, (n, c * kh * kw), dtype=torch.uint8)
    codes = codes if extreme is None else codes * 0 + (last - 1 if extreme > 0 else 0)
    return QuantizedTensor.from_codes(codes, Grid(2.0 ** torch.randint(-3, 3, (n, 1))), fmt, (n, c, kh, kw))


def exact(q: np.ndarray, qt: QuantizedTensor, geometry: Geometry, groups: int, scale: float) -> np.ndarray:
    """q (B, C, H, W) integers: the product in int64, times the scales (powers of two)."""
    table = torch.tensor(qt.format.levels.values).long()
    whole = table[qt.part_codes().long()].reshape(qt.shape).numpy()
    return _dot(q, whole, geometry, groups) * qt.grid().scale.numpy().reshape(-1, 1, 1).astype(np.float64) * scale


SHAPES = [  # b, c, h, w, n, kh, kw, groups, geometry
    (1, 1, 1, 1, 1, 1, 1, 1, G()),
    (2, 3, 9, 8, 17, 3, 3, 1, G((1, 1), (1, 1, 1, 1))),
    (1, 64, 7, 7, 33, 3, 3, 1, G((2, 2), (1, 1, 1, 1))),
    (1, 5, 8, 6, 4, 3, 2, 1, G((1, 2), (2, 0, 1, 3), (2, 3))),
    (2, 12, 6, 5, 8, 2, 2, 4, G((2, 1), (0, 1, 1, 0))),
    (1, 130, 5, 6, 130, 3, 3, 130, G((1, 1), (1, 1, 1, 1))),
    (2, 7, 6, 9, 7, 2, 3, 7, G((2, 2), (1, 1, 2, 2), (2, 1))),
    (1, 6, 4, 4, 12, 3, 3, 6, G((1, 1), (1, 1, 1, 1))),
    (1, 16, 20, 21, 40, 1, 1, 1, G()),
    (1, 2, 3, 3, 5, 3, 3, 1, G((3, 3), (5, 5, 5, 5))),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int4", "ternary", "binary", "int2", "int3", "int8"])
def test_every_row_is_the_formula(isa: str, name: str) -> None:
    torch.manual_seed(0)
    grid = ck.IntGrid(0.25, -100, 90)
    for b, c, h, w, n, kh, kw, groups, geometry in SHAPES:
        qt = weight(n, c // groups, kh, kw, name)
        x = torch.randn(b, c, h, w) * 10
        q = np.clip(np.rint(x.numpy() / np.float32(0.25)), -100, 90).astype(np.int64)
        plan = ck.Plan(ck.weight(qt, groups), geometry, None, grid, isa)
        y, none = plan.run(x)
        assert none is None and np.array_equal(y.numpy(), exact(q, qt, geometry, groups, 0.25)), (c, n, groups)
        levels_in = torch.from_numpy(q.transpose(0, 2, 3, 1).astype(np.int8)).contiguous()
        assert torch.equal(plan.run(levels_in)[0], y), "int8 in"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("extreme", [-1, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_sum_overflows(isa: str, extreme: int, sign: int) -> None:
    """All codes and all activations extreme, up to the longest sum."""
    for name in ("int4", "int8", "binary", "ternary"):
        for c, groups, kernel in ((4000, 1, 4), (70, 70, 11), (32, 1, 3)):
            qt = weight(groups if groups > 1 else 3, c // groups, kernel, kernel, name, extreme)
            x = torch.full((1, c, kernel, kernel), 1000.0 * sign)
            y, _ = ck.Plan(ck.weight(qt, groups), G(), None, ck.IntGrid(1.0), isa).run(x)
            wanted = exact(np.full(x.shape, 127 * sign), qt, G(), groups, 1.0)
            bound = (c // groups * kernel**2 / 32 + 4) * 2.0**-24  # the sums are exact, adding up segments is not
            assert (np.abs(y.numpy() - wanted) <= bound * np.abs(wanted)).all()
            scalar, _ = ck.Plan(ck.weight(qt, groups), G(), None, ck.IntGrid(1.0), "scalar").run(x)
            assert torch.equal(y, scalar)


@pytest.mark.parametrize("isa", ISAS)
def test_what_follows_the_sums(isa: str) -> None:
    torch.manual_seed(1)
    for c, groups in ((6, 1), (6, 2), (6, 6)):
        w = ck.weight(weight(6, c // groups, 3, 3), groups, gain=torch.tensor([1.0, -2, 0, 3, -0.5, 1]))
        plan = ck.Plan(w, G((1, 1), (1, 1, 1, 1)), torch.randn(6), isa=isa)
        x, residual, following = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7), ck.IntGrid(0.3, 0, 15)
        bare, _ = plan.run(x)
        y, q = plan.run(x, residual, True, following)
        assert torch.equal(y, (bare + residual).relu())
        wanted = (y / 0.3).round().clamp(0, 15).permute(0, 2, 3, 1)
        assert q.dtype == torch.int8 and torch.equal(q.float(), wanted)
        none, alone = plan.run(x, residual, True, following, want_y=False)
        assert none is None and torch.equal(alone, q)


@pytest.mark.parametrize("isa", ISAS)
def test_images_of_any_strides_and_any_numbers(isa: str) -> None:
    plan = ck.Plan(ck.weight(weight(5, 4, 3, 3)), G((1, 1), (1, 1, 1, 1)), isa=isa)
    wide = torch.randn(3, 8, 10, 12)
    views = [wide[:, ::2], wide[:, :4, ::2], wide[:, :4, :, 1:], wide[:, :4].transpose(2, 3), wide[:, :4, 0:1, 0:1],
             wide.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, 1:5], wide[:, :1].expand(-1, 4, -1, -1),
             wide[:, :4, :1, :1].expand(-1, -1, 3, 2), wide[:0, :4]]  # fmt: skip
    for x in views:
        assert torch.equal(plan.run(x)[0], plan.run(x.clone(memory_format=torch.contiguous_format))[0])
    x = wide[:, :4].clone()
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2] = float("nan"), float("inf"), 0
    y, _ = plan.run(x)
    assert y[:2].isnan().all() and (y[2] == 0).all(), "one scale an image: NaN says so everywhere"
    fixed = ck.Plan(ck.weight(weight(5, 4, 3, 3)), G(), None, ck.IntGrid(0.5, -3, 7), isa)
    low = x.nan_to_num(-99.0, 99.0)
    assert torch.equal(fixed.run(x)[0], fixed.run(low)[0]), "on a fixed grid NaN is the lowest level"


def test_threads_do_not_matter() -> None:
    plan = ck.Plan(ck.weight(weight(40, 32, 3, 3)), G((1, 1), (1, 1, 1, 1)))
    x, before = torch.randn(2, 32, 23, 19), torch.get_num_threads()
    one, _ = plan.run(x)
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(plan.run(x)[0], one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_a_forced_row_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", isa)
    assert ck.checked_isa() == isa and [r["active"] for r in ck.rows() if r["isa"] == isa] == [True]
    assert all(r["selfcheck"] == "ok" for r in ck.rows() if r["isa"] in ISAS)


def test_a_wrong_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ck, "_agrees", lambda isa: False)
    ck._checked.cache_clear()
    with pytest.raises(KernelError, match="conv_int8.* computes wrong results"):
        ck.checked_isa()
    ck._checked.cache_clear()


def reference(layer: PackedConv2d, x: Tensor) -> Tensor:
    most = x.abs().amax((1, 2, 3), keepdim=True) / 127
    q = (x / most).round().clamp(-127, 127)
    bias = None if layer.bias is None else layer.bias.double()
    conv = torch.nn.functional.conv2d(
        q.double(), layer.dequantize().double(), None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    return conv * most + (0 if bias is None else bias.reshape(-1, 1, 1))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_layer_runs_on_it(groups: int) -> None:
    torch.manual_seed(2)
    for name in ("int4-channel", "nf4-channel", "int8-tensor"):
        qt = quantize(torch.randn(8, 8 // groups, 3, 3), Format.parse(name))
        layer = PackedConv2d.from_quantized(qt, torch.randn(8), "int8", stride=2, padding=1, groups=groups)
        x = torch.randn(2, 8, 9, 7)
        wanted = reference(layer, x)
        error = (layer(x).double() - wanted).abs().max() / wanted.abs().max()
        assert error < (0.02 if name[0] == "n" else 1e-6), "levels of NF4 are rounded to int8"
        assert torch.equal(layer(x[0]), layer(x[:1])[0]) and layer(x.half()).dtype == torch.float16
        with pytest.raises(KernelError, match="no gradient"):
            layer(x.requires_grad_()).sum().backward()


def test_errors() -> None:
    plan = ck.Plan(ck.weight(weight(4, 3, 3, 3)), G())
    with pytest.raises(KernelError, match="5 channels, needed 3"):
        plan.run(torch.randn(1, 5, 4, 4))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        plan.run(torch.randn(1, 3, 2, 4))
    with pytest.raises(KernelError, match="int8 inputs need the grid"):
        plan.run(torch.zeros(1, 4, 4, 3, dtype=torch.int8))
    with pytest.raises(KernelError, match="residual is"):
        plan.run(torch.randn(1, 3, 4, 4), torch.randn(1, 4, 1, 1))
    for grid in (ck.IntGrid(-1.0), ck.IntGrid(1.0, -128), ck.IntGrid(1.0, 0, 200), ck.IntGrid(float("nan"))):
        with pytest.raises(KernelError, match="a grid of int8"):
            ck.Plan(ck.weight(weight(4, 3, 3, 3)), G(), None, grid)
    with pytest.raises(KernelError, match="has no int8 convolution"):
        ck.weight(quantize(torch.randn(4, 4, 4, 4), Format.parse("uint4-g16")))
