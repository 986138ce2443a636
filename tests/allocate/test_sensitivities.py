"""Sensitivities on networks whose answers are known: quadratics, disjoint outputs, errors that cancel."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowbit.allocate import Probe, Problem, find, storage_bytes, table
from lowbit.allocate.gain import run as gain
from lowbit.allocate.hessian_eigenvalue import eigenvalues
from lowbit.allocate.hessian_trace import traces
from lowbit.allocate.pairwise import interactions
from lowbit.errors import RecipeError, ShapeError
from lowbit.formats import Format, quantize


def to_grid(w, label):
    """Round to multiples of 2^-label."""
    step = 2.0 ** -int(label)
    return (w / step).round() * step


def quadratic_probe(*hessians, menu=("4", "2", "0")):
    """loss = sum_i w_i^T H_i w_i / 2 around float weights at 0 gradient (shifted to w0)."""
    generator = torch.Generator().manual_seed(1)
    origin = {f"w{i}": torch.randn(len(h), generator=generator) for i, h in enumerate(hessians)}
    weights = {n: nn.Parameter(v.clone()) for n, v in origin.items()}

    def loss():
        d = [weights[n] - origin[n] for n in origin]
        return sum(0.5 * x @ h @ x for x, h in zip(d, hessians))

    return Probe(weights, menu, lambda n, label: to_grid(origin[n], label), loss)


def spd(n, seed):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return a @ a.T


def mlp_probe(menu=("uint8-g8", "uint4-g8", "uint2-g8")):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    weights = {f"{i}.weight": net[i].weight for i in (0, 2, 4)}
    floats = {n: w.detach().clone() for n, w in weights.items()}

    def rounded(name, label):
        return quantize(floats[name], Format.parse(label)).dequantize()

    return Probe(weights, menu, rounded, lambda: F.cross_entropy(net(x), y), lambda: net(x))


def test_hutchinson_is_within_three_standard_errors_and_exact_on_a_diagonal():
    h, d = spd(12, 0), torch.diag(torch.arange(1.0, 6.0))
    found = traces(quadratic_probe(h, d), draws=200)
    error = float(found["w0"].std() / 200**0.5)
    assert abs(float(found["w0"].mean()) - float(h.trace())) <= 3 * error
    assert traces(quadratic_probe(d), draws=1)["w0"].tolist() == pytest.approx([15.0])


def test_the_cross_terms_between_items_average_out():
    """One double backward pass serves all items although they interact."""
    w = {n: nn.Parameter(torch.ones(6)) for n in "ab"}
    c = spd(12, 4)
    probe = Probe(
        w,
        ("0",),
        lambda n, _: torch.zeros(6),
        lambda: 0.5 * torch.cat(list(w.values())) @ c @ torch.cat(list(w.values())),
    )
    found = traces(probe, draws=400)
    for n, block in (("a", c[:6, :6]), ("b", c[6:, 6:])):
        assert abs(float(found[n].mean() - block.trace())) <= 4 * float(found[n].std()) / 20


def test_power_iteration_finds_the_largest_eigenvalue():
    h, d = spd(10, 2), torch.diag(torch.tensor([1.0, -7.0, 3.0]))
    found = eigenvalues(quadratic_probe(h, d), steps=200, tolerance=1e-7)
    assert found["w0"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)
    assert found["w1"] == pytest.approx(-7.0, rel=1e-3)


def test_second_order_scores_on_a_quadratic():
    """lambda |d|^2 / 2 bounds the true loss; the mean-trace score equals it where H is a multiple of 1."""
    h = spd(10, 5)
    probe = quadratic_probe(h, 3 * torch.eye(7))
    true = find("measured").run(probe)
    assert (find("hessian_eigenvalue").run(probe, steps=200) >= true * (1 - 1e-3)).all()
    assert find("hessian_trace").run(probe, draws=1)[1] == pytest.approx(true[1], rel=1e-4)


def test_eight_bits_lose_about_289_times_less_than_four():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(64, 256))
    fmt = {b: Format.parse(f"uint{b}-channel-fp32") for b in (4, 8)}
    probe = Probe(
        {"w": w}, ("4", "8"), lambda n, b: quantize(w.detach(), fmt[int(b)]).dequantize(), lambda: w.square().sum()
    )
    row = find("hessian_trace").run(probe, draws=2)[0]
    assert row[0] / row[1] == pytest.approx(289, rel=0.1)


def test_kl_is_the_divergence_by_hand_and_needs_outputs():
    probe = mlp_probe()
    got = find("kl").run(probe)
    name = probe.names[1]
    with torch.no_grad():
        p = probe.outputs().softmax(-1)
        with probe.placed({name: probe.rounded(name, "uint2-g8")}):
            q = probe.outputs().softmax(-1)
    assert got[1, 2] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert (got[:, 0] < got[:, 1]).all() and (got[:, 1] < got[:, 2]).all() and (got >= 0).all()
    probe.outputs = None
    with pytest.raises(RecipeError, match="measured"):
        find("kl").run(probe)


def test_gain_at_the_quantized_point_predicts_the_change_where_the_float_point_cannot():
    h = spd(10, 7)
    probe = quadratic_probe(h, spd(10, 8), menu=("9", "3", "2"))
    choice = np.array([2, 2])
    predicted = gain(probe, choice=choice)
    assert (predicted[:, 2] == 0).all()
    for i in range(2):  # for a quadratic: <g, d> = change - d^T H d / 2, the known second-order rest
        step = choice.copy()
        step[i] = 1
        change = probe.measure(step) - probe.measure(choice)
        name = probe.names[i]
        d = probe.rounded(name, "3") - probe.rounded(name, "2")
        rest = 0.5 * float(d @ (h if i == 0 else spd(10, 8)) @ d)
        assert predicted[i, 1] == pytest.approx(change - rest, rel=1e-3)
    assert np.abs(gain(probe, choice=np.array([0, 0]))[:, 1]).max() < 0.05 * np.abs(predicted[:, 1]).max()
    plain = gain(probe, choice=choice, signed=False)
    assert (plain[:, :2] < 0).all() and (np.abs(plain) >= np.abs(predicted) - 1e-6).all()


def test_items_on_disjoint_outputs_do_not_interact_and_cancelling_errors_do():
    probe = quadratic_probe(spd(5, 0), spd(5, 1))
    assert np.abs(interactions(probe, np.array([2, 2]), [0, 1])).max() < 1e-5
    w = {n: nn.Parameter(torch.tensor([1.0])) for n in "ab"}
    sign = {"a": 0.5, "b": -0.5}
    both = Probe(w, ("0",), lambda n, _: torch.tensor([1.0 + sign[n]]), lambda: (w["a"] + w["b"] - 2).square().sum())
    e = interactions(both, np.array([0, 0]), [0, 1])
    assert e[0, 1] == pytest.approx(-0.5)  # alone 0.25 each, together 0
    augmented, single = find("pairwise").run(both), find("hessian_trace").run(both)
    assert (augmented < single).all()


def test_pairwise_terms_change_the_order():
    """a and b cancel, c stands alone with less single loss: without pairs c goes first, with them a or b does."""
    w = {n: nn.Parameter(torch.tensor([1.0])) for n in "abc"}
    shift = {"a": 0.5, "b": -0.5, "c": 0.45}
    loss = lambda: ((w["a"] + w["b"] - 2).square() + (w["c"] - 1).square()).sum()  # noqa: E731
    probe = Probe(w, ("0",), lambda n, _: torch.tensor([1.0 + shift[n]]), loss)
    assert find("hessian_trace").run(probe)[:, 0].argmin() == 2
    assert find("pairwise").run(probe)[:, 0].argmin() != 2


@pytest.mark.parametrize("name", sorted(table("sensitivity")))
def test_every_sensitivity_leaves_the_weights_alone_and_knows_missing_options(name):
    probe = mlp_probe()
    before = {n: w.detach().clone() for n, w in probe.weights.items()}
    full = probe.rounded
    probe.rounded = lambda n, label: None if (n, label) == ("2.weight", "uint8-g8") else full(n, label)
    got = find(name).run(probe)
    assert got.shape == (3, 3) and got[1, 0] == np.inf and np.isfinite(np.delete(got, 3)).all()
    assert all(torch.equal(before[n], w) for n, w in probe.weights.items())
    assert all(w.grad is None for w in probe.weights.values())


def trained_probe():
    """Five layers of one size, trained to fit a teacher: their sensitivities differ, their bytes do not."""
    torch.manual_seed(5)
    net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(16, 16), nn.Tanh())])
    x = torch.randn(256, 16)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3], x[:, 4].abs()], 1).repeat(1, 4) / 2
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    weights = {f"{i}": net[i].weight for i in range(0, 10, 2)}
    floats = {n: w.detach().clone() for n, w in weights.items()}
    return Probe(
        weights,
        ("uint8-g16", "uint6-g16", "uint5-g16", "uint4-g16", "uint3-g16"),
        lambda n, label: quantize(floats[n], Format.parse(label)).dequantize(),
        lambda: F.mse_loss(net(x), y),
    )


@pytest.mark.slow
def test_hawq_beats_the_reversed_order_at_equal_bytes():
    probe = trained_probe()
    omega = find("hessian_trace").run(probe, draws=32)
    size = probe.table(lambda n, label, w: storage_bytes(tuple(w.shape), label))
    rank = np.argsort(np.argsort(omega[:, -1]))
    reversed_ = np.sort(omega, axis=0)[len(rank) - 1 - rank]
    limits = {"bytes": 5 * float(size[0, 3])}

    def loss_of(losses, allocator):
        problem = Problem(probe.names, probe.menu, {"loss": losses, "bytes": size}, limits)
        return probe.measure(find(allocator).run(problem).choice)

    assert loss_of(omega, "integer_program") < 0.75 * loss_of(reversed_, "integer_program")


def test_storage_bytes_are_the_bytes_of_the_quantized_tensor():
    for text in ("uint4-g64", "uint3-g32-search", "int8-channel", "kmeans2-channel", "ternary", "uint2-g64-zreal"):
        q = quantize(torch.randn(24, 128), Format.parse(text))
        assert storage_bytes((24, 128), text) == q.nbytes, text
    with pytest.raises(ShapeError):
        storage_bytes((4, 100), "uint4-g64")
