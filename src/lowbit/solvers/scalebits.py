"""ScaleBITS in one layer: every tile of the matrix has a width of its own, chosen where the layer is quantized already.

    table     gain of tile t at width b, at the rounded weights Q as they are now:
              -<G_t, D> - tr D H_tt D^T,   D = Q_b(W)_t - Q_t,   G = 2 (Q - W) H       (exact for the layer's outputs)
    greedy    the widest average that `average` allows, then swaps in batches: accepted if tr (W-Q) H (W-Q)^T fell,
              and scored anew at the point that was reached (`allocate.scalebits`)
    codes     error feedback, closed-form scales and sweeps as in gptq, on the grids that were chosen; an error then
              costs 1 / U_jj^2 instead of H, what the columns after it cannot make up for. `feedback=false`: the
              nearest levels

Tiles are as wide as the format's groups and at most 64 rows high, as the kernel for tiles takes them. Before the layers
of a block are solved its hidden channels are reordered, sensitive ones first, and folded into their neighbours, so that
wide tiles have company (`pipeline.reorder`; the float network is unchanged).
A layer whose groups are no multiple of 8 weights has no tiles: one width for all, by gptq.
Bits: the average, 20 / group for scales and zeros, and a bit a tile and width.
Source: Li 2026 (ScaleBITS, arXiv:2602.17698) for the four parts; formulas are derived, error feedback is ours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.allocate import Problem, find
from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, Grid, QuantizedTensor, decode, encode, fit, from_tiles, levels, take_tiles
from lowbit.formats.masks import TILE_COLS
from lowbit.solvers import gptq
from lowbit.solvers._columns import GridHooks, inverse_cholesky, solve_columns
from lowbit.solvers._descent import descend
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics, drift_target

WIDTHS = (2, 3, 4)
TALLEST = 64


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    average: float = 2.5,
    damping: float = 0.1,
    drift: bool = True,
    feedback: bool = True,
    rounds: int = 12,
    sweeps: int = 2,
) -> Solution:
    """Quantize w (out, in); average: code bits a weight. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("scalebits needs calibration text: add --data FILE, or use --method rtn or hqq.")
    if not fmt.levels.is_integer_range or fmt.blocks.rows != 1 or fmt.zero == "none":
        raise FormatError(f"scalebits needs integers with a zero and blocks of one row, not {fmt}: uint4-g64-search.")
    if fmt.blocks.size(*w.shape)[1] % TILE_COLS:
        one = fmt.with_(levels=levels(f"uint{int(average)}"))
        return gptq.solve(w, statistics, one, damping=damping, drift=drift)
    w = drift_target(w, statistics, damping) if drift else w
    h = cost_of_errors(statistics, damping, feedback)
    tiles = Tiles.of(w, fmt, statistics.gram.diagonal())
    choice = choose(w, h, tiles, average, rounds)
    notes: dict[str, Any] = {"tiles": [int((choice == o).sum()) for o in range(len(WIDTHS))]}
    codes, grid = tiles.codes(choice), tiles.grid(choice)
    if feedback:
        hooks = TileHooks(fmt, w.shape, grid, tiles.top(choice))
        loop = solve_columns(w, statistics.gram, hooks, damping=damping, act_order=True)
        notes |= {"damping": loop.damping, "dead": loop.dead}
        found = gptq.refitted_solution(w, Solution(hooks.result_codes(), grid, fmt, notes), statistics.gram, True)
        for _ in range(sweeps):
            hooks.use(found.grid)
            descend(w, found.w_hat(), statistics.gram, hooks, damping=loop.damping)
            now = Solution(hooks.result_codes(), found.grid, fmt, notes)
            found = gptq.refitted_solution(w, now, statistics.gram, True)
        codes, grid = found.codes, found.grid
    return TiledSolution(codes, grid, fmt, notes, (), choice, tiles)


def cost_of_errors(statistics: LayerStatistics, damping: float, feedback: bool) -> Tensor:
    """(in, in) what rounding errors cost: the damped Gram matrix, or where error feedback follows 1 / U_jj^2 on the
    diagonal, what is left of a column's error when the columns after it have made up for it as well as they can.
    """
    h = statistics.gram.clone()
    h.diagonal()[statistics.dead] = 1.0
    if feedback:
        order = h.diagonal().argsort(descending=True, stable=True)
        u, _ = inverse_cholesky(h[order][:, order], damping)
        cost = torch.empty(len(order))
        cost[order] = u.diagonal() ** -2
        return torch.diag(cost)
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


@dataclass(frozen=True)
class Tiles:
    """A matrix in every width: w_hat, codes and grids, and how it is cut.

    tile: (rows, cols); formats, grids: one a width, blocks (out * groups) row by row
    """

    tile: tuple[int, int]
    formats: tuple[Format, ...]
    grids: tuple[Grid, ...]
    rounded: tuple[Tensor, ...]
    every: tuple[Tensor, ...]

    @classmethod
    def of(cls, w: Tensor, fmt: Format, importance: Tensor) -> "Tiles":
        out, cols = w.shape[0], fmt.blocks.size(*w.shape)[1]
        rows = next(r for r in (TALLEST, 32, 16, 8, 4, 2, 1) if out % r == 0)
        formats = tuple(fmt.with_(levels=levels(f"uint{b}")) for b in WIDTHS)
        blocks = fmt.blocks.split(w)
        weights = importance.reshape(-1, cols).repeat(out, 1)
        grids = tuple(fit(blocks, f, weights) for f in formats)
        every = tuple(encode(blocks, g, f) for g, f in zip(grids, formats))
        rounded = tuple(fmt.blocks.merge(decode(c, g, f), *w.shape) for c, g, f in zip(every, grids, formats))
        return cls((rows, cols), formats, grids, rounded, tuple(fmt.blocks.merge(c, *w.shape) for c in every))

    def spread(self, choice: Tensor) -> Tensor:
        """(tile rows, tile columns) -> (out, in)"""
        return choice.repeat_interleave(self.tile[0], 0).repeat_interleave(self.tile[1], 1)

    def weights(self, choice: Tensor) -> Tensor:
        return _pick(self.rounded, self.spread(choice))

    def codes(self, choice: Tensor) -> Tensor:
        return _pick(self.every, self.spread(choice))

    def grid(self, choice: Tensor) -> Grid:
        """The chosen scale and zero of every row and group."""
        at = choice.repeat_interleave(self.tile[0], 0).reshape(-1, 1)
        scales, zeros = [g.scale for g in self.grids], [g.zero for g in self.grids if g.zero is not None]
        return Grid(_pick(scales, at), _pick(zeros, at))

    def top(self, choice: Tensor) -> Tensor:
        """(out, groups) largest code."""
        most = torch.tensor([2.0**b - 1 for b in WIDTHS])
        return most[choice.repeat_interleave(self.tile[0], 0)]


def _pick(options: Any, at: Tensor) -> Tensor:
    found = options[0].clone()
    for o in range(1, len(options)):
        found = torch.where(at == o, options[o], found)
    return found


def choose(w: Tensor, h: Tensor, tiles: Tiles, average: float, rounds: int) -> Tensor:
    """(tile rows, tile columns) widths, as indices into WIDTHS."""
    shape = w.shape[0] // tiles.tile[0], w.shape[1] // tiles.tile[1]
    count = shape[0] * shape[1]

    def as_choice(c: Any) -> Tensor:
        return torch.from_numpy(np.asarray(c)).reshape(shape)

    def measure(c: Any) -> float:
        d = tiles.weights(as_choice(c)) - w
        return float(((d @ h) * d).sum(dtype=torch.float64))

    def rescore(c: Any) -> Any:
        return -gains(w, h, tiles, as_choice(c)).reshape(count, -1).double().numpy()

    start = rescore(np.zeros(count, dtype=np.int64))
    bits = np.tile(np.array(WIDTHS, dtype=np.float64), (count, 1))
    names = tuple(str(i) for i in range(count))
    problem = Problem(names, tuple(map(str, WIDTHS)), {"loss": start, "bits": bits}, {"bits": average * count})
    return as_choice(find("scalebits").run(problem, measure, rescore, rounds=rounds).choice)


def gains(w: Tensor, h: Tensor, tiles: Tiles, choice: Tensor) -> Tensor:
    """(tile rows, tile columns, widths): how far tr (W-Q) H (W-Q)^T falls when one tile takes another width."""
    (rows, cols), q = tiles.tile, tiles.weights(choice)
    slope = 2 * (q - w) @ h
    local = torch.stack([h[i : i + cols, i : i + cols] for i in range(0, len(h), cols)])
    found = []
    for other in tiles.rounded:
        d = (other - q).reshape(len(w), -1, cols).transpose(0, 1)  # (groups, out, cols)
        change = (d * (slope.reshape(len(w), -1, cols).transpose(0, 1) + d @ local)).sum(2)
        found.append(-change.T.reshape(-1, rows, change.shape[0]).sum(1))
    return torch.stack(found, 2)


class TileHooks(GridHooks):
    """Round each column on given integer grids whose number of levels differs from row to row."""

    def __init__(self, fmt: Format, shape: torch.Size, grid: Grid, top: Tensor) -> None:
        super().__init__(fmt, *shape, static=True)
        self.round_zero, self.most = fmt.zero == "int", top.T.contiguous()
        self.use(grid)

    def use(self, grid: Grid) -> None:
        assert grid.zero is not None
        self.step, self.zero = (t.reshape(len(self.most[0]), -1).T.contiguous() for t in (grid.scale, grid.zero))

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None:
        self.order, self.group_of = order, (order // self.cols).tolist()

    def group(self, j: int, columns: Tensor) -> None: ...

    def quantize(self, j: int, column: Tensor) -> Tensor:
        g = self.group_of[j]
        step, zero = self.step[g], self.zero[g]
        x = column / torch.where(step > 0, step, 1.0)
        codes = torch.minimum((x.round() + zero if self.round_zero else (x + zero).round()).clamp(min=0), self.most[g])
        self.codes[j] = codes.to(torch.uint8)
        return (codes - zero) * step


@dataclass(frozen=True)
class TiledSolution(Solution):
    """A solution whose tiles have different widths; solved layer by layer, never cut by rows."""

    choice: Tensor = torch.empty(0)
    tiles: "Tiles | None" = None

    def quantized(self, shape: "tuple[int, ...] | None" = None) -> QuantizedTensor:
        assert self.tiles is not None and self.grid.zero is not None
        (rows, cols), solved = self.tiles.tile, []
        across = self.choice.shape[1]
        for o, fmt in enumerate(self.tiles.formats):
            owned = self.choice == o
            numbers = [t.reshape(-1, across) for t in (self.grid.scale, self.grid.zero)]
            grid = Grid(*(take_tiles(t, owned, (rows, 1)) for t in numbers))
            solved.append((take_tiles(self.codes, owned, (rows, cols)), grid, fmt))
        return from_tiles(tuple(shape or self.codes.shape), (rows, cols), self.choice, solved)

    def w_hat(self) -> Tensor:
        return self.quantized().dequantize()


SPEC = Spec(
    name="scalebits",
    title="ScaleBITS: tiles of 2, 3 and 4 bits, chosen at the quantized point, with reordered channels",
    source="Li 2026, arXiv:2602.17698",
    solve=solve,
    format="uint{bits}-{blocks}-search",
    needs_data=True,
    options={"average": 2.5, "damping": 0.1, "drift": True, "feedback": True, "rounds": 12, "sweeps": 2},
    widths=(4,),
    alone=True,
    averages=(2.0, 2.25, 2.5, 3.0, 3.5),
    reorders=True,
)
