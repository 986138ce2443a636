"""One-shot policy-gradient search: a softmax over options for every item, trained by REINFORCE.

    p = softmax(logits / tau);  sample a choice;  r = quality - beta * sum over limits |1 - cost/limit|
    baseline = moving average of r;   loss = -(r - baseline) * mean_i log p_i(sample) + gamma * mean entropy

gamma rises linearly from 0, so that entropy is paid for late and the policy collapses; the first `warmup` steps sample
uniformly. Ends with each item's most likely option, repaired to fit: what loses least per cost goes down first.
Any options will do: integer and float formats stand side by side.
Source: FLIQS (Dotzel 2023, arXiv:2308.03290), reference code's constants. There the weights train meanwhile; here
`measure` is called with each sample (without it the table's loss is used, and no measurement is made).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.allocate._problem import Allocation, Choice, Measure, Problem, relative_cost
from lowbit.allocate._spec import Spec
from lowbit.errors import BudgetError


def allocate(
    problem: Problem,
    measure: "Measure | None" = None,
    rescore: Any = None,
    *,
    steps: int = 2000,
    warmup: float = 0.25,
    beta: float = 1.0,
    gamma: float = 0.1,
    rate: float = 5e-2,
    tau: float = 1.0,
    one_sided: bool = True,
    seed: int = 0,
) -> Allocation:
    """quality = -loss / (the table's mean loss under uniform sampling), so that beta weighs alike on any problem.

    one_sided: costs below a limit are not punished. Raises BudgetError where nothing fits.
    """
    problem.check()
    small, group = problem.merged()
    generator = torch.Generator().manual_seed(seed)
    unit = _typical_loss(small)

    def reward(choice: Choice) -> float:
        totals = small.totals(choice)
        loss = measure(choice[group]) if measure else totals[small.objective]
        shares = [totals[k] / limit for k, limit in small.limits.items()]
        return -loss / unit - beta * sum(max(0.0, s - 1) if one_sided else abs(1 - s) for s in shares)

    logits = search(torch.from_numpy(small.allowed), reward, generator, steps, warmup, gamma, rate, tau)
    choice = repaired(small, logits.masked_fill(~torch.from_numpy(small.allowed), -torch.inf).argmax(1).numpy())
    sharpness = float(_policy(logits, torch.from_numpy(small.allowed), tau).max(1).values.mean())
    return problem.allocation(choice[group], sharpness=sharpness)


def search(
    allowed: Tensor,
    reward: Any,
    generator: torch.Generator,
    steps: int = 2000,
    warmup: float = 0.25,
    gamma: float = 0.1,
    rate: float = 5e-2,
    tau: float = 1.0,
) -> Tensor:
    """Logits (items, options) after `steps` samples. Gradients are written out: d log p(o) / d logits = 1_o - p."""
    logits = torch.full(allowed.shape, 0.5, dtype=torch.float64)
    mean, square = torch.zeros_like(logits), torch.zeros_like(logits)
    baseline = None
    begin = int(warmup * steps)
    for t in range(steps):
        p = _policy(logits, allowed, tau)
        q = allowed.double() if t < begin else p
        sample = torch.multinomial(q, 1, generator=generator)[:, 0]
        r = reward(sample.numpy())
        baseline = r if baseline is None else 0.99 * baseline + 0.01 * r
        if t < begin:
            continue
        push = torch.zeros_like(p).scatter_(1, sample[:, None], 1.0) - p
        log_p = p.clamp(min=1e-30).log()
        entropy = -(p * log_p).sum(1, keepdim=True)
        grow = gamma * (t - begin) / max(steps - begin, 1)
        gradient = (-(r - baseline) * push + grow * -p * (log_p + entropy)) / (tau * len(p))
        logits = _adam(logits, gradient * len(p), mean, square, t - begin + 1, rate)
    return logits


def _policy(logits: Tensor, allowed: Tensor, tau: float) -> Tensor:
    return (logits / tau).masked_fill(~allowed, -torch.inf).softmax(1)


def _adam(x: Tensor, g: Tensor, mean: Tensor, square: Tensor, t: int, rate: float) -> Tensor:
    mean.mul_(0.9).add_(g, alpha=0.1)
    square.mul_(0.999).addcmul_(g, g, value=0.001)
    return x - rate * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)


def _typical_loss(problem: Problem) -> float:
    counts = problem.allowed.sum(1)
    mean = np.where(problem.allowed, problem.goal, 0.0).sum(1) / np.maximum(counts, 1)
    return max(float(np.abs(mean).sum()), 1e-300)


def repaired(problem: Problem, choice: Choice) -> Choice:
    """Lower options, least loss per cost first, until every limit is kept. Raises BudgetError if that cannot be."""
    choice, rows, cost = choice.copy(), np.arange(len(choice)), relative_cost(problem)
    while not problem.fits(choice):
        saved = cost[rows, choice][:, None] - cost
        lost = problem.goal - problem.goal[rows, choice][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            rate = np.where((saved > 0) & np.isfinite(lost), lost / saved, np.inf)
        i, o = np.unravel_index(int(np.argmin(rate)), rate.shape)
        if not np.isfinite(rate[i, o]):
            raise BudgetError(str(problem.unreachable(together=True)))
        choice[i] = o
    return choice


SPEC = Spec(
    "policy_gradient",
    "REINFORCE over integer and float formats",
    "FLIQS, arXiv:2308.03290",
    allocate,
    "allocator",
    {"steps": 2000, "warmup": 0.25, "beta": 1.0, "gamma": 0.1, "rate": 5e-2, "tau": 1.0, "one_sided": True, "seed": 0},
)
