"""Input functions: values, gradients, where their scales start, and their state."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lowbit.activations import activation_method, activation_methods, attach, attached
from lowbit.errors import RecipeError

X = torch.randn(64, 6, 5, 5, generator=torch.Generator().manual_seed(0))
each = pytest.mark.parametrize("name", list(activation_methods()))


def backward(f: nn.Module, x: Tensor, up: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    f(x).backward(up)
    return x.grad


@each
def test_shapes_dtypes_and_state(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        f, g = (activation_method(name).build(6, 1).to(dtype) for _ in range(2))
        y = f(X.to(dtype))
        assert y.shape == X.shape and y.dtype == dtype
        g.load_state_dict(f.state_dict())
        assert torch.equal(g(X.to(dtype) * 2), f(X.to(dtype) * 2)) and torch.equal(copy.deepcopy(f)(X.to(dtype)), y)
    assert f(X[0].to(dtype)).shape == X[0].shape


def test_sign_with_a_shift() -> None:
    f = activation_method("sign").build(6, 1)
    assert f(X).unique().tolist() == [-1, 1] and f(torch.zeros(1, 6, 1, 1)).unique().tolist() == [1]
    skewed = X + 0.5
    with torch.no_grad():
        f.shift.copy_(-skewed.mean((0, 2, 3)))
    assert f(skewed).mean((0, 2, 3)).abs().max() < 0.05
    up = torch.randn_like(X)
    with torch.no_grad():
        f.shift.fill_(0.25)
    dx = backward(f, X, up)
    assert torch.allclose(dx, up * (2 - 2 * (X + 0.25).abs()).clamp(min=0), atol=1e-6)
    assert torch.allclose(f.shift.grad, dx.sum((0, 2, 3)), atol=1e-3)
    assert activation_method("sign").build(6, 1, shift=False).shift is None


def test_sign_of_linear_inputs_shifts_the_last_axis() -> None:
    f = activation_method("sign").build(3, -1)
    with torch.no_grad():
        f.shift.copy_(torch.tensor([2.0, 0.0, -2.0]))
    assert f(torch.zeros(2, 4, 3) + 0.5)[0, 0].tolist() == [1, 1, -1]


@pytest.mark.parametrize("bits, signed", [(1, False), (1, True), (2, True), (4, False), (8, True)])
def test_learned_scale(bits: int, signed: bool) -> None:
    x = X if signed else X.relu()
    f = activation_method("lsq").build(6, 1, bits=bits, signed=signed)
    y = f(x)
    assert len(y.unique()) <= 2**bits and (bits < 8 or float((y - x).detach().abs().max()) < 0.6)
    scale = float(f.scale.detach())
    high = f.levels.values[-1]
    assert scale == pytest.approx(2 * float(x.abs().mean()) / high**0.5, rel=1e-5)
    f(x * 100)
    assert float(f.scale.detach()) == scale, "only the first batch starts it"
    up, steps = torch.randn_like(x), x / scale
    inside = (steps >= f.levels.values[0]) & (steps <= high)
    assert torch.allclose(backward(f, x, up), up * inside)
    with torch.no_grad():
        slope = (f(x) / scale - steps * inside) / (x.numel() * high) ** 0.5
    assert float(f.scale.grad) == pytest.approx(float((up * slope).sum()), rel=1e-3, abs=1e-3)


def test_pact() -> None:
    f = activation_method("pact").build(6, 1, bits=2, alpha=1.5)
    up = torch.randn_like(X)
    dx = backward(f, X, up)
    assert f(X).unique().tolist() == pytest.approx([0, 0.5, 1, 1.5])
    assert torch.equal(dx, up * ((X >= 0) & (X <= 1.5)))
    assert float(f.alpha.grad) == pytest.approx(float(up[X > 1.5].sum()), rel=1e-4)


def test_unit_keeps_what_a_sign_would_lose() -> None:
    p = torch.randn(4, 8, 8).mul(3).softmax(-1)
    f = activation_method("unit").build(8, -1)
    y = f(p)
    alpha = float(f.scale.detach())
    assert alpha == pytest.approx(1 / 8, rel=1e-5)
    assert torch.allclose(y, (p > alpha / 2) * alpha) and 0 < float((y > 0).float().mean()) < 1
    assert torch.allclose(y.sum(-1), alpha * (y > 0).sum(-1)) and (torch.where(p >= 0, 1, -1) == 1).all()


def test_token_has_a_scale_for_each_row() -> None:
    x = torch.randn(4, 7, 16) * torch.tensor([1.0, 100.0, 1e-3, 0.0]).reshape(4, 1, 1)
    f = activation_method("token").build(16, -1)
    error = (f(x) - x).abs().amax(-1)
    assert (error <= x.abs().amax(-1) / 253).all()
    steps = f(x) / (x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-3) and float(steps.abs().max()) <= 127.01
    for norm in ("rms", "layer"):
        normed = activation_method("token").build(16, -1, norm=norm)(x[:2])
        assert torch.allclose(normed.square().mean(-1).sqrt(), torch.ones(2, 7), atol=0.05)


def test_attach_runs_it_before_the_layer() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(2, 6)
    assert attached(layer) is None
    attach(layer, activation_method("sign").build(6, -1))
    assert torch.equal(layer(x), nn.functional.linear(torch.where(x >= 0, 1.0, -1.0), layer.weight, layer.bias))
    assert "input_function.shift" in layer.state_dict()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_messages() -> None:
    for name, options, message in (
        ("lsq", {"bits": 9}, "activations of 9 bits: use 1 to 8"),
        ("pact", {"bits": 0}, "activations of 0 bits"),
        ("token", {"norm": "rns"}, "'rns'. Did you mean 'rms'"),
        ("sign", {"estimator": "elastic_unsigned"}, "without a negative level"),
        ("lsq", {"estimator": "ede"}, "does not fit uint4"),
    ):
        with pytest.raises(RecipeError, match=message):
            activation_method(name).build(4, 1, **options)
