"""ICQuant: the outliers of each row on a second grid of the same bits, their places coded as gaps.

    per row: the gamma * in largest |w| are outliers; they take half of the range
    codes:   b bits for every weight, in one plane; the mask (gap codes with an escape, about 0.31 bits a weight at 5%)
             says which of the row's two grids a code means

Any base format composes. "kmeans2-channel" is the paper's SK: 2^b levels per row and part, found by k-means weighted
with the sensitivities. "kmeans2-g64-shared" gives the inliers one table and a scale for each group, the outliers one
table and a scale for each row, which short rows can afford. "uint2-channel" is the paper's RTN: min-max for the
inliers; for the outliers half of the levels min-max in either tail, stored as a table of the row.
`feedback` runs the column loop on these grids and ends with the closed-form levels, `sweeps` of coordinate descent and
the aim at the float model's outputs (`drift`), as gptq does; without it (the paper's way) each weight takes its nearest
level. gamma = 0 is the base format alone.
Bits: b + index + tables or scales of both parts.
Source: Li 2025 (ICQuant, arXiv:2505.00850); the tail split is recalled, feedback and the shared table are ours.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, Grid, levels
from lowbit.formats.format import TABLE_RULES
from lowbit.solvers._spec import Solution, Spec
from lowbit.solvers._split import ROW, Split, fit_masked, row_importance, solve_split, top
from lowbit.statistics import LayerStatistics, drift_target


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    gamma: float = 0.05,
    feedback: bool = True,
    weighted: bool = True,
    damping: float = 0.01,
    refit: bool = True,
    drift: bool = True,
    sweeps: int = 2,
) -> Solution:
    """Quantize w (out, in). Raises FormatError for formats whose codes are not all levels (ternary), or of tiles."""
    if 0 < len(fmt.levels.values) < 2**fmt.levels.bits or fmt.blocks.rows != 1:
        raise FormatError(f"icquant needs 2^b levels and blocks of one row, not {fmt}: e.g. kmeans2-channel.")
    w = drift_target(w, statistics) if drift and feedback and statistics is not None else w
    mask = outliers(w, gamma)
    fisher = statistics.fisher if statistics is not None else None

    def make(importance: "Tensor | None") -> Split:
        h = row_importance(importance if weighted else None, w)
        h = fisher if fisher is not None and weighted else h
        grid = fit_masked(w, ~mask, fmt, h)
        other = outlier_format(fmt)
        table_rule = fmt.scale_rule in TABLE_RULES
        other_grid = fit_masked(w, mask, other, h) if table_rule else tails(w, mask, fmt.levels.bits)
        return Split(mask, fmt, grid, other, other_grid, shared=True)

    if feedback and statistics is not None:
        return solve_split(w, make, statistics, damping=damping, refitted=refit, sweeps=sweeps)
    gram_diagonal = None if statistics is None else statistics.gram.diagonal()
    return solve_split(w, lambda _: make(gram_diagonal))


def outliers(w: Tensor, gamma: float) -> Tensor:
    """(out, in) bool: the round(gamma * in) largest |w| of each row; of equal ones the first."""
    return top(w.abs(), min(round(gamma * w.shape[1]), w.shape[1]))


def outlier_format(fmt: Format) -> Format:
    """A table of the same bits: shared over the rows where the inliers' is, else one a row."""
    return Format(levels(f"kmeans{fmt.levels.bits}"), ROW, "shared" if fmt.scale_rule == "shared" else "kmeans")


def tails(w: Tensor, mask: Tensor, bits: int) -> Grid:
    """Half of the levels spread evenly over the negative outliers of each row, half over the positive ones."""
    half = 2 ** (bits - 1)
    steps = torch.linspace(0, 1, half) if half > 1 else torch.tensor([0.5])
    inf = torch.full_like(w, torch.inf)
    sides = []
    for sign in (-1, 1):
        here = mask & (w.sign() == sign)
        low, high = torch.where(here, w, inf).amin(1), torch.where(here, w, -inf).amax(1)
        sides.append(low[:, None] + (high - low)[:, None] * steps)
    table = torch.cat(sides, 1)
    table = torch.where(torch.isfinite(table), table, table.flip(1))  # a side without outliers repeats the other
    table = torch.where(torch.isfinite(table), table, 0.0).sort(1).values.half().float()
    return Grid(torch.ones(len(w), 1), None, table)


SPEC = Spec(
    name="icquant",
    title="ICQuant: outliers on a second grid, places coded as gaps; with error feedback",
    source="Li 2025, arXiv:2505.00850",
    solve=solve,
    uses_gram=True,
    format="kmeans{bits}-{blocks}-shared",
    group=-1,
    options={
        "gamma": 0.05,
        "feedback": True,
        "weighted": True,
        "damping": 0.01,
        "refit": True,
        "drift": True,
        "sweeps": 2,
    },
)
