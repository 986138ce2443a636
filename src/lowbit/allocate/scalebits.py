"""ScaleBITS: greedy in batches, each accepted only if the measured loss falls, re-scored at the point it has reached.

    start:   the hull greedy on the table taken at the start
    repeat:  table = rescore(choice)          (gains taken at the quantized weights as they are now)
             swap the `k` upgrades of largest gain per cost for downgrades of least loss per cost that pay for them
             measure; accept if the loss fell, else halve k

One gradient is valid near its point only: hence batches, acceptance, and a fresh table after each.
Source: Li 2026 (arXiv:2602.17698); the schedule of batches is ours (the paper's constants were not readable).
"""

import numpy as np

from lowbit.allocate._problem import Allocation, Array, Choice, Measure, Problem, Rescore, relative_cost
from lowbit.allocate._spec import Spec
from lowbit.allocate.greedy import climb


def allocate(
    problem: Problem,
    measure: "Measure | None" = None,
    rescore: "Rescore | None" = None,
    *,
    rounds: int = 16,
    batch: float = 0.125,
) -> Allocation:
    """rounds: at most so many batches; batch: the first one's size as a share of the items.

    Without `measure` the table's own loss is used, and the result is the greedy one. Raises BudgetError.
    """
    problem.check()
    small, group = problem.merged()
    choice = climb(small, fill=measure is None)
    loss_of = (lambda c: measure(c[group])) if measure else (lambda c: small.totals(c)[small.objective])
    best, history = loss_of(choice), []
    k = max(1, int(batch * len(choice)))
    table = _merged_table(rescore, choice, group) if rescore else small.goal
    for _ in range(rounds):
        tried = swap(small, table, choice, k)
        if (tried == choice).all():
            break
        loss = loss_of(tried)
        history.append({"swapped": int((tried != choice).sum()), "loss": loss, "accepted": loss < best})
        if loss < best:
            choice, best = tried, loss
            table = _merged_table(rescore, choice, group) if rescore else table
        elif k == 1:
            break
        else:
            k //= 2
    return problem.allocation(choice[group], loss=best, batches=history)


def swap(problem: Problem, table: Array, choice: Choice, k: int) -> Choice:
    """Up to k upgrades with the largest gain per cost, paid for by downgrades with the least loss per cost.

    Stops before a pair that would lose more than it gains.
    """
    cost = relative_cost(problem)
    rows = np.arange(len(choice))
    with np.errstate(invalid="ignore", divide="ignore"):
        more = cost - cost[rows, choice][:, None]
        gain = table[rows, choice][:, None] - table
        rate = np.where(np.isfinite(more) & (more != 0), gain / more, np.nan)
    up = _best(np.where((more > 0) & (gain > 0), rate, -np.inf))
    down = _best(np.where((more < 0) & np.isfinite(more), -rate, -np.inf))  # loss per cost given back, least first
    new, touched = choice.copy(), np.zeros(len(choice), dtype=bool)
    givers = iter(down)
    for i, to, _ in up[:k]:
        if touched[i]:
            continue
        step = new.copy()
        step[i] = to
        win, lost, used = gain[i, to], 0.0, [i]
        while not problem.fits(step):
            j, low, _ = next(((j, low, r) for j, low, r in givers if not touched[j] and j not in used), (-1, -1, 0.0))
            if j < 0:
                return new
            step[j] = low
            lost += max(0.0, -gain[j, low])
            used.append(j)
        if lost >= win:
            return new
        new = step
        touched[used] = True
    return new


def _best(rate: Array) -> list[tuple[int, int, float]]:
    """(item, option, rate), each item's best, by falling rate; items at -inf are left out."""
    option = rate.argmax(1)
    value = rate[np.arange(len(rate)), option]
    order = np.argsort(-value, kind="stable")
    return [(int(i), int(option[i]), float(value[i])) for i in order if value[i] > -np.inf]


def _merged_table(rescore: Rescore, choice: Choice, group: Choice) -> Array:
    table = np.asarray(rescore(choice[group]), dtype=np.float64)
    if len(table) == len(choice):
        return table
    merged = np.zeros((len(choice), table.shape[1]))
    np.add.at(merged, group, table)
    return merged


SPEC = Spec(
    "scalebits",
    "Greedy in batches, re-scored and accepted by measurement",
    "ScaleBITS, arXiv:2602.17698",
    allocate,
    "allocator",
    {"rounds": 16, "batch": 0.125},
)
