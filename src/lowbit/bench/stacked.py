"""Weight functions for many layers at once: all layers of one shape in one stack (layers, out, k).

A network of 20 layers then needs a quarter of the kernels, and nothing here depends on Python numbers that change while
training: what a schedule moves comes in as a tensor, so that a captured CUDA graph stays true.

    latents(w)           float weights (n, out, k) -> the tensors that are trained
    weight(p, t)         the weights of the forward pass, with their gradient; t: the schedule's values
    hard(p)              (levels, scale): what is packed and evaluated; levels * scale, scale (n, 1 or out, 1)
    schedule(progress)   values for progress 0 to 1 of training
    penalty(p), after(p) a term of the loss; what is done to the latents after a step

sign(0) = +1 and step(0) = 0 throughout. Every method uses one training protocol, whatever its paper used.
"""

import math

import torch
from torch import Tensor

from lowbit.estimators import through
from lowbit.train.networks import reste_slope, sgn

Latents = dict[str, Tensor]


def sgn_through(x: Tensor) -> Tensor:
    return through(x, sgn(x.detach()))


def step_through(x: Tensor) -> Tensor:
    """1 where x > 0, else 0; the gradient passes unchanged."""
    return through(x, (x.detach() > 0).to(x.dtype))


def mean_abs(w: Tensor) -> Tensor:
    """Per output row (n, out, 1)."""
    return w.detach().abs().mean(-1, keepdim=True)


def layer_mean_abs(w: Tensor) -> Tensor:
    """Per layer (n, 1, 1)."""
    return w.abs().mean((-2, -1), keepdim=True)


def swish_sign(x: Tensor) -> Tensor:
    """tanh(x/2) + (x/2) sech^2(x/2), for x already multiplied by beta."""
    th = torch.tanh(x / 2)
    return th + x / 2 * (1 - th * th)


def swish_slope(w: Tensor, beta: float) -> Tensor:
    """beta (2 - b x tanh(b x/2)) / (1 + cosh(b x)), in the form that does not overflow."""
    th = torch.tanh(beta * w / 2)
    return beta * (1 - beta * w / 2 * th) * (1 - th * th)


class Method:
    """One latent of the weight's own shape, trained by the identity straight-through estimator."""

    format = "binary-channel"
    source = ""
    stages = 1  # the learning rate falls to zero and starts again so many times

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone()}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        levels, scale = self.hard({k: v.detach() for k, v in p.items()})
        return through(p["w"], levels * scale)

    def schedule(self, progress: float) -> tuple[float, ...]:
        return ()

    def penalty(self, p: Latents) -> "Tensor | None":
        return None

    def after(self, p: Latents) -> None:
        return None


class Float(Method):
    """The weight itself."""

    format = "float"
    source = "He 2016 (arXiv:1512.03385)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return p["w"], torch.ones_like(p["w"][:, :1, :1])

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        return p["w"]


class Ste(Method):
    """sign(w) mean|w| per row, latents clipped to [-1, 1]."""

    source = "BinaryConnect, Courbariaux 2015 (arXiv:1511.00363); scale: XNOR-Net (arXiv:1603.05279)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(p["w"]), mean_abs(p["w"])

    def after(self, p: Latents) -> None:
        p["w"].clamp_(-1, 1)


class TwoStage(Ste):
    """The weight itself for half of training, then as `Ste` from there, each half with a learning rate of its own.

    For networks with signs as activations: what they can learn is learned before the weights lose their values.
    """

    source = "Bi-Real Net, Liu 2018 (arXiv:1808.00278), section 3.4; ReActNet, Liu 2020 (arXiv:2003.03488), section 5.1"
    stages = 2

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        return torch.where(t[0] > 0.5, super().weight(p, t), p["w"])

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (float(progress >= 0.5),)


class BnnPlus(Method):
    """alpha sign(w), alpha trained per row; SwishSign backward, beta 5; loss + lam sum |alpha - |w||."""

    source = "BNN+, Darabi 2018 (arXiv:1812.11800)"
    beta, lam = 5.0, 1e-6

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone(), "scale": mean_abs(w)}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(p["w"]), p["scale"]

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        w = p["w"].detach()
        return through(p["w"], sgn(w), swish_slope(w, self.beta)) * p["scale"]

    def penalty(self, p: Latents) -> Tensor:
        return self.lam * (p["scale"] - p["w"].abs()).abs().sum()


class Reste(Method):
    """sign(w) mean|w| per layer (the mean is differentiated too); backward (1/o)|w|^((1-o)/o), o from 1 to 3."""

    format = "binary-tensor"
    source = "ReSTE, Wu 2023 (arXiv:2308.06689)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(p["w"]), layer_mean_abs(p["w"])

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        w = p["w"].detach()
        return through(p["w"], sgn(w), reste_slope(w, t[0])) * layer_mean_abs(p["w"])

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (1 + (1 - math.cos(math.pi * progress / 2)) * 2,)


class BiPer(Method):
    """alpha sin(omega w) for the first 60 % of training, then alpha sign(sin(omega w)); backward omega cos(omega w)."""

    source = "BiPer, Vargas 2024 (arXiv:2404.01278)"
    omega = 20.0

    def latents(self, w: Tensor) -> Latents:
        return {"w": w.clone(), "scale": mean_abs(w)}

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(torch.sin(self.omega * p["w"])), p["scale"]

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        x = self.omega * p["w"].detach()
        wave = torch.sin(x)
        value = torch.where(t[0] > 0.5, sgn(wave), wave)
        return through(p["w"], value, self.omega * torch.cos(x)) * p["scale"]

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (float(progress >= 0.6),)


class IrNet(Method):
    """Standardized rows, sign, scale 2^round(log2 mean|w1|); backward k t (1 - tanh^2(t w1)), t from 0.001 to 10."""

    source = "IR-Net, Qin 2020 (arXiv:1909.10788)"

    def _standard(self, w: Tensor) -> Tensor:
        return (w - w.mean(-1, keepdim=True)) / w.std(-1, keepdim=True).clamp(min=1e-8)

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        w1 = self._standard(p["w"])
        return sgn(w1), torch.exp2(torch.log2(mean_abs(w1)).round())

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        w1 = self._standard(p["w"])
        x, k = w1.detach(), (1 / t[0]).clamp(min=1)
        slope = k * t[0] * (1 - torch.tanh(t[0] * x) ** 2)
        return through(w1, sgn(x), slope) * torch.exp2(torch.log2(mean_abs(w1)).round())

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (10 ** (-3 + 4 * progress),)


class ProxConnect(Method):
    """w = (1 - theta) u + theta Q(u), theta from 0 to 1 over the first 75 % of training, hard levels afterwards.

    The vertical edge of ProxConnect's family of proximal maps; `levels` 2 or 3. The gradient at w moves u.
    """

    source = "ProxConnect, Dockhorn 2021 (arXiv:2110.13220), vertical maps"

    def __init__(self, levels: int = 2):
        self.ternary = levels == 3
        self.format = "ternary-channel" if self.ternary else "binary-channel"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        u = p["w"]
        if not self.ternary:
            return sgn(u), mean_abs(u)
        a = 1.1 * mean_abs(u)
        return sgn(u) * (u.abs() > a / 2), a

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        levels, scale = self.hard({"w": p["w"].detach()})
        return through(p["w"], torch.lerp(p["w"].detach(), levels * scale, t[0]))

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (min(1.0, progress / 0.75),)


class Parq(ProxConnect):
    """w = middle + (u - middle)/s, clipped to the two nearest levels; s falls from 1 to 0 along a sigmoid."""

    source = "PARQ, Jin 2025 (ICML); ProxConnect's horizontal maps"

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        u, a = p["w"].detach(), self.hard({"w": p["w"].detach()})[1]
        if self.ternary:
            size = a / 2 + (u.abs() - a / 2) / t[0]
            return through(
                p["w"], torch.where(t[0] < 1e-5, self._hard_weight(u), sgn(u) * size.clamp(min=0).minimum(a))
            )
        return through(p["w"], torch.where(t[0] < 1e-5, self._hard_weight(u), (u / t[0]).minimum(a).maximum(-a)))

    def _hard_weight(self, u: Tensor) -> Tensor:
        levels, scale = self.hard({"w": u})
        return levels * scale

    def schedule(self, progress: float) -> tuple[float, ...]:
        x = progress / 0.75
        if x >= 1:
            return (1e-6,)
        f = [1 / (1 + math.exp(10 * (v - 0.5))) for v in (x, 0.0, 1.0)]
        return (max((f[0] - f[2]) / (f[1] - f[2]), 1e-4),)


class BnnPlusPlus(Method):
    """SwishSign_beta(w) mean|w| itself in the forward pass, beta from 5 to 1000; the sign when it is packed."""

    source = "BNN++, Lu 2023 (arXiv:2402.17710)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        return sgn(p["w"]), mean_abs(p["w"])

    def weight(self, p: Latents, t: tuple[Tensor, ...]) -> Tensor:
        return swish_sign(t[0] * p["w"]) * mean_abs(p["w"])

    def schedule(self, progress: float) -> tuple[float, ...]:
        return (5 * 200 ** min(1.0, progress / 0.9),)


class Twn(Method):
    """0 where |w| <= 0.7 mean|w|, else the mean of the kept |w|, per row."""

    format = "ternary-channel"
    source = "TWN, Li 2016 (arXiv:1605.04711)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        w = p["w"].detach()
        kept = (w.abs() > 0.7 * mean_abs(w)).to(w.dtype)
        return sgn(w) * kept, (w.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)


class BitNet(Method):
    """clip(round(w / m), -1, 1) m, m = mean or median of |w| over the layer."""

    format = "ternary-tensor"

    def __init__(self, measure: str = "mean"):
        self.measure = measure
        reloaded = "BitNet b1.58 Reloaded, Nielsen 2024 (arXiv:2407.09527)"
        self.source = reloaded if measure == "median" else "BitNet b1.58, Ma 2024 (arXiv:2402.17764)"

    def hard(self, p: Latents) -> tuple[Tensor, Tensor]:
        w = p["w"].detach()
        size = w.abs()
        m = layer_mean_abs(w) if self.measure == "mean" else size.flatten(1).median(1).values[:, None, None]
        m = m.clamp(min=1e-5)
        return (w / m).round().clamp(-1, 1), m
