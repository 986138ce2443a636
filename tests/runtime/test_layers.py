"""Packed layers against the dequantized weight: every format, exceptions, shapes, loading, moving, compiling."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import ArtifactError, FormatError, KernelError, ShapeError
from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.formats.exceptions import with_exceptions
from lowbit.runtime import PackedConv2d, PackedEmbedding, PackedLinear, ops, prepare, set_activations

FORMATS = (
    "int1-channel",
    "uint2-g16",
    "uint3-g16-zreal",
    "uint4-g16",
    "int4-g48-fp32",
    "int5-channel",
    "uint6-g12-bf16",
    "uint7-g24",
    "int8-g16-double",
    "uint8-tensor",
    "binary-g16",
    "ternary-g16",
    "ternary-tensor",
    "pot3-g16",
    "pot4nz-channel",
    "nf4-g16-double",
    "mxfp4",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxint8",
    "int4-tile4x16",
    "kmeans3-channel",
    "kmeans4-tensor",
    "kmeans2-g32",
    "kmeans3-g16-shared",
    "kmeans2-g16-dual",
)


def packed(fmt: str, out: int = 20, in_: int = 96, bias: bool = True) -> PackedLinear:
    return PackedLinear.from_quantized(
        quantize(torch.randn(out, in_), Format.parse(fmt)), torch.randn(out) if bias else None
    )


def close(y: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((y - want).norm() <= tolerance * want.norm())


def with_outliers(qt: QuantizedTensor, w: Tensor, every: int = 7) -> QuantizedTensor:
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[::every] = True
    return with_exceptions(qt, 3 * w, mask.reshape(w.shape))


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_computes_from_bits_what_the_weight_would(fmt: str) -> None:
    layer, x = packed(fmt), torch.randn(2, 5, 96)
    want = F.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert close(layer(x), want)
    layer.activations = "int8"
    exact_table = not fmt.startswith(("nf4", "kmeans", "mxfp6", "mxfp8", "pot4nz"))
    assert close(layer(x), want, 0.012 if exact_table else 0.02)
    assert sum(t.nbytes for t in layer.buffers()) == layer.quantized().nbytes


@pytest.mark.parametrize("fmt", ["uint3-channel", "int5-channel", "ternary-channel", "kmeans3-channel"])
def test_rows_that_do_not_end_on_bytes(fmt: str) -> None:
    for out, in_ in ((1, 1), (3, 5), (7, 33), (5, 301)):
        layer, x = packed(fmt, out, in_), torch.randn(3, in_)
        assert close(layer(x), F.linear(x.double(), layer.dequantize().double(), layer.bias.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_leading_shape(dtype: torch.dtype) -> None:
    layer = packed("uint4-g16", bias=False)
    for shape in ((96,), (0, 96), (1, 1, 1, 96), (2, 3, 96)):
        x = torch.randn(shape, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 20)
        assert torch.equal(y, F.linear(x.float(), layer.dequantize()).to(dtype)) or close(
            y.float(), F.linear(x.float(), layer.dequantize()), 4e-3
        )
    strided = torch.randn(96, 7).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    with pytest.raises(ShapeError, match="95 features"):
        layer(torch.randn(2, 95))


def test_int8_is_the_integer_product_of_rounded_activations() -> None:
    """Against the formula: x rounded per token and group of 16, times the exact weight."""
    layer, x = packed("uint4-g16", bias=False), torch.randn(9, 96)
    groups = x.double().reshape(9, 6, 16)
    step = groups.abs().amax(-1, keepdim=True) / 127
    x_hat = ((groups / step).round() * step).reshape(9, 96)
    layer.activations = "int8"
    assert close(layer(x), x_hat @ layer.dequantize().double().T)


def test_int8_tables_are_exact_where_they_can_be() -> None:
    for name in ("int4", "uint8", "int8", "ternary", "pot4", "pot3nz_s2", "fp4_e2m1", "mxint8"):
        table = Format.parse(f"{name}-channel").levels.table()[None]
        of = ops.int8_levels(table)
        assert of.error == 0 and torch.equal(of.base + of.step * of.levels, table), name
    for name in ("nf4", "pot4nz", "fp6_e3m2", "fp8_e4m3"):
        of = ops.int8_levels(Format.parse(f"{name}-channel").levels.table()[None])
        assert 0 < of.error <= 1 / 254 + 1e-6
    odd = torch.tensor([[0.0, 2.0, 5.0, 250.0], [3.0, 3.0, 3.0, 3.0]])
    assert ops.int8_levels(odd).error == 0
    with pytest.raises(KernelError, match="NaN"):
        ops.int8_levels(torch.tensor([[0.0, float("nan")]]))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_exceptions_are_added_on_top(activations: str) -> None:
    w = torch.randn(20, 96)
    qt = with_outliers(quantize(w, Format.parse("uint2-g16")), w)
    layer, x = PackedLinear.from_quantized(qt, activations=activations), torch.randn(4, 96)
    assert set(layer.state_dict()) == set(qt.tensors()) and any(k.startswith("part1_") for k in qt.tensors())
    assert close(layer(x), x @ qt.dequantize().T, 1e-5 if activations == "float" else 0.012)
    embedding, ids = PackedEmbedding.from_quantized(qt), torch.tensor([[19, 0, 0], [3, 7, 19]])
    assert torch.allclose(embedding(ids), qt.dequantize()[ids], atol=1e-6)


@pytest.mark.parametrize("fmt", ["int8-g16", "uint4-g16", "ternary-channel", "kmeans3-channel", "uint3-channel"])
def test_embedding_decodes_rows(fmt: str) -> None:
    qt = quantize(torch.randn(30, 48), Format.parse(fmt))
    layer = PackedEmbedding.from_quantized(qt, padding_idx=0)
    for ids in (
        torch.tensor([[29, 0], [5, 5]]),
        torch.tensor(3),
        torch.empty(0, dtype=torch.long),
        torch.tensor([1, 2], dtype=torch.int32),
    ):
        assert torch.allclose(layer(ids), qt.dequantize()[ids.long()], atol=1e-6)
    with pytest.raises(IndexError, match="30"):
        layer(torch.tensor([30]))
    assert layer.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "conv",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "groups": 4, "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_conv2d(conv: dict) -> None:
    plain = nn.Conv2d(8, 12, (3, 2) if conv.get("padding") != "same" else 3, **conv).requires_grad_(False)
    qt = quantize(plain.weight, Format.parse("uint4-channel"))
    options = {k: v for k, v in conv.items() if k != "bias"}
    layer = PackedConv2d.from_quantized(qt, plain.bias, **options)
    plain.weight.copy_(qt.dequantize())
    for shape in ((2, 8, 9, 11), (8, 9, 11), (0, 8, 9, 11)):
        x = torch.randn(shape)
        want = plain(x)
        assert layer(x).shape == want.shape and torch.allclose(layer(x), want, atol=1e-4)
    layer.activations = "int8"
    assert close(layer(torch.ones(1, 8, 9, 11)), plain(torch.ones(1, 8, 9, 11)), 0.01)
    with pytest.raises(ShapeError, match="needs"):
        layer(torch.randn(2, 7, 9, 9))


def test_conv2d_groups_with_exceptions_and_tables_per_row() -> None:
    w = torch.randn(6, 2, 3, 3)
    for fmt in ("uint3-channel", "kmeans2-channel"):
        qt = with_outliers(quantize(w, Format.parse(fmt)), w, 5)
        layer, x = PackedConv2d.from_quantized(qt, groups=3), torch.randn(2, 6, 5, 5)
        assert torch.allclose(layer(x), F.conv2d(x, qt.dequantize(), groups=3), atol=1e-4)


def test_made_empty_on_meta_and_filled_by_a_loader() -> None:
    full, x = packed("uint3-g16"), torch.randn(3, 96)
    empty = PackedLinear(full.meta, bias=True, device="meta")
    assert empty(x.to("meta")).shape == (3, 20)
    with pytest.raises(ArtifactError, match="before its tensors were loaded"):
        empty(x)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty(x), full(x))
    onto = PackedLinear(full.meta, bias=True)
    onto.load_state_dict(full.state_dict())
    assert torch.equal(onto(x), full(x))


def test_new_buffers_make_new_results() -> None:
    a, b, x = packed("uint4-g16"), packed("uint4-g16"), torch.randn(3, 96)
    want = b(x)
    a(x)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(x), want), "copied in place"
    c = packed("uint4-g16")
    c(x)
    for key in ("codes", "scale", "zero"):
        setattr(c, key, getattr(b, key).clone())
    c.bias = b.bias
    assert torch.equal(c(x), want), "assigned one by one, as loaders do"


def test_casting_a_model_leaves_the_stored_bits_alone() -> None:
    layer, x = packed("uint4-g16"), torch.randn(3, 96)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for cast in (torch.float64, torch.bfloat16):
        layer.to(cast)
        assert layer.bias.dtype == cast
        assert all(
            torch.equal(v, before[k]) and v.dtype == before[k].dtype
            for k, v in layer.state_dict().items()
            if k != "bias"
        )
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").codes.is_meta
    assert layer.to_empty(device="cpu").scale.dtype == torch.float16


def test_copies_and_pickles_keep_no_derived_tensors() -> None:
    layer, x = packed("ternary-g16"), torch.randn(3, 96)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin._prepared is None and torch.equal(twin(x), y)
    layer.codes.zero_()
    assert torch.equal(twin(x), y), "a copy shares nothing"
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    assert file.tell() < twin.quantized().nbytes + 20 * 4 + 4000


def test_damaged_buffers_are_refused_at_first_use() -> None:
    layer = packed("ternary-g16")
    layer.codes[0] = 255
    with pytest.raises(FormatError, match="damaged"):
        layer(torch.randn(1, 96))
    layer = packed("uint4-g16")
    layer.scale[0, 0] = float("nan")
    with pytest.raises(FormatError, match="scale"):
        layer(torch.randn(1, 96))


def test_switching_a_whole_model() -> None:
    model = nn.Sequential(packed("uint4-g16"), nn.ReLU(), packed("uint4-g4", 6, 20))
    x = torch.randn(3, 96)
    y = model(x)
    assert set_activations(model, "int8") == 2
    assert not torch.equal(model(x), y) and close(model(x), y, 0.03)
    set_activations(model, "float")
    assert torch.equal(model(x), y)
    with pytest.raises(FormatError, match='"float" or "int8"'):
        set_activations(model, "int4")


def test_the_summary_line_tells_format_and_bits() -> None:
    text = repr(packed("uint4-g16"))
    assert (
        "in_features=96, out_features=20, bias=True, format=uint4-g16, bits_per_weight=5.250, activations=float" in text
    )
    assert "num_embeddings=20" in repr(PackedEmbedding.from_quantized(packed("int8-g16").quantized()))


def test_gradients_reach_the_input() -> None:
    w = torch.randn(20, 96)
    qt = with_outliers(quantize(w, Format.parse("uint4-g16")), w)
    layer, x = PackedLinear.from_quantized(qt), torch.randn(3, 96, requires_grad=True)
    layer(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, layer.dequantize()).square().sum().backward()
    assert x.grad is not None and other.grad is not None and close(x.grad, other.grad)
    layer.activations = "int8"
    with pytest.raises(KernelError, match="set_activations"):
        layer(x).sum().backward()


def _samples() -> dict[str, tuple]:
    layer = packed("uint4-g16", 6, 32, bias=False)
    w = layer.prepare().weight
    int8 = ops.pack_int8(*w, 32)
    row, col = torch.tensor([0, 0, 5]), torch.tensor([1, 31, 0])
    return {
        "linear_float": (torch.randn(2, 3, 32), w.codes, w.table, w.scale, w.zero, 4),
        "linear_int8": (torch.randn(3, 32), int8, 6),
        "embedding": (torch.tensor([[5, 0]]), w.codes, w.table, w.scale, w.zero, 4, 32),
        "sparse_linear": (torch.randn(3, 32), row, col, torch.randn(3), 6),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_float", "linear_int8", "embedding", "sparse_linear"])
def test_operators_keep_torchs_rules(name: str) -> None:
    args = _samples()[name]
    torch.library.opcheck(getattr(torch.ops.lowbit, name).default, args)
    if name in ("linear_float", "sparse_linear"):
        torch.library.opcheck(getattr(torch.ops.lowbit, name).default, (args[0].clone().requires_grad_(), *args[1:]))


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 warns of every custom operator it exports")
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_export_and_compile_see_the_operators(activations: str) -> None:
    model, x = nn.Sequential(packed("uint4-g16"), nn.ReLU()).requires_grad_(False), torch.randn(3, 96)
    set_activations(model, activations)
    y = copy.deepcopy(model)(x)
    with pytest.raises(KernelError, match=r"lowbit.runtime.prepare\(model\)"):
        torch.export.export(model, (x,))
    assert prepare(model) == 1
    program = torch.export.export(model, (x,))
    assert f"lowbit.linear_{activations}" in program.graph_module.code
    assert torch.equal(program.module()(x), y)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), y), "no graph break"


def test_solutions_of_two_parts_run_from_their_bits() -> None:
    """Codes among the dense ones, salient columns with tables per group, and quantized scales."""
    from lowbit.solvers import find
    from lowbit.statistics import LayerStatistics

    inputs = torch.randn(300, 96)
    stats = LayerStatistics(inputs.T @ inputs / 300, inputs.abs().mean(0), 300)
    for name, group in (("icquant", -1), ("billm", 32), ("spqr", 16), ("pb_llm", -1), ("adpq", 16)):
        spec = find(name)
        solution = spec.solve(torch.randn(20, 96), stats, spec.default_format(spec.bits, group), **spec.options)
        layer = PackedLinear.from_quantized(solution.quantized())
        assert len(layer.meta["parts"]) == (1 if name == "spqr" else 2), name  # no outlier among so few
        x = torch.randn(2, 5, 96)
        assert close(layer(x), F.linear(x.double(), layer.dequantize().double())), name
        layer.activations = "int8"
        assert close(layer(x), F.linear(x.double(), layer.dequantize().double()), 0.03), name
