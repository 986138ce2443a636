"""Learned rounding: GPTQ's answer for a block, then a few signed-gradient steps on the block's outputs.

    minimise  mean over tokens  |B(x; Q) - B_float(x_float)|^2 / |B_float(x_float)|^2     B: one whole block
    Q = (clamp(round(c)) - z) s e^u       c: real-valued codes, u: log of the change of each group's scale

Start: c is GPTQ's code moved as far towards the unrounded w / s + z as rounding allows (so weights near a border are
the first to cross), u = 0. round has gradient 1 inside the range. Steps follow the sign of the gradient, c by at most
`lr` of a level, u by at most `lr_scale`, both falling to 0 linearly; a step sees `batch` windows. Where the loss over
all windows has not fallen, steps of an eighth are tried, and then GPTQ's answer stays: a block never gets worse.
Cost: steps * (forward + backward) of `batch` windows; memory: the activations of `batch` windows with their gradients.
Source: Cheng 2023 (SignRound, arXiv:2309.05516) for the signed steps, Li 2021 (BRECQ, arXiv:2102.05426) for the block
as the unit; the start, the float model as target and the token weights are derived.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Grid
from lowbit.formats.stores import round_scale
from lowbit.solvers import gptq
from lowbit.solvers._refit import LARGEST
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]  # (layer -> weight (out, in), hidden states) -> hidden states
Pair = tuple[Tensor, Tensor]  # hidden states that enter the block, and the float model's that leave it
OWN = ("steps", "batch", "lr", "lr_scale")
RETRIES = (1.0, 0.125)  # factors of the step sizes: the second where the first made the block worse
MOST = 0.5  # |u|: no scale changes by more than e^0.5
EDGE = 0.49  # how far from its code a real-valued code may start


def solve(w: Tensor, statistics: "LayerStatistics | None", fmt: Format, **options: Any) -> Solution:
    """The layer's start: GPTQ. Raises RecipeError without statistics."""
    return gptq.solve(w, statistics, fmt, **{k: v for k, v in options.items() if k not in OWN})


def tune(
    solved: dict[str, tuple[Solution, Tensor]],
    forward: Forward,
    inputs: list[Tensor],
    targets: list[Tensor],
    *,
    steps: int = 24,
    batch: int = 4,
    lr: float = 0.002,
    lr_scale: float = 0.001,
    seed: int = 0,
    **_: Any,
) -> dict[str, Solution]:
    """Better solutions of a block's layers.

    solved:          layer -> (solution, float weight (out, in))
    inputs, targets: hidden states (1, tokens, width) of each window
    """
    learnable = {n: (s, w) for n, (s, w) in solved.items() if _learnable(s.format) and not s.exceptions}
    fixed = {n: s.w_hat() for n, (s, _) in solved.items() if n not in learnable}
    pairs = list(zip(inputs, targets, strict=True))
    best = before = _mean_loss(fixed | {n: s.w_hat() for n, (s, _) in learnable.items()}, forward, pairs)
    kept = {n: s for n, (s, _) in learnable.items()}
    for smaller in RETRIES if learnable else ():
        layers = {n: _Layer(s, w) for n, (s, w) in learnable.items()}
        for step, some in enumerate(_batches(pairs, steps, batch, seed)):
            _gradients(layers, fixed, forward, some)
            for m in layers.values():
                m.step(smaller * lr * (1 - step / steps), smaller * lr_scale * (1 - step / steps))
        found = {n: m.solution() for n, m in layers.items()}
        after = _mean_loss(fixed | {n: s.w_hat() for n, s in found.items()}, forward, pairs)
        if after < best:
            best, kept = after, found
            break
    notes = {"block_loss": [before, best]}
    return {n: Solution(s.codes, s.grid, s.format, s.notes | notes) for n, s in kept.items()}


def _batches(pairs: list[Pair], steps: int, batch: int, seed: int) -> Iterator[list[Pair]]:
    """`steps` batches; every window is seen once before any is seen again."""
    draw = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // len(pairs))
    order = torch.cat([torch.randperm(len(pairs), generator=draw) for _ in range(rounds)]).tolist()
    for i in range(0, steps * batch, batch):
        yield [pairs[k] for k in order[i : i + batch]]


def _gradients(layers: "dict[str, _Layer]", fixed: dict[str, Tensor], forward: Forward, some: list[Pair]) -> None:
    """Adds the gradients of the batch's mean loss to every layer's codes and scales, one window at a time."""
    with torch.enable_grad():
        weights = {n: m.weight() for n, m in layers.items()}
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        for x, target in some:
            (_loss(forward(fixed | leaves, x), target) / len(some)).backward()
        torch.autograd.backward(list(weights.values()), [leaves[n].grad for n in weights])


class _Layer:
    """A layer whose codes and scales move."""

    def __init__(self, start: Solution, w: Tensor) -> None:
        self.start, self.shape, blocks = start, w.shape, start.format.blocks
        self.scale, self.zero = start.grid.scale, 0.0 if start.grid.zero is None else start.grid.zero
        self.bottom, self.top = start.format.levels.values[0], start.format.levels.values[-1]
        codes = blocks.split(start.codes).float() + self.bottom
        wanted = blocks.split(w) / torch.where(self.scale > 0, self.scale, 1.0) + self.zero
        self.codes = torch.minimum(torch.maximum(wanted, codes - EDGE), codes + EDGE).requires_grad_()
        self.log = torch.zeros_like(self.scale).requires_grad_()

    def weight(self) -> Tensor:
        codes = _Round.apply(self.codes, self.bottom, self.top)
        blocks = self.start.format.blocks
        return blocks.merge((codes - self.zero) * (self.scale * self.log.exp()), *self.shape)

    @torch.no_grad()
    def step(self, lr: float, lr_scale: float) -> None:
        for value, rate in ((self.codes, lr), (self.log, lr_scale)):
            assert value.grad is not None
            value.sub_(value.grad.sign_(), alpha=rate)
            value.grad = None
        self.log.clamp_(-MOST, MOST)

    def solution(self) -> Solution:
        fmt = self.start.format
        codes = _Round.apply(self.codes.detach(), self.bottom, self.top).sub_(self.bottom).to(torch.uint8)
        scale = self.scale * self.log.detach().exp()
        scale = round_scale(torch.where(scale <= LARGEST[fmt.scale_dtype], scale, self.scale), fmt.scale_dtype)
        return Solution(fmt.blocks.merge(codes, *self.shape), Grid(scale, self.start.grid.zero), fmt, self.start.notes)


class _Round(torch.autograd.Function):
    """clamp(round(c), bottom, top); gradient 1 inside the range widened by half a level, 0 outside."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, bottom: float, top: float) -> Tensor:
        ctx.save_for_backward((codes >= bottom - 0.5) & (codes <= top + 0.5))
        return codes.round().clamp_(bottom, top)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


def _learnable(fmt: Format) -> bool:
    plain = fmt.blocks.rows == 1 and bool(fmt.levels.values) and fmt.scale_dtype in ("fp32", "fp16", "bf16")
    return plain and fmt.levels.is_integer_range


def _loss(y: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the target token's own size."""
    return ((y - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-20)).mean()


@torch.no_grad()
def _mean_loss(weights: dict[str, Tensor], forward: Forward, pairs: list[Pair]) -> float:
    return sum(float(_loss(forward(weights, x), target)) for x, target in pairs) / len(pairs)


SPEC = Spec(
    name="learned",
    title="Learned rounding: signed gradients on each block's outputs, from GPTQ's answer",
    source="Cheng 2023, arXiv:2309.05516; Li 2021, arXiv:2102.05426",
    solve=solve,
    format="uint{bits}-{blocks}-search",
    needs_data=True,
    options=gptq.SPEC.options | {"steps": 24, "batch": 4, "lr": 0.002, "lr_scale": 0.001},
    tune=tune,
)
