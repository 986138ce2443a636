"""Every file of the folder is tested here: the closed-form slope against autograd of T, and its row of the table."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.estimators import Estimator, Scheduled, estimator, estimators, scaled, through
from lowbit.estimators.foothill import penalty
from lowbit.estimators.reste import estimating_error, gradient_stability, power_at
from lowbit.estimators.swishsign import PEAK
from lowbit.formats import levels

X = torch.linspace(-3, 3, 1201, dtype=torch.float64)
ALL = list(estimators().values())
POSITIONS = (0.0, 0.37, 1.0)
each = pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)


def parameter(spec: Estimator, position: float) -> float:
    return spec.start if spec.schedule is None else spec.schedule(position)


def integral(spec: Estimator, t: float) -> float:
    x = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
    return float(torch.trapezoid(spec.slope(x, t), x))


@each
@pytest.mark.parametrize("position", POSITIONS)
def test_slope_is_the_derivative_of_the_transform(spec: Estimator, position: float) -> None:
    t, x = parameter(spec, position), X.clone().requires_grad_()
    spec.transform(x, t).sum().backward()
    kinks = torch.tensor([0.0, 0.1, 1.0, 1.5], dtype=torch.float64)
    smooth = ((X.abs()[:, None] - kinks).abs() > 1e-9).all(1)
    assert smooth.sum() > 1190
    assert torch.allclose(x.grad[smooth], spec.slope(X, t)[smooth], rtol=1e-9, atol=1e-9)


@each
def test_the_parameter_may_be_a_tensor(spec: Estimator) -> None:
    t, x = parameter(spec, 0.5), X.float()
    for f in (spec.transform, spec.slope):
        assert torch.allclose(f(x, torch.tensor(t)), f(x, t), rtol=1e-5, atol=1e-5)


@each
def test_the_transform_keeps_the_sign(spec: Estimator) -> None:
    if spec.periodic or spec.fits == "unsigned":
        return
    for position in POSITIONS:
        assert torch.equal(spec.transform(X, parameter(spec, position)).sign(), X.sign())


TABLE = [  # name, parameter, integral of T' over the line, T'(0)
    ("clipped", 1.0, 2.0, 1.0),
    ("approxsign", 1.0, 2.0, 2.0),
    ("swishsign", 5.0, 2.0, 5.0),
    ("ede", 0.5, 4.0, 1.0),  # 2k, k t
    ("ede", 3.0, 2.0, 3.0),
    ("reste", 1.0, 3.0, 1.0),
    ("reste", 2.0, 2.449, 3.162),
    ("reste", 3.0, 2.289, 4.642),
    ("fda", 9.0, 2.05, 1.273),
    ("foothill", 2.0, 2.0, 2.0),
    ("elastic_signed", 1.0, 2.0, 1.0),
    ("elastic_unsigned", 1.0, 1.0, 1.0),
]


@pytest.mark.parametrize("name, t, area, at_zero", TABLE)
def test_its_row_of_the_table(name: str, t: float, area: float, at_zero: float) -> None:
    spec = estimator(name)
    assert integral(spec, t) == pytest.approx(area, abs=5e-3)
    assert float(spec.slope(torch.zeros((), dtype=torch.float64), t)) == pytest.approx(at_zero, abs=1e-3)


def test_the_rows_without_an_integral() -> None:
    assert torch.equal(estimator("identity").slope(X), torch.ones_like(X))
    biper = estimator("biper")
    assert float(biper.slope(torch.zeros(()), 20.0)) == 20
    period = 2 * math.pi / 20
    assert torch.allclose(biper.transform(X + period, 20.0), biper.transform(X, 20.0), atol=1e-9)
    assert torch.allclose(biper.slope(X + period, 20.0), biper.slope(X, 20.0), atol=1e-8)


def test_every_estimator_has_its_row() -> None:
    assert {row[0] for row in TABLE} | {"identity", "biper"} == set(estimators())


def test_schedules() -> None:
    ede = estimator("ede")
    for position, at_0, at_1 in ((0.0, 1.0, 0.99), (1.0, 10.0, 0.0)):
        t = ede.schedule(position)
        assert float(ede.slope(torch.zeros(()), t)) == pytest.approx(at_0)
        assert float(ede.slope(torch.tensor(0.999), t)) >= at_1
    assert [power_at(3, p) for p in (0, 1)] == pytest.approx([1, 3]) and estimator("reste", power=5).schedule(1.0) == 5
    assert [estimator("fda").schedule(p) for p in (0.0, 0.5, 1.0)] == [9, 13, 18]
    rising = estimator("swishsign", beta=1.0, end=100.0)
    assert [rising.schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 10, 100])


def test_a_scheduled_module_keeps_its_place_in_the_state() -> None:
    a, b = (Scheduled(estimator("reste").schedule) for _ in range(2))
    assert a.move(0.4) and float(a.t) == pytest.approx(power_at(3, 0.4))
    b.load_state_dict(a.state_dict())
    assert b.t == a.t and a.move(7.0) and float(a.t) == 3
    assert not Scheduled().move(0.5) and not Scheduled().state_dict()


def test_reste_at_one_is_a_clip_at_its_window() -> None:
    assert torch.equal(estimator("reste").slope(X, 1.0), (X.abs() <= 1.5).double())
    for o in (1.0, 2.0, 5.0):
        assert float(estimator("reste").transform(torch.ones(()), o)) == 1


def test_reste_trades_error_for_stability() -> None:
    w, up = torch.randn(200, 200) * 0.5, torch.randn(200, 200)
    powers = (1.0, 2.0, 3.0, 5.0)
    errors = [float(estimating_error([w, w], o)) for o in powers]
    unstable = [float(gradient_stability([up * estimator("reste").slope(w, o)])) for o in powers]
    assert errors == sorted(errors, reverse=True) and unstable == sorted(unstable)
    assert errors[0] == pytest.approx(2 * float((w - w.sign()).norm()), rel=1e-5)


def test_swishsign_turns_back_beyond_its_peak() -> None:
    assert PEAK * math.tanh(PEAK) == pytest.approx(1, abs=1e-12)
    spec, at = estimator("swishsign"), torch.tensor(2 * PEAK / 5, dtype=torch.float64)
    assert float(spec.transform(at, 5.0)) == pytest.approx(PEAK) and abs(float(spec.slope(at, 5.0))) < 1e-9
    assert float(spec.slope(at * 1.01, 5.0)) < 0 and float(at) == pytest.approx(0.48, abs=1e-3)
    envelope = estimator("swishsign", monotone=True)
    assert (envelope.slope(X, 5.0) >= 0).all() and (envelope.transform(X, 5.0).diff() >= 0).all()
    assert torch.isfinite(spec.slope(torch.tensor([1e4, -1e4]), 5.0)).all()
    far = X[X.abs() > 1e-3]
    assert torch.allclose(spec.transform(far, 1e6), far.sign())  # BNN++: it becomes the sign


def test_foothill_is_the_integral_of_swishsign() -> None:
    x = X.clone().requires_grad_()
    penalty(x, 1.0, 5.0).sum().backward()
    assert torch.allclose(x.grad, estimator("swishsign").transform(X, 5.0), atol=1e-13)
    assert float((penalty(X, 1.0, 200.0) - X.abs()).abs().max()) == pytest.approx(0.0028, abs=2e-4)
    assert float((penalty(X, 2e3, 1e-3) - X.square()).abs().max()) < 7e-6


def test_ranged_estimators_take_the_ends_of_the_levels() -> None:
    x = torch.tensor([-9.0, -8.0, 7.0, 7.5])
    assert estimator("clipped").over(levels("int4")).slope(x, 1.0).tolist() == [0, 1, 1, 0]
    assert estimator("elastic_unsigned").over(levels("uint2")).transform(x, 1.0).tolist() == [0, 0, 3, 3]


def naive(x: Tensor, alpha: Tensor) -> Tensor:
    """alpha * P(clip(x / alpha, -8, 7)) with P straight through, by autograd."""
    t = (x / alpha).clamp(-8, 7)
    return alpha * (t + (t.round() - t).detach())


def test_the_scale_slope_is_that_of_autograd() -> None:
    w, up = torch.randn(300, dtype=torch.float64) * 3, torch.randn(300, dtype=torch.float64)
    spec = estimator("clipped").over(levels("int4"))
    grads = []
    for closed in (False, True):
        x, alpha = w.clone().requires_grad_(), torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
        if closed:
            steps = (x / alpha).detach()
            level, slope = steps.clamp(-8, 7).round(), spec.slope(steps, 1.0)
            y = scaled(x, alpha, level, slope, spec.scale_slope(steps, level, slope))
        else:
            y = naive(x, alpha)
        y.backward(up)
        grads.append((x.grad, alpha.grad))
    assert torch.allclose(grads[0][0], grads[1][0]) and torch.allclose(grads[0][1], grads[1][1])


def test_elastic_signed_gives_the_scale_every_sign() -> None:
    x, level = torch.tensor([-2.0, 0.5]), torch.tensor([-1.0, 1.0])
    assert torch.equal(estimator("elastic_signed").scale_slope(x, level, torch.tensor([0.0, 1.0])), level)


def test_through_returns_exactly_the_projected_values() -> None:
    x, values = torch.randn(10000), 0.1 * torch.randn(10000).sign()
    assert torch.equal(through(x.requires_grad_(), values), values)
    assert not torch.equal(x + (values - x).detach(), values)  # what the usual expression does


def test_messages() -> None:
    with pytest.raises(RecipeError, match="'rest'.*Did you mean 'reste'"):
        estimator("rest")
    with pytest.raises(RecipeError, match="'reste' has no 'powr'. Did you mean 'power'"):
        estimator({"name": "reste", "powr": 3})
    with pytest.raises(RecipeError, match="'identity' has no 'low'"):
        estimator("identity", low=2)
    with pytest.raises(RecipeError, match="'ede' is made for the two levels -1 and 1 and does not fit int4"):
        estimator("ede").over(levels("int4"))
    with pytest.raises(RecipeError, match="without a negative level"):
        estimator("elastic_unsigned").over(levels("ternary"))
