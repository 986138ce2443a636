"""The optimizer wrapper: its special cases step for step, its state, and what it leaves behind."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import RecipeError
from lowbit.estimators._proximal import parq, relax, schedule
from lowbit.formats import levels
from lowbit.training import ProxConnect, pack, prepare, step, weight_functions

X, Y = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def sgd(n: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(n.parameters(), 0.2, momentum=0.9, weight_decay=1e-3)


def train(n: nn.Module, optimizer: Any, steps: int = 6, after: Any = None) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(n(X), Y).backward()
        optimizer.step()
        if after is not None:
            after((i + 1) / steps)


def by_hand(forward: Any, backward: Any, clip: float, steps: int = 6) -> tuple[nn.Module, list[Tensor]]:
    """u <- sgd(u, B(u) dL/dF(u)), w = F(u), written out."""
    n = net()
    optimizer, places = sgd(n), [n[0].weight, n[3].weight]
    latents = [p.detach().clone() for p in places]
    for _ in range(steps):
        for p, u in zip(places, latents):
            p.data.copy_(forward(u))
        optimizer.zero_grad()
        F.cross_entropy(n(X), Y).backward()
        for p, u in zip(places, latents):
            p.grad.mul_(backward(u))
            p.data.copy_(u)
        optimizer.step()
        latents = [p.detach().clone().clamp_(-clip, clip) for p in places]
    return n, latents


def sign(u: Tensor) -> Tensor:
    return torch.where(u >= 0, 1.0, -1.0)


CASES = [
    ("binaryconnect", {}, sign, torch.ones_like, 1.0),
    ("bnn", {}, sign, lambda u: (u.abs() <= 1).float(), 1.0),
    ("prox", {"map": "hard", "format": "binary-tensor-fp32"}, lambda u: u.abs().mean() * sign(u), torch.ones_like, 1e9),
    ({"format": "binary-tensor", "estimator": "approxsign", "scale": "unit"}, {}, sign,
     lambda u: (2 - 2 * u.abs()).clamp(min=0), 1e9),
]  # fmt: skip


@pytest.mark.parametrize("recipe, options, forward, backward, clip", CASES, ids=["bc", "bnn", "hard", "bireal"])
def test_special_cases_step_for_step(recipe: Any, options: Any, forward: Any, backward: Any, clip: float) -> None:
    n = net()
    recipe = {"weights": recipe} if isinstance(recipe, dict) else recipe
    optimizer = ProxConnect(sgd(n), n, recipe, keep_ends=False, **options)
    train(n, optimizer)
    reference, latents = by_hand(forward, backward, clip)
    for w, u in zip(optimizer.weights, latents):
        assert torch.allclose(w.latent, u, atol=1e-6) and torch.allclose(w.parameter, forward(u), atol=1e-6)
    assert torch.allclose(n[1].weight, reference[1].weight, atol=1e-6)


def test_slope_one_is_plain_sgd() -> None:
    """A range that holds every weight, and a map that has not begun to harden."""
    n, plain = net(), net()
    options = {"format": "int8-tensor-fp32", "start": 0.99, "stop": 1.0}
    train(n, ProxConnect(sgd(n), n, "prox", keep_ends=False, steps=1000, **options))
    train(plain, sgd(plain))
    for a, b in zip(n.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("recipe", ["prox", "bnn_pp", "twn", {"format": "binary", "estimator": "reste"}])
def test_it_computes_what_a_prepared_network_does(recipe: Any) -> None:
    a, b = net(), net()
    optimizer = ProxConnect(sgd(a), a, copy.deepcopy(recipe), keep_ends=False, steps=6)
    train(a, optimizer)
    prepare(b, copy.deepcopy(recipe), keep_ends=False)
    train(b, sgd(b), after=lambda position: step(b, position))
    for (name, layer, _), w in zip(weight_functions(b), optimizer.weights):
        assert torch.allclose(layer.parametrizations.weight.original, w.latent, atol=1e-5), name
        assert torch.allclose(layer.weight, w.parameter, atol=1e-5), name


def test_state_comes_back() -> None:
    a, b = net(), net()
    first, second = (ProxConnect(sgd(n), n, "prox", format="ternary", keep_ends=False, steps=12) for n in (a, b))
    train(a, first)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(a, first), train(b, second)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(RecipeError, match="not of ProxConnect on these weights"):
        second.load_state_dict(sgd(b).state_dict())


def test_schedulers_and_the_base_state() -> None:
    n = net()
    base = sgd(n)
    optimizer = ProxConnect(base, n, "binaryconnect", keep_ends=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(n, optimizer, 2)
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.1 and optimizer.state[n[0].weight]["momentum_buffer"].any()


def test_hard_inside_soft_outside_and_finish_packs() -> None:
    n = net()
    optimizer = ProxConnect(sgd(n), n, "prox", format="ternary-channel", keep_ends=False, steps=100)
    train(n, optimizer)
    n.eval()
    assert len(n[0].weight[0].unique()) > 3
    with optimizer.hard(), torch.no_grad():
        assert all(len(row.abs().unique()) <= 2 for row in n[0].weight)
        wanted = n(X)
    assert len(n[0].weight[0].unique()) > 3
    optimizer.finish()
    with torch.no_grad():
        assert torch.equal(n(X), wanted)
        assert torch.allclose(pack(n)(X), wanted, atol=1e-5)


def test_midpoints_empty_as_the_map_hardens() -> None:
    n = net()
    optimizer = ProxConnect(sgd(n), n, "prox", keep_ends=False, steps=8)
    train(n, optimizer, 8)
    assert all(len(row.abs().unique()) == 1 for row in n[0].weight)


@pytest.mark.parametrize("name", ["binary", "ternary", "int3", "pot3nz", "fp4_e2m1"])
def test_maps_are_proximal(name: str) -> None:
    """Non-decreasing, levels stay, identity and nearest level at the ends."""
    table, x = levels(name), torch.linspace(-9, 9, 2001)
    values = table.table()
    for t in (0.0, 0.3, 0.8, 1.0):
        assert (parq(x, t, table).diff() >= -1e-6).all() and (relax(x, t, table).diff() >= -1e-6).all()
        assert torch.allclose(parq(values, t, table), values) and torch.allclose(relax(values, t, table), values)
    inside = x.clamp(values[0], values[-1])
    assert torch.allclose(parq(x, 1.0, table), inside, atol=1e-5) and torch.equal(relax(x, 0.0, table), x)
    nearest = values[(x[:, None] - values).abs().argmin(1)]
    off_ties = (x[:, None] - (values[1:] + values[:-1]) / 2).abs().min(1).values > 1e-4
    assert torch.equal(parq(x, 0.0, table)[off_ties], nearest[off_ties])


def test_the_schedule_of_the_slope() -> None:
    s = schedule("parq", 0.2, 0.8)
    assert s(0.1) == 1 and s(0.9) == 0 and s(0.5) == pytest.approx(0.5) and s(0.3) > s(0.4) > s(0.7)
    assert schedule("relax", 0.0, 0.5)(0.25) == 0.5 and schedule("hard", 0, 1) is None


def test_messages() -> None:
    n = net()
    with pytest.raises(RecipeError, match="0: this method has latents or parameters of its own"):
        ProxConnect(sgd(n), n, "s3", keep_ends=False)
    with pytest.raises(RecipeError, match="give steps=N"):
        ProxConnect(sgd(n), n, "prox", keep_ends=False)
    with pytest.raises(RecipeError, match="does not hold these weights: 0, 3"):
        ProxConnect(torch.optim.SGD([n[1].weight], 0.1), n, "bnn", keep_ends=False)
    with pytest.raises(RecipeError, match="ProxConnect is about weights"):
        ProxConnect(sgd(n), n, {"weights": "bnn", "activations": "sign"}, keep_ends=False)
