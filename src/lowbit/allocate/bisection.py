"""Bisection to a quality target: lower the least sensitive items first, as many as the target bears.

Items are sorted by sensitivity (their loss at the lowest option). For each next lower option in turn, the longest
prefix of that order is lowered for which measure(choice) <= target, found with log2(items) measurements: exact where
the loss only grows with the prefix. It does not always in practice, so the end is measured once more; where that fails
the last prefix known to be good is taken.
Source: Schaefer 2023 (arXiv:2306.04879), which sorts by Hessians augmented with inter-layer terms: see `pairwise`.
"""

from typing import Any

import numpy as np

from lowbit.allocate._problem import Allocation, Choice, Measure, Problem, relative_cost
from lowbit.allocate._spec import Spec
from lowbit.errors import BudgetError


def allocate(
    problem: Problem, measure: "Measure | None" = None, rescore: Any = None, *, target: "float | None" = None
) -> Allocation:
    """target: the most that measure(choice) may be (without `measure`: the table's loss); by default the loss limit.

    Limits on other columns are not looked at: the result is the cheapest this order reaches at the target.
    Raises BudgetError where even the highest options miss the target.
    """
    target = problem.limits.get("loss", np.inf) if target is None else target
    small, group = problem.merged()
    loss_of = (lambda c: measure(c[group])) if measure else (lambda c: small.totals(c)["loss"])
    levels = _levels(small)
    order = np.argsort(small.columns["loss"][np.arange(len(levels)), [lv[-1] for lv in levels]], kind="stable")
    choice = np.array([lv[0] for lv in levels], dtype=np.int64)
    if not loss_of(choice) <= target:
        raise BudgetError(
            f"a loss of at most {target:.6g} was asked and the smallest reachable is {loss_of(choice):.6g}, with the "
            "widest formats everywhere."
        )
    asked = 1
    for depth in range(1, max(map(len, levels), default=1)):
        choice, used = _lower(choice, order, levels, depth, lambda c: loss_of(c) <= target)
        asked += used
    result = choice[group]
    return Allocation(result, problem.totals(result), {"loss": loss_of(choice), "measurements": asked + 1})


def _levels(problem: Problem) -> list[list[int]]:
    """Each item's options from the dearest to the cheapest; only those that lose more as they cost less."""
    cost = relative_cost(problem) if problem.limits.keys() - {"loss"} else problem.columns.get("bytes", problem.goal)
    rows = []
    for c, loss in zip(cost, problem.columns["loss"]):
        row: list[int] = []
        for o in np.lexsort((-c, loss)).tolist():
            if np.isfinite(loss[o]) and (not row or c[o] < c[row[-1]]):
                row.append(o)
        rows.append(row)
    return rows


def _lower(choice: Choice, order: Choice, levels: list[list[int]], depth: int, good: "Any") -> tuple[Choice, int]:
    """The longest prefix of `order` that can go down to its option number `depth`; how often was measured."""
    can = [i for i in order if len(levels[i]) > depth and choice[i] == levels[i][depth - 1]]
    low, high, asked = 0, len(can), 0

    def lowered(n: int) -> Choice:
        new = choice.copy()
        for i in can[:n]:
            new[i] = levels[i][depth]
        return new

    while low < high:
        middle = (low + high + 1) // 2
        asked += 1
        if good(lowered(middle)):
            low = middle
        else:
            high = middle - 1
    return lowered(low), asked


SPEC = Spec(
    "bisection",
    "Longest prefix of the insensitive items that a quality target bears",
    "Schaefer 2023, arXiv:2306.04879",
    allocate,
    "allocator",
    {"target": None},
)
