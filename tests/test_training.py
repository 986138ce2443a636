"""prepare, pack, summary: what is attached, what is left alone, and that packing changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.errors import FormatError, RecipeError, ShapeError
from lowbit.runtime.artifact import load, save
from lowbit.training import bits_per_weight, pack, prepare, step, summary, weight_functions


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


X = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8)


def trained(fmt: str) -> nn.Module:
    """A prepared net after one real step."""
    n = prepare(net(), fmt)
    optimizer = torch.optim.SGD(n.parameters(), 0.05)
    n(X).square().mean().backward()
    optimizer.step()
    return n


@pytest.mark.parametrize(
    "fmt", ["int8-channel", "uint4-g12", "int3-channel", "ternary", "binary", "pot3nz", "nf4-g12", "kmeans2"]
)
def test_packed_and_dequantized_paths_agree(fmt: str, tmp_path) -> None:
    n = trained(fmt)
    with torch.no_grad():
        wanted = n(X)
        weights = {name: m.weight.clone() for name, m, _ in weight_functions(n)}
        packed = pack(n)
        got = packed(X)
    for name, w in weights.items():
        assert torch.equal(packed.get_submodule(name).dequantize(), w), "packing changed a weight"
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    save(packed, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", model=net())(X), got)


def test_first_convolution_and_last_linear_stay_float() -> None:
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary"))] == ["3", "6"]
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary", keep_ends=False))] == ["0", "3", "6", "8"]
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary", skip=["3"]))] == ["6"]


def test_a_single_layer_is_returned_packed() -> None:
    layer = prepare(nn.Linear(16, 4), "int4-channel", keep_ends=False)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.allclose(layer(x), pack(layer)(x), atol=1e-6)


def test_other_parametrizations_come_first() -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    layer = nn.Linear(16, 4)
    parametrize.register_parametrization(layer, "weight", Double())
    n = nn.Sequential(layer, nn.Linear(4, 2))
    assert [name for name, _, _ in weight_functions(prepare(n, "int8-channel"))] == ["0"]
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = n(x)
        assert torch.allclose(pack(n)(x), wanted, atol=1e-6)


def test_bits_are_those_of_the_file(tmp_path) -> None:
    n = prepare(net(), "ternary")
    before = bits_per_weight(n)
    packed = pack(copy.deepcopy(n))
    manifest = save(packed, tmp_path / "out")
    assert bits_per_weight(packed) == before == manifest["summary"]["bits_per_weight"]
    s = summary(packed)
    assert (s.bytes, s.weights) == (manifest["summary"]["bytes"], manifest["summary"]["weights"])
    assert s.bytes == summary(n).bytes and s.bits_per_weight_file == manifest["summary"]["bits_per_weight_file"]
    assert "ternary-channel" in str(s) and bits_per_weight(net()) > 31.9


def test_step_is_ready_for_schedules() -> None:
    assert step(prepare(net(), "ternary")) == 0


def test_messages() -> None:
    with pytest.raises(RecipeError, match=r"call lowbit\.prepare"):
        pack(net())
    with pytest.raises(RecipeError, match="prepared already"):
        prepare(prepare(net(), "ternary"), "binary")
    with pytest.raises(RecipeError, match="keep_ends=False"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "ternary")
    with pytest.raises(ShapeError, match=r"^3: in_features=36 is not a multiple of group=64"):
        prepare(net(), "int4-g64")
    with pytest.raises(FormatError, match="unknown level set"):
        prepare(net(), "ternery")
