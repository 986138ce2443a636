"""Uniform: one option for all items. The baseline that every allocation is measured against.

Of the options that every item has (and that keep the limits) the one with the least objective.
"""

from typing import Any

import numpy as np

from lowbit.allocate._problem import Allocation, Problem
from lowbit.allocate._spec import Spec


def allocate(problem: Problem, measure: Any = None, rescore: Any = None) -> Allocation:
    """The best single option. Raises BudgetError where none fits."""
    problem.check()
    n = len(problem.names)
    common = [o for o in range(len(problem.labels)) if problem.allowed[:, o].all()]
    fitting = [o for o in common if problem.fits(np.full(n, o))]
    if not fitting:
        raise problem.unreachable()
    best = min(fitting, key=lambda o: problem.goal[:, o].sum())
    return problem.allocation(np.full(n, best), label=problem.labels[best])


SPEC = Spec("uniform", "One format for all: the baseline", "-", allocate, "allocator")
