"""Every file of the folder is tested here: the closed-form slope against autograd of T."""

import pytest
import torch

from lowbit.estimators import Estimator, estimators, through

X = torch.linspace(-3, 3, 401, dtype=torch.float64)


@pytest.mark.parametrize("spec", estimators().values(), ids=lambda s: s.name)
def test_slope_is_the_derivative_of_the_transform(spec: Estimator) -> None:
    x = X.clone().requires_grad_()
    spec.transform(x).sum().backward()
    away_from_kinks = (X.abs() - 1).abs() > 1e-9
    assert torch.allclose(x.grad[away_from_kinks], spec.slope(X)[away_from_kinks])


@pytest.mark.parametrize("spec", estimators().values(), ids=lambda s: s.name)
def test_the_transform_keeps_the_sign(spec: Estimator) -> None:
    assert torch.equal(spec.transform(X).sign(), X.sign())


def test_through_returns_exactly_the_projected_values() -> None:
    x, levels = torch.randn(10000), 0.1 * torch.randn(10000).sign()
    assert torch.equal(through(x.requires_grad_(), levels), levels)
    assert not torch.equal(x + (levels - x).detach(), levels)  # what the usual expression does
