"""Learned rounding: GPTQ's answer for a block, then a few signed-gradient steps on the block's outputs.

    minimise  mean over tokens  |B(x; Q) - B_float(x_float)|^2 / |B_float(x_float)|^2     B: one whole block
    Q = (clamp(round(c)) - z) s e^u       c: real-valued codes, u: log of the change of each group's scale

Start: c is GPTQ's code moved as far towards the unrounded w / s + z as rounding allows (so weights near a border are
the first to cross), u = 0. round has gradient 1 inside the range. Steps follow the sign of the gradient, c by at most
`lr` of a level, u by at most `lr_scale`, both falling to 0 linearly; a step sees `batch` windows. The best of the
states at the start and the end, by the loss over all windows, is kept, so a block never gets worse than GPTQ's.
Cost: steps * (forward + backward) of `batch` windows; memory: the activations of `batch` windows with their gradients.
Source: Cheng 2023 (SignRound, arXiv:2309.05516) for the signed steps, Li 2021 (BRECQ, arXiv:2102.05426) for the block
as the unit; the start, the float model as target and the token weights are derived.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Grid
from lowbit.formats.stores import round_scale
from lowbit.solvers import gptq
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]  # (layer -> weight (out, in), hidden states) -> hidden states
OWN = ("steps", "batch", "lr", "lr_scale")
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
    steps: int = 32,
    batch: int = 4,
    lr: float = 0.03,
    lr_scale: float = 0.004,
    seed: int = 0,
    **_: Any,
) -> dict[str, Solution]:
    """Better solutions of a block's layers.

    solved:          layer -> (solution, float weight (out, in))
    inputs, targets: hidden states (1, tokens, width) of each window
    """
    layers = {n: _Layer(s, w) for n, (s, w) in solved.items() if _learnable(s.format) and not s.exceptions}
    fixed = {n: s.w_hat() for n, (s, _) in solved.items() if n not in layers}
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(inputs), generator=draw) for _ in range(steps * batch // len(inputs) + 1)])
    before = _loss_of_all(layers, fixed, forward, inputs, targets)
    with torch.enable_grad():
        for step in range(steps):
            for i in order[step * batch : (step + 1) * batch].tolist():
                weights = fixed | {n: m.weight() for n, m in layers.items()}
                (_loss(forward(weights, inputs[i]), targets[i]) / batch).backward()
            for m in layers.values():
                m.step(lr * (1 - step / steps), lr_scale * (1 - step / steps))
    found = {n: m.solution() for n, m in layers.items()}
    after = _loss_of_all({}, fixed | {n: s.w_hat() for n, s in found.items()}, forward, inputs, targets)
    notes = {"block_loss": [before, after]}
    kept = found if after < before else {n: s for n, (s, _) in solved.items() if n in found}
    return {n: Solution(s.codes, s.grid, s.format, s.notes | notes) for n, s in kept.items()}


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

    def solution(self) -> Solution:
        fmt = self.start.format
        codes = _Round.apply(self.codes.detach(), self.bottom, self.top).sub_(self.bottom).to(torch.uint8)
        scale = round_scale(self.scale * self.log.detach().exp(), fmt.scale_dtype)
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
def _loss_of_all(
    layers: dict[str, _Layer], fixed: dict[str, Tensor], forward: Forward, inputs: list[Tensor], targets: list[Tensor]
) -> float:
    weights = fixed | {n: m.start.w_hat() for n, m in layers.items()}
    return sum(float(_loss(forward(weights, x), t)) for x, t in zip(inputs, targets)) / len(inputs)


SPEC = Spec(
    name="learned",
    title="Learned rounding: signed gradients on each block's outputs, from GPTQ's answer",
    source="Cheng 2023, arXiv:2309.05516; Li 2021, arXiv:2102.05426",
    solve=solve,
    format="uint{bits}-{blocks}-search",
    needs_data=True,
    options=gptq.SPEC.options | {"steps": 32, "batch": 4, "lr": 0.03, "lr_scale": 0.004},
    tune=tune,
)
