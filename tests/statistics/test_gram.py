import pytest
import torch

from lowbit.errors import DataError
from lowbit.statistics import GramAccumulator, output_energy, output_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streaming_equals_the_mean_of_outer_products(dtype):
    x = torch.randn(7, 11, 5)
    gram = GramAccumulator(5, dtype)
    for part in x:
        gram.add(part)
    stats = gram.finish()
    rows = x.reshape(-1, 5).double()
    expected = torch.stack([torch.outer(r, r) for r in rows]).mean(0)
    assert torch.allclose(stats.gram.double(), expected, atol=1e-5)
    assert torch.allclose(stats.abs_mean.double(), rows.abs().mean(0), atol=1e-6)
    assert stats.tokens == 77


def test_output_error_is_the_mean_squared_change_of_outputs():
    x, w = torch.randn(50, 8), torch.randn(3, 8)
    w_hat = w + 0.1 * torch.randn(3, 8)
    gram = x.T @ x / 50
    assert output_error(w, w_hat, gram) == pytest.approx(float(((x @ (w - w_hat).T) ** 2).sum(1).mean()), rel=1e-4)
    assert output_energy(w, gram) == pytest.approx(float(((x @ w.T) ** 2).sum(1).mean()), rel=1e-4)


def test_rescaled_statistics_are_those_of_rescaled_inputs():
    x, t = torch.randn(50, 8), torch.rand(8) + 0.5
    a, b = GramAccumulator(8), GramAccumulator(8)
    a.add(x)
    b.add(x / t)
    found, expected = a.finish().rescaled(t), b.finish()
    assert torch.allclose(found.gram, expected.gram, atol=1e-5)
    assert torch.allclose(found.abs_mean, expected.abs_mean, atol=1e-5)
    assert found.tokens == expected.tokens


def test_bfloat16_inputs_are_summed_in_float32():
    x = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    gram = GramAccumulator(2)
    gram.add(x)
    assert gram.finish().gram[0, 1] == 1.0


def test_nothing_seen_and_nan_are_errors():
    with pytest.raises(DataError, match="format: float"):
        GramAccumulator(3).finish()
    gram = GramAccumulator(3)
    gram.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(DataError, match="NaN"):
        gram.finish()
