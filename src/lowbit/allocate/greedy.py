"""Greedy: from the cheapest options upward, always the step with the largest gain per cost.

Options above the lower convex hull of (cost, objective) are dropped, so gains per cost only fall along an item. Where
the steps taken use the limit up this is the optimum; else it is short of it by less than one step. What is left over
goes to single changes that still fit. Several limits count as one: shares of the limits, added up.
Cost: O(items * options * log), so hundreds of thousands of tiles are no trouble.
Source: Fox 1966 (marginal analysis); the allocator of ScaleBITS (arXiv:2602.17698) without its batches.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from lowbit.allocate._problem import ROUNDING, Allocation, Array, Choice, Problem, lower_hull, relative_cost
from lowbit.allocate._spec import Spec


def allocate(problem: Problem, measure: Any = None, rescore: Any = None) -> Allocation:
    """Raises BudgetError where even the cheapest options do not fit."""
    problem.check()
    small, group = problem.merged()
    choice = climb(small, fill=True)
    return problem.allocation(choice[group])


def climb(problem: Problem, fill: bool = False) -> Choice:
    """The greedy choice of a problem without groups. fill: spend what is left on single changes off the hull too."""
    cost = relative_cost(problem)
    hulls = [lower_hull(c, g) for c, g in zip(cost, problem.goal)]
    choice = np.array([h[0] for h in hulls], dtype=np.int64)
    used = _used(problem, choice)
    if not problem.fits(choice):
        raise problem.unreachable(together=True)
    open_ = np.ones(len(choice), dtype=bool)
    for i, a, b in _steps(problem.goal, cost, hulls):
        if not open_[i]:
            continue
        change = {k: problem.columns[k][i, b] - problem.columns[k][i, a] for k in problem.limits}
        if _fits(problem, used, change):
            choice[i] = b
            used = {k: used[k] + change[k] for k in used}
        else:
            open_[i] = False
    return _filled(problem, choice, used) if fill else choice


def _steps(goal: Array, cost: Array, hulls: list[list[int]]) -> list[tuple[int, int, int]]:
    """(item, from, to) along all hulls, by falling gain per cost; ties keep the order of items and of steps."""
    steps = [(i, a, b) for i, h in enumerate(hulls) for a, b in pairwise(h)]
    gains = [(goal[i, a] - goal[i, b]) / max(cost[i, b] - cost[i, a], 1e-300) for i, a, b in steps]
    return [steps[s] for s in np.argsort(-np.array(gains), kind="stable")]


def _used(problem: Problem, choice: Choice) -> dict[str, float]:
    totals = problem.totals(choice)
    return {k: totals[k] for k in problem.limits}


def _fits(problem: Problem, used: dict[str, float], change: dict[str, float]) -> bool:
    return all(used[k] + change[k] <= limit + ROUNDING * abs(limit) for k, limit in problem.limits.items())


def _filled(problem: Problem, choice: Choice, used: dict[str, float], rounds: int = 64) -> Choice:
    """Take the single change with the largest gain that fits, again and again."""
    choice, rows = choice.copy(), np.arange(len(choice))
    for _ in range(rounds if len(choice) else 0):
        with np.errstate(invalid="ignore"):
            gain = problem.goal[rows, choice][:, None] - problem.goal
            for k, limit in problem.limits.items():
                after = used[k] + problem.columns[k] - problem.columns[k][rows, choice][:, None]
                gain = np.where(after <= limit + ROUNDING * abs(limit), gain, -np.inf)
        i, o = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if not gain[i, o] > 0:
            break
        choice[i] = o
        used = _used(problem, choice)
    return choice


SPEC = Spec(
    "greedy", "Largest gain per cost first, on the convex hull", "Fox 1966; arXiv:2602.17698", allocate, "allocator"
)
