"""Dynamic programming on the Pareto set: item after item, keep every (costs, objective) that no other dominates.

    front = {(0, 0)};   for each item: front = undominated {(s + cost_io, l + goal_io)}

Exact, and the whole frontier comes with it: one run serves every budget. With several limits a state is dominated only
if it is so in all of them. Where the front grows beyond `states` it is thinned to the best in each of that many slices
of the cost; the result is then feasible but no longer surely the optimum (noted as exact=False).
Source: the allocation of ZeroQ (Cai 2020, arXiv:2001.00281).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.allocate._problem import ROUNDING, Allocation, Array, Choice, Problem
from lowbit.allocate._spec import Spec


def allocate(problem: Problem, measure: Any = None, rescore: Any = None, *, states: int = 50_000) -> Allocation:
    """Raises BudgetError where nothing fits."""
    problem.check()
    small, group = problem.merged()
    points, trail, exact = front(small, states)
    if not len(points):
        raise problem.unreachable(together=True)
    best = int(np.argmin(points[:, -1]))
    return problem.allocation(_walk_back(trail, best)[group], states=len(points), exact=exact)


def frontier(problem: Problem, states: int = 50_000) -> list[tuple[Choice, dict[str, float]]]:
    """(choice, totals) of every undominated allocation within the limits, in order of the first limit's cost."""
    small, group = problem.merged()
    points, trail, _ = front(small, states)
    order = np.argsort(points[:, 0], kind="stable")
    choices = [_walk_back(trail, int(i))[group] for i in order]
    return [(c, problem.totals(c)) for c in choices]


Trail = list[tuple[NDArray[np.int64], NDArray[np.int64]]]  # per item: which state before, which option


def front(problem: Problem, states: int) -> tuple[Array, Trail, bool]:
    """(points, limits + 1) of undominated sums, costs first and the objective last; how to get there; whether exact."""
    names = list(problem.limits) or [k for k in problem.columns if k != problem.objective][:1]
    table = np.stack([problem.columns[k] for k in [*names, problem.objective]], axis=2)
    limits = np.array([problem.limits.get(k, np.inf) for k in names])
    rest = np.cumsum(table[::-1, :, :-1].min(1), axis=0)[::-1]  # the least that the items from i on cost
    points, trail, exact = np.zeros((1, len(names) + 1)), [], True
    for i in range(len(table)):
        options = np.nonzero(problem.allowed[i])[0]
        grown = (points[:, None] + table[i, options][None]).reshape(-1, points.shape[1])
        least = rest[i + 1] if i + 1 < len(rest) else 0.0
        keep = np.nonzero((grown[:, :-1] + least <= limits + ROUNDING * np.abs(limits)).all(1))[0]
        keep = keep[_undominated(grown[keep])]
        if len(keep) > states:
            keep, exact = keep[_thinned(grown[keep], states)], False
        trail.append((keep // len(options), options[keep % len(options)]))
        points = grown[keep]
    return points, trail, exact


def _undominated(points: Array) -> NDArray[np.int64]:
    """Indices of points that no other beats or equals in every coordinate (of equal points the first)."""
    order = np.lexsort(tuple(points[:, c] for c in range(points.shape[1] - 1, -1, -1)))
    if points.shape[1] == 2:
        goal = points[order, 1]
        before = np.concatenate([[np.inf], np.minimum.accumulate(goal)[:-1]])
        return order[goal < before]
    kept: list[int] = []
    ahead = np.empty((0, points.shape[1] - 1))
    for i in order:  # sorted by the first cost: only points before it can dominate
        tail = points[i, 1:]
        if not (ahead <= tail).all(1).any():
            kept.append(int(i))
            ahead = np.concatenate([ahead[~(tail <= ahead).all(1)], tail[None]])
    return np.array(kept, dtype=np.int64)


def _thinned(points: Array, states: int) -> NDArray[np.int64]:
    """Of each of `states` slices of the first cost, the point with the least objective; the cheapest point always."""
    cost = points[:, 0]
    width = max(float(cost.max() - cost.min()), 1e-300) / (states - 1)
    slices = np.floor((cost - cost.min()) / width).astype(np.int64)
    order = np.lexsort((points[:, -1], slices))
    first = np.unique(slices[order], return_index=True)[1]
    return np.union1d(order[first], [int(cost.argmin())])


def _walk_back(trail: Trail, state: int) -> Choice:
    choice = np.zeros(len(trail), dtype=np.int64)
    for i in range(len(trail) - 1, -1, -1):
        before, option = trail[i]
        choice[i], state = option[state], int(before[state])
    return choice


SPEC = Spec(
    "pareto",
    "Dynamic programming on the Pareto set: exact, and the whole frontier",
    "ZeroQ, arXiv:2001.00281",
    allocate,
    "allocator",
    {"states": 50_000},
)
