"""SpQR: small groups, quantized scales and zeros, and outliers in 16 bits, in the column loop.

    threshold  T = tau * mean_j( var(W[:, j]) / U_jj^2 )
    group      a weight whose leaving lowers the group's error sum ((w_hat - w) / U_jj)^2 by more than T counts as the
               mean of the others when the grid is fitted
    column     e = (w - q) / U_jj;  where e^2 > T the weight, as compensated by then, stays in fp16 and leaves no error

Scales and real zeros of 16 rows of a group column are themselves 3-bit codes between their minimum and maximum
("q3x16"): with groups of 16, b + 6/16 + 64/256 bits, and 16 bits and a place (CSR or gap codes, the smaller) for each
outlier. A damping of 1.0 and columns in their own order, as published.
Source: Dettmers 2023 (SpQR, arXiv:2306.03078) and the authors' code.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.formats.stores import BILEVEL, bilevel_values
from lowbit.solvers._columns import GridHooks, solve_columns
from lowbit.solvers._spec import Exceptions, Solution, Spec
from lowbit.statistics import LayerStatistics, drift_target


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    tau: float = 0.2,
    damping: float = 1.0,
    drift: bool = True,
) -> Solution:
    """Quantize w (out, in) under the layer's Gram matrix. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("spqr needs calibration text: add --data FILE, or use --method adpq or icquant.")
    if fmt.blocks.rows != 1 or fmt.zero != "real":
        raise FormatError(f"spqr needs groups with a real zero, not {fmt}: e.g. uint3-g16-zreal-q3x16.")
    w = drift_target(w, statistics) if drift else w
    hooks = OutlierHooks(fmt, *w.shape, tau=tau)
    loop = solve_columns(w, statistics.gram, hooks, damping=damping, block=max(64, hooks.cols))
    codes, kept = hooks.result_codes(), hooks.kept.T
    notes = {"damping": loop.damping, "dead": loop.dead, "outliers": float(kept.float().mean())}
    values = hooks.values.T[kept]
    exceptions = (Exceptions(kept.contiguous(), "raw_fp16", values=values),) if len(values) else ()
    return Solution(codes, hooks.grid, fmt, notes, exceptions)


class OutlierHooks(GridHooks):
    """Grids fitted without likely outliers, on entering a group; outliers leave no error."""

    def __init__(self, fmt: Format, out: int, in_: int, *, tau: float) -> None:
        super().__init__(fmt, out, in_, static=False)
        self.static, self.tau = False, tau
        self.kept = torch.zeros(in_, out, dtype=torch.bool)
        self.values = torch.zeros(in_, out)

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None:
        super().start(w, order, u)
        self.u = u.diagonal()
        self.threshold = float(self.tau * (w.var(0, correction=0) / self.u**2).mean())

    def group(self, j: int, columns: Tensor) -> None:
        if j % self.cols:
            return
        g, w = j // self.cols, columns[j : j + self.cols].T.contiguous()
        plain = self.format.with_(scale_dtype="fp32") if self.format.scale_dtype == BILEVEL else self.format
        grid = fit(without_outliers(w, self.u[j : j + self.cols], self.threshold, plain), plain)
        if self.format.scale_dtype == BILEVEL:
            grid = Grid(bilevel_values(grid.scale), bilevel_values(grid.zero))  # type: ignore[arg-type]
        for whole, part in ((self.grid.scale, grid.scale), (self.grid.zero, grid.zero)):
            whole.reshape(self.down, self.across)[:, g] = part[:, 0]  # type: ignore[union-attr, index]
        self.now = grid

    def exempt(self, j: int, column: Tensor, q: Tensor, e: Tensor) -> None:
        out = e.square() > self.threshold
        kept = column.half().float()
        out &= torch.isfinite(kept)
        self.kept[j], self.values[j] = out, torch.where(out, kept, 0.0)
        e.copy_(torch.where(out, (column - kept) / self.u[j], e))


def without_outliers(w: Tensor, u: Tensor, threshold: float, fmt: Format) -> Tensor:
    """w (out, g) with its likely outliers replaced by the mean of the others. u (g,): the loop's diagonal."""
    out, g = w.shape
    if g < 3 or not threshold < float("inf"):
        return w
    alone = torch.eye(g, dtype=torch.bool)
    others = (w.sum(1, keepdim=True) - w) / (g - 1)
    without = torch.where(alone, others[..., None], w[:, None]).reshape(out * g, g)  # row i * g + k: without weight k
    weight = torch.where(alone, 0.0, u**-2).repeat(out, 1)
    left = _error(without, weight, fmt).reshape(out, g)
    gain = _error(w, (u**-2).expand_as(w), fmt) - left
    likely = gain > threshold
    n = (~likely).sum(1, keepdim=True)
    mean = w.masked_fill(likely, 0).sum(1, keepdim=True) / n.clamp(min=1)
    return torch.where(likely & (n > 0), mean, w)


def _error(w: Tensor, weight: Tensor, fmt: Format) -> Tensor:
    """(rows, 1) weighted squared error of the grid that is fitted on w."""
    grid = fit(w, fmt)
    return ((decode(encode(w, grid, fmt), grid, fmt) - w).square() * weight).sum(1, keepdim=True)


SPEC = Spec(
    name="spqr",
    title="SpQR: groups of 16 with quantized scales, outliers in 16 bits",
    source="Dettmers 2023, arXiv:2306.03078",
    solve=solve,
    uses_gram=True,
    format="uint{bits}-{blocks}-zreal-q3x16",
    needs_data=True,
    options={"tau": 0.2, "damping": 1.0, "drift": True},
    group=16,
)
