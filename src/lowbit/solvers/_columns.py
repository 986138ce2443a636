"""The one column loop: quantize a column, feed its error forward into the columns that are still free.

    H^-1 = U^T U (U upper)      for j:  q_j = quantize(w_j);  e = (w_j - q_j) / U_jj;  w_k -= e U_jk for k > j

Sum of all e^2 = tr[(W - Q) H (W - Q)^T] with the damped H, to rounding. Methods differ in hooks only:

    start(w, order, u)        once; static grids, thresholds
    group(j, columns)         before column j; columns are the current, compensated ones (transposed, (in, out))
    quantize(j, column)       -> the column's value after rounding (out,)
    exempt(j, column, q, e)   -> e, with zeros where a weight keeps its value (outliers)

Columns are kept transposed, so that each is contiguous. Errors are applied inside a block of columns at once, and to
the rest in one product.
Source: Frantar 2022 (GPTQ, arXiv:2210.17323), algorithm 1; identities derived.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit._threads import one_thread
from lowbit.errors import DataError
from lowbit.formats import Format, Grid, decode, encode, fit
from lowbit.solvers._native import NativeGrids, knows
from lowbit.solvers._spec import empty_grid


@dataclass(frozen=True)
class LoopResult:
    """What the loop reports beside the result, which lives in the hooks.

    order:   column visited at step j
    loss:    sum of e^2
    damping: the fraction of the mean diagonal that was needed
    dead:    how many columns were set to 0
    """

    order: Tensor
    loss: float
    damping: float
    dead: int


def solve_columns(
    w: Tensor, gram: Tensor, hooks: "ColumnHooks", *, damping: float = 0.01, act_order: bool = False, block: int = 64
) -> LoopResult:
    """Run the loop. w (out, in) float32, gram (in, in). The result lives in the hooks."""
    w, gram = w.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))
    u, used = inverse_cholesky(gram[order][:, order] if act_order else gram, damping)
    columns = w[:, order].T.contiguous()
    hooks.start(w, order, u)
    loss = _loop(columns, u, hooks, hooks.block_size(block))
    return LoopResult(order, loss, used, int(dead.sum()))


def _loop(columns: Tensor, u: Tensor, hooks: "ColumnHooks", block: int) -> float:
    n, loss = len(columns), 0.0
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        errors = torch.empty(i2 - i1, columns.shape[1], dtype=columns.dtype)
        if not hooks.feedback(i1, i2, columns, errors, u):
            with one_thread():
                _columns(i1, i2, columns, errors, u, hooks)
        columns[i2:].addmm_(u[i1:i2, i2:].T, errors, alpha=-1)
        loss += float(errors.square().sum(dtype=torch.float64))
    return loss


def _columns(i1: int, i2: int, columns: Tensor, errors: Tensor, u: Tensor, hooks: "ColumnHooks") -> None:
    diagonal = u.diagonal()[i1:i2].tolist()
    for j in range(i1, i2):
        hooks.group(j, columns)
        column = columns[j]
        q = hooks.quantize(j, column)
        e = errors[j - i1]
        torch.sub(column, q, out=e).div_(diagonal[j - i1])
        hooks.exempt(j, column, q, e)
        columns[j + 1 : i2].addr_(u[j, j + 1 : i2], e, alpha=-1)


def inverse_cholesky(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper U with U^T U = (H + damping * mean(diag H) I)^-1; damping is raised tenfold until H can be factored.

    Raises DataError where even a damping of 100 fails (NaN, or no data at all).
    """
    mean = gram.diagonal().mean()
    tried = damping
    while tried <= 100:
        damped = gram.clone()
        damped.diagonal().add_(tried * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return upper, tried
        tried = max(tried * 10, 1e-4)
    raise DataError("the Gram matrix of this layer's inputs cannot be factored: use more calibration text (--windows).")


class ColumnHooks:
    """The hooks' defaults: no groups, nothing exempt."""

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None: ...

    def group(self, j: int, columns: Tensor) -> None: ...

    def quantize(self, j: int, column: Tensor) -> Tensor:
        raise TypeError("a method must say how it rounds a column")

    def exempt(self, j: int, column: Tensor, q: Tensor, e: Tensor) -> None: ...

    def feedback(self, i1: int, i2: int, columns: Tensor, errors: Tensor, u: Tensor) -> bool:
        """Do columns i1..i2 at once and say so; False leaves them to the loop."""
        return False

    def block_size(self, wanted: int) -> int:
        return wanted


class GridHooks(ColumnHooks):
    """Round each column on the grid of its block, found at the start ("static") or on entering a group.

    importance: (in,) weight of each input channel's squared error in searched grids, or None.
    """

    def __init__(self, fmt: Format, out: int, in_: int, *, static: bool, importance: "Tensor | None" = None) -> None:
        self.format, self.importance = fmt, importance
        self.rows, self.cols = fmt.blocks.size(out, in_)
        self.down, self.across = fmt.blocks.grid(out, in_)
        self.static = static or self.across == 1 or fmt.scale_dtype == "double" or not fmt.levels.values
        self.codes = torch.zeros(in_, out, dtype=torch.uint8)
        self.grid = empty_grid(self.down * self.across, fmt)
        self.native: NativeGrids | None = None

    def block_size(self, wanted: int) -> int:
        """A block holds whole groups, or a group whole blocks: grids are always fitted on compensated columns."""
        if self.static or wanted % self.cols == 0 or self.cols % wanted == 0:
            return wanted
        return self.cols

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None:
        self.group_of = (order // self.cols).tolist()
        self.order = order
        if self.static:
            self.use(fit(self.format.blocks.split(w), self.format, self._weights(self.importance, self.down)))

    def use(self, grid: Grid) -> None:
        """Round on these static grids from now on."""
        self.grid, self.native = grid, None
        if self._plain and knows(self.format):
            self.native = NativeGrids(grid, self.format, self.order // self.cols, self.codes.shape[1])
        else:
            self._spread()

    @property
    def _plain(self) -> bool:
        """Whether a method has hooks of its own for a column."""
        own = type(self)
        return own.quantize is GridHooks.quantize and own.exempt is ColumnHooks.exempt and own.group is GridHooks.group

    def feedback(self, i1: int, i2: int, columns: Tensor, errors: Tensor, u: Tensor) -> bool:
        if self.native is not None:
            self.native.feedback(columns[i1:i2], errors, u[i1:i2, i1:i2], self.codes[i1:i2], i1)
        return self.native is not None

    def descend(self, i1: int, i2: int, columns: Tensor, gradient: Tensor, moved: Tensor, h: Tensor) -> bool:
        """As `feedback`, for a step of coordinate descent."""
        if self.native is not None:
            part = self.codes[i1:i2]
            self.native.descend(columns[i1:i2], gradient[i1:i2], moved, h[i1:i2, i1:i2], part, i1)
        return self.native is not None

    def _weights(self, importance: "Tensor | None", down: int) -> "Tensor | None":
        """Importance as blocks: (blocks, rows * cols)."""
        if importance is None:
            return None
        per_block = importance.reshape(-1, 1, self.cols).expand(-1, self.rows, -1).reshape(-1, self.rows * self.cols)
        return per_block.repeat(down, 1)

    def _spread(self) -> None:
        """One column of scale (out, 1) per group of columns: what a column's rounding needs."""
        shape = (self.down, self.across, -1)
        spread = self.grid.map(lambda t: t.reshape(shape).repeat_interleave(self.rows, 0))

        def column(g: int) -> Grid:
            return spread.map(lambda t: t[:, g].contiguous())

        self.per_group = [column(g) for g in range(self.across)]

    def group(self, j: int, columns: Tensor) -> None:
        if self.static or j % self.cols:
            return
        g = j // self.cols
        block = columns[j : j + self.cols].T.reshape(self.down, self.rows * self.cols)
        weights = None if self.importance is None else self._weights(self.importance[j : j + self.cols], self.down)
        found = fit(block, self.format, weights)
        for whole, part in zip(tuple(self.grid), tuple(found)):
            if whole is not None and part is not None:
                whole.reshape(self.down, self.across, -1)[:, g] = part
        self.now = found.map(lambda t: t.repeat_interleave(self.rows, 0))

    def quantize(self, j: int, column: Tensor) -> Tensor:
        grid = self.per_group[self.group_of[j]] if self.static else self.now
        codes = encode(column[:, None], grid, self.format)
        self.codes[j] = codes[:, 0]
        return decode(codes, grid, self.format)[:, 0]

    def result_codes(self) -> Tensor:
        """(out, in) uint8 in the original column order."""
        codes = torch.empty_like(self.codes)
        codes[self.order] = self.codes
        return codes.T.contiguous()
