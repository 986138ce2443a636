"""The knapsack behind every allocator: one option per item, least objective, every limit kept.

    minimise  sum_i objective[i, o_i]     subject to   sum_i column[i, o_i] <= limit     for every limited column

Columns are (items, options) arrays: "loss", "bytes", "seconds", ... An option an item does not have is inf in all of
them. A quality target is the same problem with the objective "bytes" and a limit on "loss".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import BudgetError

Array = NDArray[np.float64]
Choice = NDArray[np.int64]
Measure = Callable[[Choice], float]
Rescore = Callable[[Choice], Array]
ROUNDING = 1e-9  # relative; sums of floats may miss a limit by so much


@dataclass(frozen=True)
class Problem:
    """names: items; labels: options, the same list for all; columns: name -> (items, options); limits: name -> most.

    groups: items with the same number take the same option (a residual branch and its down-sample); None: all free
    Raises ValueError where shapes disagree or an item has no option.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    columns: dict[str, Array]
    limits: dict[str, float] = field(default_factory=dict)
    objective: str = "loss"
    groups: "Choice | None" = None

    def __post_init__(self) -> None:
        shape = (len(self.names), len(self.labels))
        arrays = {k: np.asarray(v, dtype=np.float64) for k, v in self.columns.items()}
        if any(a.shape != shape for a in arrays.values()):
            raise ValueError(f"columns should be {shape}, not { ({k: a.shape for k, a in arrays.items()}) }")
        missing = ({self.objective} | set(self.limits)) - set(arrays)
        if missing:
            raise ValueError(f"no column {sorted(missing)} among {sorted(arrays)}")
        gone = np.any([~np.isfinite(a) for a in arrays.values()], axis=0)
        if len(self.names) and gone.all(1).any():
            raise ValueError(f"item {self.names[int(gone.all(1).argmax())]!r} has no option at all")
        object.__setattr__(self, "columns", {k: np.where(gone, np.inf, a) for k, a in arrays.items()})

    @property
    def goal(self) -> Array:
        """The objective's column."""
        return self.columns[self.objective]

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(items, options): which there are."""
        return np.isfinite(self.goal)

    def totals(self, choice: Choice) -> dict[str, float]:
        """Every column summed over the chosen options."""
        rows = np.arange(len(choice))
        return {k: float(a[rows, choice].sum()) for k, a in self.columns.items()}

    def fits(self, choice: Choice) -> bool:
        """Whether every limit is kept (to rounding)."""
        totals = self.totals(choice)
        return all(totals[k] <= limit + ROUNDING * max(abs(limit), 1e-30) for k, limit in self.limits.items())

    def allocation(self, choice: "Choice | Sequence[int]", **notes: Any) -> "Allocation":
        """The result for these options. Raises BudgetError if they do not fit."""
        choice = np.asarray(choice, dtype=np.int64)
        if not self.fits(choice):
            raise self.unreachable()
        return Allocation(choice, self.totals(choice), notes)

    def unreachable(self, together: bool = False) -> BudgetError:
        """The error for limits nothing meets: what was asked and the smallest there is."""
        words = []
        for k, limit in self.limits.items():
            least = float(self.columns[k].min(1).sum())
            if together or least > limit * (1 + ROUNDING):
                words.append(f"{k} {limit:.6g} was asked and the smallest reachable is {least:.6g}")
        tail = "each alone can be met, all together cannot" if together and len(self.limits) > 1 else ""
        text = "; ".join(words) or "this method found no choice within all limits; try integer_program"
        return BudgetError(f"no choice of formats meets the budget: {text}{': ' + tail if tail else ''}.")

    def check(self) -> None:
        """Raise BudgetError where a limit lies below the least its column can be."""
        for k, limit in self.limits.items():
            if float(self.columns[k].min(1).sum()) > limit + ROUNDING * max(abs(limit), 1e-30):
                raise self.unreachable()

    def merged(self) -> tuple["Problem", Choice]:
        """The problem with one item a group, and the group of each item: choice = small_choice[group]."""
        if self.groups is None:
            return self, np.arange(len(self.names))
        numbers, first, group = np.unique(self.groups, return_index=True, return_inverse=True)
        columns = {k: np.zeros((len(numbers), len(self.labels))) for k in self.columns}
        for k, a in self.columns.items():
            np.add.at(columns[k], group, a)
        return replace(self, names=tuple(self.names[i] for i in first), columns=columns, groups=None), group

    def at(self, choice: Choice) -> list[str]:
        """The labels of a choice."""
        return [self.labels[o] for o in choice]


@dataclass(frozen=True)
class Allocation:
    """choice (items,): which option each item gets; totals of all columns; what the method has to say."""

    choice: Choice
    totals: dict[str, float]
    notes: dict[str, Any] = field(default_factory=dict)


def relative_cost(problem: Problem) -> Array:
    """(items, options): every limited column as a share of its limit, added up: one cost where there are several."""
    cost = np.zeros(problem.goal.shape)
    for k, limit in problem.limits.items():
        cost = cost + problem.columns[k] / max(limit, 1e-300)
    return cost


def lower_hull(cost: Array, goal: Array) -> list[int]:
    """Options of one item on the lower convex hull of (cost, goal), from the cheapest on; each one better.

    Equal points keep the first. inf options are left out.
    """
    hull: list[int] = []
    for o in np.lexsort((goal, cost)).tolist():
        if not np.isfinite(goal[o]) or (hull and goal[o] >= goal[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(cost, goal, hull[-2], hull[-1]) >= _slope(cost, goal, hull[-2], o):
            hull.pop()
        hull.append(o)
    return hull


def _slope(cost: Array, goal: Array, a: int, b: int) -> float:
    rise, run = float(goal[b] - goal[a]), float(cost[b] - cost[a])
    return rise / run if run > 0 else -np.inf
