"""What the training papers claim, shown or refuted on toys that take seconds: one function a claim, with its curves.

    lowbit bench claims -o claims/

Each gives {"name", "said", "seen", "shown", "x", "y", "series"}: the claim, what was seen, whether it showed, and the
curves (name -> points). The toys are two rings of points, chains of layers, and scikit-learn's digits.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.diagnose import Recorder, growth
from lowbit.estimators import biper, reste
from lowbit.layers import random_bias_, to_euclid
from lowbit.training import latent_of, penalty, prepare, step, weight_functions

Series = dict[str, list[tuple[float, float]]]
Claim = dict[str, Any]
SIGNS: dict[str, Any] = {
    "weights": {"method": "quantize", "format": "binary-channel", "estimator": "clipped", "scale": "unit"},
    "activations": {"method": "sign", "shift": False, "estimator": "clipped"},
    "keep_ends": False,
}


def random_bias() -> Claim:
    """Random bias initialisation (arXiv:1909.13446)."""
    series: Series = {}
    for name, spread in (("without biases", 0.0), ("random biases", 2.0)):
        series[name] = [(width, 100 * _rings(width, spread)) for width in (25, 50, 100, 200)]
    without, biased = (curve[-1][1] for curve in series.values())
    return _claim(
        "random_bias", "signs without biases cannot tell concentric rings apart, with random ones they can",
        f"{without:.0f} % without, {biased:.0f} % with 200 random biases", without < 75 and biased > 97,
        "sign features", "accuracy on new points, %", series,
    )  # fmt: skip


def _rings(features: int, spread: float) -> float:
    """Accuracy of a least-squares readout of random sign features on rings of radius 0.5 and 1.5."""
    draw = torch.Generator().manual_seed(0)
    angle, y = torch.rand(2, 600, generator=draw) * 2 * math.pi, torch.tensor([[-1.0], [1.0]]).expand(2, 600)
    radius = torch.tensor([[0.5], [1.5]]) + 0.05 * torch.randn(2, 600, generator=draw)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    layer = nn.Linear(2, features)
    with torch.no_grad():
        layer.weight.copy_(F.normalize(torch.randn(features, 2, generator=draw), dim=1))
        layer.bias.zero_()
        if spread:
            random_bias_(layer, spread, draw)
        signs = torch.where(layer(points) >= 0, 1.0, -1.0)
    train, test = signs[:, :400].flatten(0, 1), signs[:, 400:].flatten(0, 1)
    gram = train.T @ train + 1e-2 * torch.eye(features)
    readout = torch.linalg.solve(gram, train.T @ y[:, :400].flatten())
    return float(((test @ readout >= 0) == (y[:, 400:].flatten() > 0)).float().mean())


def random_bias_convolutions() -> Claim:
    """Random biases in a binary convolutional network (arXiv:1909.13446)."""
    curve = []
    for spread in (0.0, 0.5, 1.0, 2.0):
        right = [train_digits("", 8, net=_binary_convolutions(seed, spread), seed=seed)[1] for seed in range(3)]
        curve.append((spread, 100 * fmean(right)))
    none, best = curve[0][1], max(curve[1:], key=lambda point: point[1])
    return _claim(
        "random_bias_convolutions", "random biases help a network of binary convolutions and signs",
        f"{none:.2f} % without, {best[1]:.2f} % with a spread of {best[0]:g} (digits, 3 seeds)", best[1] > none + 0.25,
        "spread of the biases, in standard deviations", "test accuracy, %", {"accuracy": curve},
    )  # fmt: skip


def _binary_convolutions(seed: int, spread: float) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    if spread:
        random_bias_(net, spread)
    return prepare(net, SIGNS | {"keep_ends": True})


def gradient_growth() -> Claim:
    """Batch normalization and binary gradients (arXiv:1909.09139)."""
    sizes = (16, 32, 64, 128, 256)
    series: Series = {"sqrt(2K/pi)": [(k, math.sqrt(2 * k / math.pi)) for k in sizes]}
    series["without normalization"] = [(k, _growth(k, False)) for k in sizes]
    series["with batch-norm"] = [(k, _growth(k, True)) for k in sizes]
    wrong = max(abs(a[1] / b[1] - 1) for a, b in zip(series["without normalization"], series["sqrt(2K/pi)"]))
    most = max(v for _, v in series["with batch-norm"])
    return _claim(
        "gradient_growth", "gradients grow by about sqrt(2K/pi) a layer without batch-norm, and not with it",
        f"within {100 * wrong:.0f} % of sqrt(2K/pi) without; at most {most:.2f} with batch-norm",
        wrong < 0.2 and most < 1, "inputs K of a layer", "growth a layer", series,
    )  # fmt: skip


def _growth(k: int, normalized: bool, depth: int = 6) -> float:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(k, k, bias=False), *([nn.BatchNorm1d(k)] if normalized else [])]
    net = prepare(nn.Sequential(*layers), SIGNS)
    watch = Recorder(net)
    with watch:
        y = net(torch.randn(512, k))
        y.backward(torch.randn_like(y))
    moments = [row["gradient"] for row in watch.record(0)["layers"].values()]
    return growth(moments[:-1] if normalized else moments) or 0.0


def sign_flips() -> Claim:
    """S3 against DeepShift-Q (arXiv:2107.03453)."""
    series = {name: _flips(name) for name in ("deepshift_q", "s3")}
    late = {name: fmean(v for _, v in curve[-5:]) for name, curve in series.items()}
    return _claim(
        "sign_flips", "S3 keeps flipping signs where DeepShift freezes",
        f"{late['s3']:.2f} % of the signs flip an epoch at the end with S3, {late['deepshift_q']:.2f} % with DeepShift",
        late["s3"] > 2 * late["deepshift_q"], "epoch", "signs that flip in an epoch, %", series,
    )  # fmt: skip


def _flips(method: str) -> list[tuple[float, float]]:
    before: list[Tensor] = []
    curve: list[tuple[float, float]] = []

    def look(net: nn.Module, epoch: int) -> None:
        nonlocal before
        layers: list[Any] = [layer for _, layer, _ in weight_functions(net)]
        now = [torch.sign(layer.weight.detach()) for layer in layers]
        if before:
            both = [(a != b)[(a != 0) & (b != 0)].float() for a, b in zip(before, now)]
            curve.append((epoch, 100 * float(torch.cat(both).mean())))
        before = now

    train_digits({"method": method, "bits": 3}, epochs=20, look=look)
    return curve


def surrogate() -> Claim:
    """DenseShift's surrogate against plain autograd (arXiv:2208.09708)."""
    series: Series = {}
    for name, on in (("2^S differentiated itself", False), ("surrogate sqrt(S + 1)", True)):
        losses = [train_digits({"method": "denseshift", "bits": 4, "surrogate": on}, 15, seed=s)[0] for s in range(3)]
        series[name] = [(i + 1, fmean(column)) for i, column in enumerate(zip(*losses))]
    plain, ours = (curve[-1][1] for curve in series.values())
    return _claim(
        "surrogate", "the surrogate of DenseShift trains better than plain autograd",
        f"training loss after 15 epochs {ours:.3f} with it, {plain:.3f} without (4 bits, 3 seeds)", ours < plain,
        "epoch", "training loss", series,
    )  # fmt: skip


def reste_equilibrium() -> Claim:
    """ReSTE's two indicators (arXiv:2308.06689)."""
    draw = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 100_000, generator=draw)
    powers = [1 + i / 2 for i in range(15)]
    error = [float(reste.estimating_error([w], o)) for o in powers]
    spread = [float(reste.gradient_stability([g * reste.slope(w, o)])) for o in powers]
    series = {"estimating error": _scaled(powers, error), "gradient instability": _scaled(powers, spread)}
    shown = error == sorted(error, reverse=True) and spread[-1] > spread[0]
    return _claim(
        "reste_equilibrium", "a larger o brings ReSTE nearer to the sign and its gradients further from stable",
        f"from o = 1 to 8 the error falls to {error[-1] / error[0]:.2f} and the variance of |gradient| becomes "
        f"{spread[-1] / spread[0]:.2f} of its first value", shown, "o", "over the largest value", series,
    )  # fmt: skip


def biper_error() -> Claim:
    """BiPer's quantization error over frequency (arXiv:2404.01278)."""
    w = 0.1 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    at = [1, 2, 5, 10, 15, 20, 30, 40, 60, 80]
    series: Series = {"sin(omega w) to its sign": [], "|w| scaled to its sign": []}
    plain = float((w / w.abs().mean() - w.sign()).square().mean())
    for omega in at:
        wave = biper.transform(w, float(omega))
        series["sin(omega w) to its sign"].append(
            (omega, float((wave - torch.where(wave >= 0, 1.0, -1.0)).square().mean()))
        )
        series["|w| scaled to its sign"].append((omega, plain))
    errors = [v for _, v in series["sin(omega w) to its sign"]]
    limit = 1.5 - 4 / math.pi
    return _claim(
        "biper_error", "the quantization error of a sine depends on its frequency, and falls below that of plain signs",
        f"mean squared error {errors[0]:.3f} at omega 1, {min(errors):.3f} at omega {at[errors.index(min(errors))]}, "
        f"towards {limit:.3f} (= 3/2 - 4/pi) for large ones; plain signs {plain:.3f}",
        min(errors) < plain and abs(errors[-1] - limit) < 0.01, "omega", "mean squared error", series,
    )  # fmt: skip


def median_or_mean() -> Claim:
    """The median instead of the mean for small ternary networks (arXiv:2407.09527)."""
    places = [(lr, decay) for lr in (0.001, 0.003, 0.01) for decay in (0.0, 0.05)]
    series: Series = {"mean": [], "median": []}
    for name, method in (("mean", "bitnet"), ("median", "bitnet_reloaded")):
        for i, (lr, decay) in enumerate(places):
            right = fmean(train_digits(method, 8, lr, decay, seed)[1] for seed in range(3))
            series[name].append((i + 1, 100 * right))
    gap = fmean(b[1] - a[1] for a, b in zip(series["mean"], series["median"]))
    places_words = "; ".join(f"{i + 1}: lr {lr:g}, decay {decay:g}" for i, (lr, decay) in enumerate(places))
    return _claim(
        "median_or_mean", "the median is at least as good as the mean for small ternary networks",
        f"median minus mean {gap:+.2f} points over learning rates and decays ({places_words})", gap > -0.25,
        "setting", "test accuracy, %", series,
    )  # fmt: skip


def euclid_transition() -> Claim:
    """From products to distances (arXiv:2212.11803)."""
    series: Series = {}
    for name, share in (("abrupt", 0.0), ("over half of the training", 0.5)):
        net = digits_net()
        before = train_digits("", 8, net=net)[0][-1]
        to_euclid(net, share)
        step(net, 0.0)
        losses = train_digits("", 16, lr=0.001, net=net)[0]
        series[name] = [(0, before), *((i + 1, loss) for i, loss in enumerate(losses))]
    abrupt, smooth = (max(v for _, v in curve) for curve in series.values())
    return _claim(
        "euclid_transition", "a gradual transition from products to distances keeps what an abrupt one loses",
        f"highest training loss on the way {smooth:.2f} gradually, {abrupt:.2f} abruptly", smooth < abrupt, "epoch",
        "training loss", series,
    )  # fmt: skip


def prox_midpoints() -> Claim:
    """ProxConnect's weights at the end (arXiv:2110.13220)."""
    series: Series = {}
    recipes = {
        "straight-through": {"method": "prox", "map": "hard"},
        "ProxConnect (PARQ)": {"method": "prox", "map": "parq"},
    }
    edges = [i / 10 for i in range(1, 21)]
    for name, recipe in recipes.items():
        found = []
        for seed in range(3):
            net = digits_net(seed)
            train_digits(recipe, 30, net=net, seed=seed)
            for _, layer, _ in weight_functions(net):
                u = latent_of(layer).abs()
                found.append((u / u.mean(1, keepdim=True)).flatten())
        size = torch.cat(found)
        series[name] = [(e, 100 * float((size < e).float().mean())) for e in edges]
    near = {name: curve[1][1] for name, curve in series.items()}
    hard, soft = near.values()
    return _claim(
        "prox_midpoints", "ProxConnect leaves fewer latent weights near the midpoint between the levels",
        f"{soft:.1f} % of |u| are below a fifth of their mean, {hard:.1f} % with straight-through", soft < hard,
        "|u| over its mean", "weights below it, %", series,
    )  # fmt: skip


CLAIMS: dict[str, Callable[[], Claim]] = {
    f.__name__: f
    for f in (random_bias, random_bias_convolutions, gradient_growth, sign_flips, surrogate, reste_equilibrium,
              biper_error, median_or_mean, euclid_transition, prox_midpoints)
}  # fmt: skip


# ------------------------------------------------------------ the digits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, x_test, y_test of scikit-learn's digits; x (n, 64) of mean 0."""
    from lowbit.train.tasks.digits import DigitImages

    data = DigitImages(torch.device("cpu"))
    return data.x.flatten(1) - 0.5, data.y, data.x_test.flatten(1) - 0.5, data.y_test


def digits_net(seed: int = 0, width: int = 48) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def train_digits(
    recipe: Any, epochs: int, lr: float = 0.003, decay: float = 0.0, seed: int = 0,
    net: "nn.Module | None" = None, look: Callable[[nn.Module, int], None] = lambda net, epoch: None,
) -> tuple[list[float], float]:  # fmt: skip
    """AdamW in batches of 64; losses of the epochs and the test accuracy. recipe "": the network as it is."""
    net = digits_net(seed) if net is None else net
    if recipe:
        prepare(net, {"weights": recipe}, skip=["6"], keep_ends=False)
    x, y, _, _ = digits()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)
    draw, losses, total, done = torch.Generator().manual_seed(seed), [], epochs * (len(y) // 64), 0
    for epoch in range(epochs):
        sum_ = 0.0
        for at in torch.randperm(len(y), generator=draw)[: len(y) // 64 * 64].split(64):
            loss = F.cross_entropy(net(x[at]), y[at]) + penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            step(net, done / total)
            sum_ += float(loss.detach())
        losses.append(sum_ / (len(y) // 64))
        look(net, epoch + 1)
    return losses, accuracy(net)


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """On the test digits, in evaluation mode; back in training mode afterwards."""
    _, _, x, y = digits()
    net.eval()
    right = float((net(x).argmax(1) == y).float().mean())
    net.train()
    return right


def _scaled(xs: list[float], ys: list[float]) -> list[tuple[float, float]]:
    return [(x, y / max(ys)) for x, y in zip(xs, ys)]


def _claim(name: str, said: str, seen: str, shown: bool, x: str, y: str, series: Series) -> Claim:
    source = (CLAIMS[name].__doc__ or "").strip()
    return {
        "name": name,
        "source": source,
        "said": said,
        "seen": seen,
        "shown": bool(shown),
        "x": x,
        "y": y,
        "series": series,
    }
