"""RPReLU and blocks, distance layers and their transition, random biases on rings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowbit.errors import RecipeError
from lowbit.layers import BinaryBlock, EuclidConv2d, EuclidLinear, RPReLU, random_bias_, to_euclid
from lowbit.training import input_functions, pack, prepare, step, weight_functions


def test_rprelu_starts_as_a_prelu_and_shifts() -> None:
    x, layer = torch.randn(2, 3, 4, 4), RPReLU(3)
    assert torch.equal(layer(x), F.prelu(x, torch.full((3,), 0.25)))
    with torch.no_grad():
        layer.before.fill_(1.0), layer.after.fill_(2.0)
    assert torch.allclose(layer(x), F.prelu(x + 1, torch.tensor(0.25)) + 2)
    assert layer(torch.randn(5, 3)).shape == (5, 3)


@pytest.mark.parametrize("activation", ["rprelu", "hardtanh", "none"])
def test_blocks_keep_a_real_valued_way_round(activation: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), BinaryBlock(8, 8, 1, activation), BinaryBlock(8, 16, 2, activation)
    )
    prepare(net, {"weights": "xnor", "activations": "sign"})
    assert [name for name, _, _ in weight_functions(net)] == ["1.conv", "2.conv"]
    assert [name for name, _, _ in input_functions(net)] == ["1.conv", "2.conv"]
    x = torch.randn(2, 3, 8, 8)
    net(x).square().mean().backward()
    net.eval()
    with torch.no_grad():
        wanted = net(x)
        assert wanted.shape == (2, 16, 4, 4)
        assert torch.allclose(pack(net)(x), wanted, atol=1e-5)


def test_distance_layers_at_both_ends() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    euclid = EuclidLinear(layer, 0.5)
    assert torch.allclose(euclid(x), layer(x), atol=1e-6)
    euclid.move(0.5)
    wanted = -torch.cdist(x, layer.weight).square() / 2 + layer.bias
    assert torch.allclose(euclid(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_distance_convolution_is_the_distance_of_patches(groups: int) -> None:
    layer, x = nn.Conv2d(4, 6, 3, 2, 1, groups=groups), torch.randn(2, 4, 7, 7)
    euclid = EuclidConv2d(layer)
    assert torch.allclose(euclid(x), layer(x), atol=1e-5)
    euclid.move(1.0)
    patches = F.unfold(x, 3, 1, 1, 2).reshape(2, groups, 1, 36 // groups, 16)
    filters = layer.weight.reshape(1, groups, 6 // groups, 36 // groups, 1)
    wanted = -(patches - filters).square().sum(3).reshape(2, 6, 4, 4) / 2 + layer.bias.reshape(-1, 1, 1)
    assert torch.allclose(euclid(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_distance() -> None:
    euclid, x, up = EuclidLinear(nn.Linear(6, 4, bias=False)), torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    euclid.move(1.0)
    euclid(x).backward(up)
    difference = x.detach()[:, None] - euclid.weight.detach()
    assert torch.allclose(euclid.weight.grad, (up[..., None] * difference).sum(0), atol=1e-5)
    assert torch.allclose(x.grad, -(up[..., None] * difference).sum(1), atol=1e-5)


def test_halfway_by_finite_differences() -> None:
    euclid, x = EuclidLinear(nn.Linear(3, 2), 1.0), torch.randn(1, 3, requires_grad=True)
    euclid.move(0.5)
    euclid(x).sum().backward()
    for i in range(3):
        e = torch.eye(3)[i] * 1e-2
        with torch.no_grad():
            slope = (euclid(x + e) - euclid(x - e)).sum() / 2e-2
        assert float(slope) == pytest.approx(float(x.grad[0, i]), abs=1e-3)


def test_to_euclid_keeps_the_function_and_step_moves_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 3)
    )
    x = torch.randn(2, 1, 8, 8)
    net.eval()
    before = net(x)
    to_euclid(net, transition=0.5)
    assert torch.allclose(net(x), before, atol=1e-5)
    assert [type(m).__name__ for m in net if "Euclid" in type(m).__name__] == ["EuclidConv2d", "EuclidLinear"]
    assert step(net, 0.25) == 2 and float(net[0].t) == 0.5
    assert not torch.allclose(net(x), before, atol=1e-2)
    with pytest.raises(RecipeError, match="no layer to replace"):
        to_euclid(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RecipeError, match="not 'reflect'"):
        EuclidConv2d(nn.Conv2d(1, 1, 3, padding_mode="reflect"))


def rings(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    angle, inner = torch.rand(n, generator=g) * 6.2832, torch.arange(n) % 2 == 0
    radius = torch.where(inner, 0.5, 1.5) + 0.05 * torch.randn(n, generator=g)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), inner.float() * 2 - 1


def accuracy_on_rings(layer: nn.Linear) -> float:
    g = torch.Generator().manual_seed(3)
    (x, y), (x_test, y_test) = rings(1000, g), rings(1000, g)
    with torch.no_grad():
        features, test = layer(x).sign(), layer(x_test).sign()
        readout = torch.linalg.lstsq(
            features.double().T @ features.double() + torch.eye(200), features.double().T @ y.double()
        )
        return float(((test.double() @ readout.solution).sign() == y_test).float().mean())


def test_random_biases_separate_rings() -> None:
    layer = nn.Linear(2, 200)
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert accuracy_on_rings(layer) < 0.7
    assert random_bias_(nn.Sequential(layer), 2.0) == 1
    assert accuracy_on_rings(layer) > 0.98


def test_random_biases_go_where_a_sign_sees_them() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        net[1].weight.fill_(3.0)
    before = net[0].bias.clone()
    assert random_bias_(net, 0.5, torch.Generator().manual_seed(0)) == 2
    assert torch.equal(net[0].bias, before) and net[1].bias.abs().max() <= 1.5 and len(net[1].bias.unique()) == 4
    assert (net[3].bias.abs() <= 0.5 * net[3].weight.norm(dim=1)).all()
