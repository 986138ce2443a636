"""What holds for every weight function of the folder, and the checks of each method's own card."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.errors import FormatError, RecipeError
from lowbit.training import latent_of, pack, penalty, prepare, step, weight_functions
from lowbit.weights import Quantize, weight_method, weight_methods

EXTRA: list[tuple[str, dict[str, Any]]] = [
    ("quantize", {"format": "int4-channel", "scale": "learned", "estimator": "clipped"}),
    ("quantize", {"format": "pot3-g12", "scale": "learned"}),
    ("quantize", {"format": "uint3-g12"}),
    ("quantize", {"format": "kmeans2"}),
    ("quantize", {"format": "int3-channel-lstsq"}),
    ("quantize", {"format": "ternary-channel", "scale": "attached"}),
    ("quantize", {"format": "binary-channel", "scale": "initial", "estimator": "approxsign"}),
    ("quantize", {"format": "fp4_e2m1-g12-fp32", "scale": "initial"}),
    ("quantize", {"format": "binary-g12", "estimator": "elastic_signed", "scale": "learned"}),
    ("bnn_plus", {"regularizer": "r2", "format": "binary-tensor"}),
    ("biper", {"stage": 1, "tau": 0.1}),
    ("s3", {"bits": 2}), ("s3", {"bits": 4}), ("s3", {"init": "weights"}), ("s3", {"dense": True}),
    ("denseshift", {"bits": 2}), ("denseshift", {"bits": 4}), ("denseshift", {"init": "weights", "bits": 2}),
    ("denseshift", {"surrogate": False}),
    ("deepshift_q", {"bits": 2}), ("deepshift_q", {"bits": 3, "top": 0}),
    ("deepshift_ps", {"bits": 2}), ("deepshift_ps", {"bits": 3, "init": "weights"}),
    ("bitnet", {"statistic": "median"}),
    ("bitnet_reloaded", {"strength": (0, 1), "stochastic": True}),
    ("ternary_rule", {"blocks": "channel", "cut": 2 / 3, "level": 4 / 3}),
    ("residual", {"learned": False}),
    ("smart", {"p": 2}),
    ("prox", {"map": "relax", "format": "ternary-channel"}), ("prox", {"map": "hard", "format": "int2-channel"}),
    ("prox", {"format": "pot3nz-channel"}),
]  # fmt: skip
ALL = [(name, {}) for name in weight_methods()] + EXTRA
each = pytest.mark.parametrize("name, options", ALL, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in ALL])


def layer_with(name: str, options: dict[str, Any], shape: tuple[int, ...] = (6, 4, 3, 3)) -> Any:
    layer: Any = nn.Conv2d(shape[1], shape[0], 3) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    return prepare(layer, {"weights": {"method": name, **options}}, keep_ends=False)


@each
def test_it_trains_and_packing_changes_no_value(name: str, options: dict[str, Any]) -> None:
    layer = layer_with(name, options).train()
    (_, _, f), x = next(weight_functions(layer)), torch.randn(3, 4, 5, 5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for position in (0.2, 0.6):
        optimizer.zero_grad()
        (layer(x).square().mean() + penalty(layer)).backward()
        for key, p in layer.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), key
            assert key == "bias" or key.endswith(("tau", "shift")) or p.grad.any(), key
        optimizer.step()
        step(layer, position)
    layer.eval()
    with torch.no_grad():
        w_hat, wanted = layer.weight.clone(), layer(x)
        qt = f.quantized(latent_of(layer))
        assert torch.equal(qt.dequantize(), w_hat)
        assert torch.equal(f.codes(latent_of(layer)), qt.part_codes().reshape(w_hat.shape))
        assert len(w_hat.unique()) <= w_hat.shape[0] * w_hat[0].numel() // f.format.blocks.size(6, 36)[1] * 16
        assert torch.allclose(pack(layer)(x), wanted, atol=1e-5)


@each
def test_a_state_dict_brings_everything_back(name: str, options: dict[str, Any]) -> None:
    a, b = layer_with(name, options), layer_with(name, options)
    step(a, 0.7)
    b.load_state_dict(a.state_dict())
    for mode in (True, False):
        torch.manual_seed(1)
        wanted = a.train(mode).weight
        torch.manual_seed(1)
        assert torch.equal(b.train(mode).weight, wanted)
    assert torch.equal(copy.deepcopy(a).weight, a.weight)


@each
def test_no_latents_become_nan(name: str, options: dict[str, Any]) -> None:
    """All-zero weights, as some initialisations leave them."""
    layer = nn.Linear(36, 6)
    nn.init.zeros_(layer.weight)
    layer = prepare(layer, {"weights": {"method": name, **options}}, keep_ends=False)
    (layer(torch.randn(2, 36)).square().mean() + penalty(layer)).backward()
    for key, p in layer.named_parameters():
        assert torch.isfinite(p.grad).all(), key
    assert torch.isfinite(pack(layer).dequantize()).all()


@each
def test_half_precision(name: str, options: dict[str, Any]) -> None:
    layer = layer_with(name, options, (6, 36)).bfloat16()
    y = layer(torch.randn(2, 36, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()


def test_every_method_knows_its_options() -> None:
    for spec in weight_methods().values():
        assert spec.source.startswith("arXiv:") and spec.kind == "weight"
        with pytest.raises(RecipeError, match="have no option 'nonsense'"):
            spec.check({"nonsense": 1})


# ---------------------------------------------------------------- rules on Gaussian weights


RULES = [  # rule, options, level in sigma, zero fraction, mean squared error
    ("bitnet", {}, 0.798, 0.310, 0.2636),
    ("bitnet_reloaded", {}, 0.674, 0.264, 0.3181),
    ("ternary_rule", {"cut": 2 / 3, "level": 4 / 3}, 1.064, 0.405, 0.1996),
    ("twn", {}, 1.184, 0.424, 0.1918),
    ("ternary_rule", {"cut": 0.612 / 0.79788, "level": "kept"}, 1.224, 0.460, 0.1903),
    ("ternary_rule", {"level": "kept"}, 1.068, 0.310, 0.2132),
    ("xnor", {}, 0.798, 0.0, 0.3634),
    ("residual", {}, 1.281, 0.0, 0.1307),
]


@pytest.mark.parametrize("name, options, level, zeros, mse", RULES)
def test_on_gaussian_weights(name: str, options: dict[str, Any], level: float, zeros: float, mse: float) -> None:
    w = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0))
    w_hat = weight_method(name).build(w, **options).eval()(w).detach()
    assert float(w_hat.max()) == pytest.approx(level, abs=3e-3)
    assert float((w_hat == 0).float().mean()) == pytest.approx(zeros, abs=2e-3)
    assert float((w_hat - w).square().mean()) == pytest.approx(mse, abs=2e-3)


def test_mean_is_the_best_scale_of_signs() -> None:
    w = torch.randn(3, 500)
    w_hat = weight_method("xnor").build(w)(w)
    error = (w - w_hat).square().sum()
    assert error < (w - 1.01 * w_hat).square().sum() and error < (w - 0.99 * w_hat).square().sum()


def test_median_is_not_moved_by_an_outlier() -> None:
    w = torch.randn(1, 999)
    far = w.clone()
    far[0, 0] *= 1e3
    for name, same in (("bitnet_reloaded", True), ("bitnet", False)):
        f = weight_method(name).build(w)
        assert torch.equal(f.quantized(w).grid().scale, f.quantized(far).grid().scale) == same
    assert float((weight_method("bitnet_reloaded").build(w)(w) == 0).float().mean()) <= 0.5


def test_bitnet_is_round_and_clip_and_not_a_projection() -> None:
    w = torch.randn(64, 64)
    f = weight_method("bitnet").build(w)
    m = w.abs().mean()
    assert torch.equal(f.codes(w).int() - 1, (w / m).round().clamp(-1, 1).int())
    once = f(w)
    assert float(f(once).max() / once.max()) == pytest.approx(1 - float((once == 0).float().mean()), rel=1e-3)


def test_reloaded_strength() -> None:
    w = torch.randn(8, 8)
    f = weight_method("bitnet_reloaded").build(w, strength=(0.0, 1.0)).train()
    assert torch.equal(f(w), w)
    f.move(0.5)
    middle = f(w)
    assert torch.allclose(middle, (w + f.eval()(w)) / 2)
    f.train().move(1.0)
    assert torch.allclose(f(w), f.eval()(w), atol=1e-6)


# ---------------------------------------------------------------- sign estimators on weights


def test_raw_units_are_the_chain_rule_and_window_leaves_the_scale_out() -> None:
    w, up = torch.randn(4, 16) * 0.7, torch.randn(4, 16)
    scale = w.abs().mean(1, keepdim=True).half().float()
    for unit, wanted in (("raw", up * scale * (w.abs() <= 1)), ("window", up * (w.abs() <= 1)),
                         ("step", up * (w.abs() <= scale))):  # fmt: skip
        x = w.clone().requires_grad_()
        Quantize("binary-channel", "clipped", unit=unit)(x).backward(up)
        assert torch.allclose(x.grad, wanted), unit


def test_attached_scale_is_the_full_gradient_of_autograd() -> None:
    w, up = torch.randn(4, 16), torch.randn(4, 16)
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    Quantize("binary-tensor-fp32", "clipped", scale="attached", unit="raw")(a).backward(up)
    (b.abs().mean() * (b.clamp(-1, 1) + (b.sign() - b.clamp(-1, 1)).detach())).backward(up)
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_soft_forward_is_hard_in_evaluation() -> None:
    layer = layer_with("bnn_pp", {})
    assert len(layer.train().weight[0].abs().unique()) > 2
    assert len(layer.eval().weight[0].abs().unique()) == 1


def test_biper_has_a_period() -> None:
    w = torch.randn(4, 16)
    f = weight_method("biper").build(w)
    assert torch.equal(f.codes(w + 2 * math.pi / 20), f.codes(w)) and not torch.equal(f.codes(w), (w > 0).byte())
    soft = weight_method("biper").build(w, stage=1).train()
    assert torch.equal(soft(w).sign(), f(w).sign())


def test_irnet_standardizes_and_its_scale_is_one() -> None:
    w = torch.randn(8, 512) * 0.1 + 0.05
    standardize, f = weight_method("irnet").build(w)
    v = standardize(w)
    assert torch.allclose(v.mean(1), torch.zeros(8), atol=1e-5) and torch.allclose(v.std(1), torch.ones(8), atol=1e-5)
    assert f(v).abs().unique().tolist() == [1.0]
    x, up = w.double().requires_grad_(), torch.randn(8, 512, dtype=torch.float64)
    y = x.detach().clone().requires_grad_()
    standardize(x).backward(up)
    ((y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True)).backward(up)
    assert torch.allclose(x.grad, y.grad)
    assert not standardize(torch.ones(2, 5)).any()


def test_lsq_learns_a_scale() -> None:
    layer = layer_with("lsq", {"format": "int3-channel"})
    before = layer.parametrizations.weight[0].scale.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(4, 4, 5, 5)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, layer.parametrizations.weight[0].scale)


# ---------------------------------------------------------------- regularizers


@pytest.mark.parametrize("regularizer, optimum", [("r1", torch.median), ("r2", torch.mean)])
def test_alpha_goes_to_the_median_or_the_mean(regularizer: str, optimum: Any) -> None:
    w = torch.randn(1, 999)
    f = weight_method("bnn_plus").build(w, regularizer=regularizer, strength=1 / 999, format="binary-channel-fp32")
    with torch.no_grad():
        f.scale.fill_(2.0)
    optimizer = torch.optim.SGD([f.scale], 0.1)
    for i in range(200):
        optimizer.zero_grad()
        f.penalty(w).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + i / 20)
    assert float(f.scale.detach()) == pytest.approx(float(optimum(w.abs())), abs=0.02)


@pytest.mark.parametrize("regularizer", ["r1", "r2", "foothill"])
def test_regularizers_vanish_at_the_scale_only(regularizer: str) -> None:
    w = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    f = weight_method("bnn_plus").build(w, regularizer=regularizer, strength=1.0)
    with torch.no_grad():
        assert float(f.penalty(w)) == 0 and float(f.penalty(w * 1.2)) > 0 and float(f.penalty(w * 0.8)) > 0


def test_the_slope_of_r1_to_alpha_counts_weights() -> None:
    w = torch.tensor([[0.1, 0.2, 0.3, -0.9, 0.4]])
    f = weight_method("bnn_plus").build(w, strength=1.0)
    with torch.no_grad():
        f.scale.fill_(0.35)
    f.penalty(w).backward()
    assert float(f.scale.grad) == 3 - 2


# ---------------------------------------------------------------- smart quantization


@pytest.mark.parametrize("p", [1, 2])
def test_both_wells_meet_at_the_cut(p: int) -> None:
    f = weight_method("smart").build(torch.randn(4, 4), p=p)
    for beta in (math.pi / 4 + 1e-6, 1.2, 1.5):
        with torch.no_grad():
            f.tau.fill_(1 / math.tan(beta))
            f.mu.fill_(0.7)
        cut = float(f.cut())
        assert (0.7 - cut) ** p == pytest.approx(math.tan(beta) * cut**p, rel=1e-4)
    with torch.no_grad():
        f.tau.fill_(1.0)
    assert float(f.cut()) == pytest.approx(0.35)
    f.strength, f.depth = 1.0, 0.0
    assert float(f.penalty(torch.tensor([[0.0, 0.7, -0.7]])).detach()) == pytest.approx(0, abs=1e-12)


def test_smart_is_packed_as_binary_only_without_zeros() -> None:
    layer = layer_with("smart", {})
    f = layer.parametrizations.weight[0]
    assert str(f.quantized(latent_of(layer)).format) == "ternary-tensor"
    with torch.no_grad():
        f.tau.fill_(0.0)
    assert str(f.quantized(latent_of(layer)).format) == "binary-tensor"


def test_depth_pushes_to_binary() -> None:
    zeros = []
    for depth in (0.0, 1.0):
        layer = layer_with("smart", {"depth": depth})
        optimizer = torch.optim.SGD(layer.parameters(), 0.05)
        for _ in range(40):
            optimizer.zero_grad()
            penalty(layer).backward()
            optimizer.step()
            step(layer)
        zeros.append(float((layer.weight == 0).float().mean()))
    assert zeros[0] > 0.2 and zeros[1] == 0


def test_messages() -> None:
    w = torch.randn(4, 4)
    for name, options, message in (
        ("s3", {"bits": 5}, "s3 with 5 bits: use 2, 3 or 4"),
        ("denseshift", {"init": "zeros"}, "init='zeros': use \"random\""),
        ("bnn_plus", {"regularizer": "l1"}, "unknown regularizer 'l1'"),
        ("biper", {"stage": 3}, "stage=3"),
        ("smart", {"p": 3}, "p=3"),
        ("prox", {"map": "prq"}, "'prq'. Did you mean 'parq'"),
        ("prox", {"start": 0.9, "stop": 0.5}, "0 <= start < stop <= 1"),
        ("deepshift_q", {"top": 40}, "fp16 scales hold"),
        ("ternary_rule", {"statistic": "mode"}, "use one of"),
        ("quantize", {"scale": "fitted"}, "unknown scale 'fitted'. Did you mean 'fit'"),
        ("quantize", {"forward": "soft"}, "leaves as it is"),
    ):
        with pytest.raises(RecipeError, match=message):
            weight_method(name).build(w, **options)
    for options, message in (
        ({"format": "uint4-channel", "scale": "learned"}, "levels times one scale a block"),
        ({"format": "int4-channel", "scale": "attached"}, r"only mean\|w\| takes a gradient"),
    ):
        with pytest.raises(FormatError, match=message):
            weight_method("quantize").build(w, **options)
    with pytest.raises(RecipeError, match="unknown weights 'deepshift'. Did you mean 'deepshift_q' or"):
        weight_method("deepshift")
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    with pytest.raises(RecipeError, match="s3 would start over at random"):
        prepare(layer, "s3", keep_ends=False)
    assert not parametrize.is_parametrized(layer)
