"""GPTQ: layer-wise least squares on the outputs, column by column, with error feedback.

    minimise tr[(W - Q) H (W - Q)^T],  H = mean x x^T

Defaults: searched grids weighted by diag H, static groups in act-order (columns of large inputs first), damping 0.1 of
the mean diagonal (the published 0.01 fits a short calibration text too closely once sweeps and drift follow), raised
tenfold while H cannot be factored; dead inputs get weight 0. `refit` ends with the closed-form scales for the codes
that were found: rows are independent, so each is a small linear system in its group scales (derived; the objective
cannot rise).
`sweeps` of coordinate descent over the codes follow, each with a refit (`_descent`).
`drift` aims at the float model's outputs instead of the layer's own on its present inputs, so that a layer also mends
what the layers before it have done: the objective of GPTAQ (Li 2025, arXiv:2504.02692), met here by moving the target.
Cost: O(out * in^2 + in^3); memory about 8 in^2 + 9 out * in floats.
Source: Frantar 2022 (arXiv:2210.17323); static groups and act-order after the authors' code.
"""

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers._columns import GridHooks, solve_columns
from lowbit.solvers._descent import descend
from lowbit.solvers._refit import Coded
from lowbit.solvers._refit import refit as refitted
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics, drift_target


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    damping: float = 0.1,
    act_order: bool = True,
    static_groups: bool = True,
    weighted: bool = True,
    refit: bool = True,
    drift: bool = True,
    sweeps: int = 2,
    block: int = 64,
) -> Solution:
    """Quantize w (out, in) float32 under the layer's Gram matrix. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("gptq needs calibration text: add --data FILE, or use --method rtn or hqq.")
    w = drift_target(w, statistics, damping) if drift else w
    importance = statistics.gram.diagonal() if weighted else None
    hooks = GridHooks(fmt, *w.shape, static=static_groups or act_order, importance=importance)
    loop = solve_columns(w, statistics.gram, hooks, damping=damping, act_order=act_order, block=block)
    notes = {"damping": loop.damping, "dead": loop.dead}
    solution = refitted_solution(w, Solution(hooks.result_codes(), hooks.grid, fmt, notes), statistics.gram, refit)
    for _ in range(sweeps if hooks.static else 0):
        hooks.use(solution.grid)
        descend(w, solution.w_hat(), statistics.gram, hooks, damping=loop.damping)
        solution = refitted_solution(w, Solution(hooks.result_codes(), hooks.grid, fmt, notes), statistics.gram, refit)
    return solution


def refitted_solution(w: Tensor, found: Solution, gram: Tensor, refit: bool) -> Solution:
    """The solution with the closed-form scales of its codes, where its format has free ones."""
    fmt = found.format
    coded = Coded(found.codes, found.grid, fmt)
    if not (refit and coded.can_refit):
        return found
    new = refitted(w, [coded], gram, found.notes["damping"])[0]
    return Solution(new.codes, new.grid, fmt, found.notes)


SPEC = Spec(
    name="gptq",
    title="GPTQ: error feedback under the Gram matrix of the inputs",
    source="Frantar 2022, arXiv:2210.17323",
    solve=solve,
    uses_gram=True,
    format="uint{bits}-{blocks}-search",
    needs_data=True,
    options={
        "damping": 0.1,
        "act_order": True,
        "static_groups": True,
        "weighted": True,
        "refit": True,
        "drift": True,
        "sweeps": 2,
        "block": 64,
    },
)
