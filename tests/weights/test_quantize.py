import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.errors import FormatError, RecipeError
from lowbit.weights import Quantize

FORMATS = [
    "int8-channel",
    "int4-channel",
    "uint3-g12",
    "uint3-g12-zreal",
    "ternary-channel",
    "ternary-tensor",
    "binary-channel",
    "pot3nz-channel",
    "nf4-g12-fp32",
    "kmeans2-channel",
    "fp4_e2m1-tile2x12",
    "int4-g12-double",
    "int4-channel-lstsq",
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_packing_changes_no_value(fmt: str) -> None:
    w = torch.randn(6, 4, 3, 3) * 0.1
    q = Quantize(fmt)
    assert torch.equal(q(w), q.quantized(w).dequantize())


def test_gradient_is_passed_unchanged_by_the_identity() -> None:
    w = torch.randn(4, 8, requires_grad=True)
    up = torch.randn(4, 8)
    Quantize("ternary-channel")(w).backward(up)
    assert torch.equal(w.grad, up)


def test_clipped_stops_the_gradient_beyond_one_step() -> None:
    w = torch.tensor([[0.1, -0.2, 0.3, 3.0]], requires_grad=True)  # mean 0.9: only 3.0 lies beyond one step
    Quantize("binary-channel", estimator="clipped")(w).sum().backward()
    assert w.grad.tolist() == [[1, 1, 1, 0]]


def test_it_trains_as_a_parametrization() -> None:
    layer = nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "weight", Quantize("binary-channel"))
    assert all(len(row.abs().unique()) == 1 for row in layer.weight)
    before = layer.parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, layer.parametrizations.weight.original)


def test_all_zero_rows_stay_zero() -> None:
    assert not Quantize("ternary-channel")(torch.zeros(3, 5)).any()


def test_messages() -> None:
    with pytest.raises(RecipeError, match="'idntity'.*Did you mean 'identity'"):
        Quantize("ternary", estimator="idntity")
    with pytest.raises(FormatError, match="another weight on every call"):
        Quantize("int4-channel-stochastic")
