"""What the manifest says of a layer, against outputs computed from the inputs themselves."""

import pytest
import torch

from lowbit.formats import Format, quantize
from lowbit.pipeline.describe import layer_errors
from lowbit.statistics import GramAccumulator


def test_errors_are_those_of_the_outputs_relative_to_the_outputs() -> None:
    x = torch.randn(400, 32) @ torch.randn(32, 32)
    w, fmt = torch.randn(8, 32), Format.parse("uint3-g16-search")
    gram = GramAccumulator(32)
    gram.add(x)
    w_hat, plain = w + 0.1 * torch.randn(8, 32), quantize(w, Format.parse("uint3-g16")).dequantize()
    found = layer_errors(w, w_hat, fmt, gram.finish())
    energy = (x @ w.T).square().sum()
    assert found["error"] == pytest.approx(float((x @ (w_hat - w).T).square().sum() / energy), rel=1e-3)
    assert found["error_rtn"] == pytest.approx(float((x @ (plain - w).T).square().sum() / energy), rel=1e-3)
    assert found["error_of"] == "output"


def test_sensitivity_is_the_error_that_a_unit_of_weight_noise_makes() -> None:
    """Noise as large as the weights, averaged over many draws, through inputs that mostly miss the weights."""
    x, w = torch.randn(300, 32) * torch.logspace(0, 1, 32), torch.randn(4, 32) * torch.logspace(1, 0, 32)
    gram = GramAccumulator(32)
    gram.add(x)
    noise = torch.randn(2000, 4, 32) * w.norm() / w.numel() ** 0.5
    made = (noise @ x.T).square().sum((1, 2)).mean() / (x @ w.T).square().sum()
    found = layer_errors(w, w, Format.parse("int8-g16"), gram.finish())
    assert found["error"] == 0
    assert found["sensitivity"] == pytest.approx(float(made), rel=0.05)


def test_without_statistics_errors_are_those_of_the_weights() -> None:
    w, w_hat = torch.randn(8, 32), torch.randn(8, 32)
    found = layer_errors(w, w_hat, Format.parse("int4-g16"), None)
    assert found["error"] == pytest.approx(float((w_hat - w).square().sum() / w.square().sum()), rel=1e-5)
    assert found["error_of"] == "weight" and found["sensitivity"] is None
    assert layer_errors(torch.zeros(4, 16), torch.zeros(4, 16), Format.parse("int4-g16"), None)["error"] == 0
