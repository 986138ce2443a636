"""lowbit.diagnose against closed forms, and that it leaves the training alone."""

import math

import pytest
import torch
from torch import nn

from lowbit.diagnose import Recorder, constant_channels, distance, growth, warnings
from lowbit.training import latent_of, prepare, weight_functions

SIGNS = {
    "weights": {"format": "binary", "scale": "unit"},
    "activations": {"method": "sign", "shift": False, "estimator": "clipped"},
    "keep_ends": False,
}


def chain(k: int, normalized: bool, depth: int = 6) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(k, k, bias=False), *([nn.BatchNorm1d(k)] if normalized else [])]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "k, normalized, wanted",
    [(128, False, math.sqrt(2 * 128 / math.pi)), (127, False, 2 * math.sqrt(2 * 127 / math.pi)), (128, True, 0.683)],
)
def test_gradients_grow_as_the_theory_says(k: int, normalized: bool, wanted: float) -> None:
    net = prepare(chain(k, normalized), SIGNS)
    watch = Recorder(net)
    with watch:
        y = net(torch.randn(512, k))
        y.backward(torch.randn_like(y))
    row = watch.record(0)
    moments = [r["gradient"] for r in row["layers"].values()]
    if normalized:  # the last layer's output feeds a normalization and no sign
        moments = moments[:-1]
    assert growth(moments) == pytest.approx(wanted, rel=0.1)
    assert any("gradients grow" in line for line in warnings(row)) is not normalized


def test_flips_zeros_and_distances() -> None:
    net = prepare(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), "ternary")
    watch = Recorder(net)
    _, layer, function = next(iter(weight_functions(net)))
    with watch:
        net(torch.randn(5, 8)).sum().backward()
    first = watch.record(0)["layers"]["0"]
    codes = function.codes(latent_of(layer))
    with torch.no_grad():
        layer.parametrizations["weight"].original.neg_()
    second = watch.record(1)["layers"]["0"]
    zeros = float((function.quantized(latent_of(layer)).dequantize() == 0).float().mean())
    assert first["flip_rate"] is None and first["zero_fraction"] == second["zero_fraction"] == pytest.approx(zeros)
    assert second["flip_rate"] == pytest.approx(1 - zeros)  # every sign has turned, zeros stay
    assert codes.shape == (4, 8) and second["estimator_error"] > 0
    assert distance(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.25)
    assert not layer._forward_hooks


def test_dead_inputs() -> None:
    x = torch.randn(6, 4)
    x[:, 1] = 0
    assert float(constant_channels(x, False)) == 0.25
    images = torch.randn(2, 4, 3, 3)
    images[:, :2] = 1
    assert float(constant_channels(images, True)) == 0.5


def test_growth_of_too_little() -> None:
    assert growth([]) is None and growth([1.0, None]) is None and growth([8.0, 4.0, 2.0]) == pytest.approx(2)
