"""Integer program: x_io in {0, 1}, one option an item, every limit a row; solved exactly by HiGHS.

    min sum goal_io x_io    s.t.  sum_o x_io = 1,   sum cost_io x_io <= limit for each limit,   x_io = x_jo in a group

Several limits (bytes, latency, operations) and equal options within groups are what it is for.
Source: HAWQ-V3 (arXiv:2011.10680), which chooses 4 or 8 bits per layer this way; HiGHS through scipy.optimize.milp.
"""

from typing import Any

import numpy as np

from lowbit.allocate._problem import Allocation, Choice, Problem
from lowbit.allocate._spec import Spec


def allocate(
    problem: Problem, measure: Any = None, rescore: Any = None, *, gap: float = 0.0, seconds: float = 60.0
) -> Allocation:
    """gap: relative distance to the optimum that is good enough; seconds: then the best found so far is taken.

    Raises BudgetError where nothing fits.
    """
    problem.check()
    small, group = problem.merged()
    choice, bound = _solve(small, gap, seconds)
    return problem.allocation(choice[group], lower_bound=bound)


def _solve(problem: Problem, gap: float, seconds: float) -> tuple[Choice, float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    item, option = np.nonzero(problem.allowed)
    n = len(item)
    if n == 0:
        return np.zeros(0, dtype=np.int64), 0.0
    goal = problem.goal[item, option]
    scale = max(float(np.abs(goal).max()), 1e-300)
    one = coo_matrix((np.ones(n), (item, np.arange(n))), shape=(len(problem.names), n)).tocsr()
    rows = [LinearConstraint(one, 1, 1)]
    for k, limit in problem.limits.items():
        unit = max(abs(limit), 1e-300)
        rows.append(LinearConstraint(problem.columns[k][item, option][None] / unit, -np.inf, limit / unit + 1e-10))
    found = milp(
        goal / scale,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=rows,
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if found.x is None:
        raise problem.unreachable(together=True)
    choice = np.zeros(len(problem.names), dtype=np.int64)
    taken = found.x > 0.5
    choice[item[taken]] = option[taken]
    return choice, float(found.mip_dual_bound) * scale if found.mip_dual_bound is not None else float("nan")


SPEC = Spec(
    "integer_program",
    "Exact choice under several budgets, by HiGHS",
    "HAWQ-V3, arXiv:2011.10680",
    allocate,
    "allocator",
    {"gap": 0.0, "seconds": 60.0},
)
