"""S3, DenseShift and DeepShift against slow autograd versions, and the counts of their random starts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.training import latent_of, prepare, weight_functions
from lowbit.weights import weight_method


class Straight(torch.autograd.Function):
    """A step function whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, zero_goes_up: bool, low: float) -> Tensor:
        return torch.where(u >= 0 if zero_goes_up else u > 0, 1.0, low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def sgn(u: Tensor) -> Tensor:
    return Straight.apply(u, True, -1.0)


def heaviside(u: Tensor) -> Tensor:
    return Straight.apply(u, False, 0.0)


def slow_s3(u: Tensor) -> Tensor:
    shift = torch.zeros_like(u[0])
    for k in range(len(u) - 1, 1, -1):
        shift = heaviside(u[k]) * (1 + shift)
    return sgn(u[0]) * heaviside(u[1]) * 2**shift


def slow_denseshift(u: Tensor, surrogate: bool) -> Tensor:
    shift = torch.zeros_like(u[0])
    for t in u[1:]:
        shift = (shift + 1) * heaviside(t)
    if not surrogate:
        return sgn(u[0]) * 2**shift
    backward = sgn(u[0]) * (shift + 1).sqrt()
    return backward + (sgn(u[0]) * 2**shift - backward).detach()


def gradients(f: Any, u: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    u = u.clone().requires_grad_()
    y = f(u)
    y.backward(up)
    return y.detach(), u.grad


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["s3", "denseshift", "denseshift-plain"])
def test_closed_form_against_autograd(name: str, bits: int) -> None:
    w, up = torch.randn(16, 8), torch.randn(16, 8)
    options = {"surrogate": "plain" not in name} if "dense" in name else {}
    f = weight_method(name.removesuffix("-plain")).build(w, bits=bits, **options)
    u = f.right_inverse(w)
    u[:, 0, 0] = 0  # H(0) = 0, sgn(0) = +1
    slow = (lambda v: slow_s3(v)) if name == "s3" else (lambda v: slow_denseshift(v, "plain" not in name))
    y, du = gradients(f, u, up)
    y_slow, du_slow = gradients(lambda v: slow(v) * f.scale.reshape(()), u, up)
    assert torch.allclose(y, y_slow, rtol=1e-6) and torch.allclose(du, du_slow, rtol=1e-4, atol=1e-7)


def test_s3_levels_and_dead_planes() -> None:
    w = torch.randn(64, 64)
    f = weight_method("s3").build(w)
    u = f.right_inverse(w)
    assert (f(u) / f.scale).unique().tolist() == [-4, -2, -1, 0, 1, 2, 4]
    _, du = gradients(f, u, torch.ones_like(w))
    off = u[1] <= 0
    assert not du[0][off].any() and not du[2:, off].any() and du[1].all()
    assert torch.allclose(du[1], (sgn(u[0]) * 2 ** ((u[2] > 0) * (1.0 + (u[3] > 0)))) * f.scale)


def test_s3_without_sparsity_and_shift_is_binaryconnect() -> None:
    w, up = torch.randn(8, 8), torch.randn(8, 8)
    f = weight_method("s3").build(w, bits=2)
    u = torch.stack([w, torch.ones_like(w)])
    y, du = gradients(f, u, up)
    assert torch.equal(y, torch.where(w >= 0, 1.0, -1.0) * f.scale) and torch.allclose(du[0], up * f.scale)


def test_s3_regularizer_counts_what_is_off() -> None:
    f = weight_method("s3").build(torch.randn(2, 2), sparsity=2.0)
    u = torch.zeros(4, 2, 2)
    u[1] = torch.tensor([[-1.0, 0.5], [-0.25, 0.0]])
    assert float(f.penalty(u)) == 2.5


def test_denseshift_never_is_zero_and_dead_planes() -> None:
    w = torch.randn(64, 64)
    for bits in (2, 3, 4):
        f = weight_method("denseshift").build(w, bits=bits)
        u = f.right_inverse(w)
        assert f(u).all() and len(f.codes(u).unique()) == 2**bits
    f = weight_method("denseshift").build(w, bits=3)
    u, up = f.right_inverse(w), torch.randn(64, 64)
    _, du = gradients(f, u, up)
    shift = f.level(u).abs().log2()
    assert torch.allclose(du[0], up * f.scale * (shift + 1).sqrt())
    off = u[3] <= 0
    assert not du[1:3, off].any() and (shift[off] == 0).all()
    run = (1 + (u[1] > 0)) * (u[2] > 0) + 1.0
    assert torch.allclose(du[3][off], (up * f.scale * sgn(u[0]) / 2 * run)[off])


EXPECTED = [("s3", 3, 2.75), ("denseshift", 2, 2.5), ("denseshift", 3, 11.5), ("denseshift", 4, 191.5)]


@pytest.mark.parametrize("name, bits, square", EXPECTED)
def test_random_starts(name: str, bits: int, square: float) -> None:
    w = torch.randn(256, 512)
    f = weight_method(name).build(w, bits=bits)
    level = f.level(f.right_inverse(w))
    assert f.mean_square() == square and float(level.square().mean()) == pytest.approx(square, rel=0.03)
    assert float(f.scale) == pytest.approx((512 * square) ** -0.5, rel=1e-3)
    if name == "denseshift":
        top = 2 ** (bits - 1) - 1
        for k in range(top + 1):
            assert float((level.abs() == 2**k).float().mean()) == pytest.approx(2.0 ** -min(k + 1, top), abs=0.01)


def test_dense_start_of_s3() -> None:
    w = torch.randn(32, 32)
    f = weight_method("s3").build(w, dense=True)
    assert f.level(f.right_inverse(w)).abs().unique().tolist() == [1] and f.mean_square() == 1


@pytest.mark.parametrize("name, bits", [("s3", 2), ("s3", 3), ("s3", 4), ("denseshift", 2), ("denseshift", 3),
                                        ("denseshift", 4), ("deepshift_ps", 3)])  # fmt: skip
def test_starting_from_weights_gives_their_nearest_levels(name: str, bits: int) -> None:
    w = torch.randn(8, 64) * 0.1
    f = weight_method(name).build(w, bits=bits, init="weights")
    w_hat = f(f.right_inverse(w))
    table = f.format.levels.table()
    nearest = table[(w[..., None] / f.scale[..., None] - table).abs().argmin(-1)] * f.scale
    assert torch.allclose(w_hat, nearest) and not f.starts_over


def test_outputs_keep_their_size_without_batchnorm() -> None:
    x = torch.randn(64, 256)
    for name, bits in (("s3", 3), ("denseshift", 4), ("deepshift_ps", 4)):
        net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
        y = prepare(net, name, keep_ends=False, bits=bits)(x)
        assert 0.2 < float(y.detach().std()) < 5, name


def test_deepshift_q_is_a_fixed_point_on_powers_of_two() -> None:
    w = torch.tensor([[1.0, -0.5, 0.25, 0.125], [-1.0, 0.5, -0.25, 0.125]])
    f = weight_method("deepshift_q").build(w, bits=3, top=0)
    assert torch.equal(f(w), w)
    edge = torch.tensor([[0.999 * 0.25 * math.sqrt(2), 1.001 * 0.25 * math.sqrt(2), 9.0, 1e-9]])
    assert f(edge).tolist() == [[0.25, 0.5, 1.0, 0.125]]
    latent = torch.tensor([[3.0, -3.0, 0.01, -0.01]])
    f.after_step(latent)
    assert latent.tolist() == [[1.0, -1.0, 0.125, -0.125]]


def test_deepshift_ps_gives_the_sign_the_raw_gradient() -> None:
    layer = prepare(nn.Linear(6, 4, bias=False), "deepshift_ps", keep_ends=False)
    (_, _, f), x, up = next(weight_functions(layer)), torch.randn(5, 6), torch.randn(5, 4)
    layer(x).backward(up)
    grad, raw = layer.parametrizations.weight.original.grad, up.T @ x
    assert torch.allclose(grad[1], raw)
    w_hat = f(latent_of(layer))
    assert torch.allclose(grad[0], raw * w_hat * math.log(2), atol=1e-6)
