"""BiLLM: about one bit for each sign, in blocks of columns: salient columns twice binarized, the others split in two.

    salient columns    largest sum over rows of w^2 / U_jj^2:   w_hat = mu + a1 sign(w - mu) + a2 sign(residual) + mu2
    the others         split by |w - mu| at one threshold of the block, each half  mu + a sign(w - mu) of its own

The number of salient columns (1 .. 49) and the threshold (81 quantiles of |w|, 0.10 .. 0.90) are those of least squared
error, measured on at most 256 rows. The error of a whole block is fed forward; inside a block columns do not make up
for each other.
What is stored: four levels for each row, block and kind of column, so 2 bits a weight, and one bit a column says its
kind. Counted, that is 2 + 128 / block bits (3.0 at the published 128), where the paper's 1.08 counts signs only.
Source: Huang 2024 (BiLLM, arXiv:2402.04291) and the authors' code, whose searches measure the error on the saliencies;
here it is the error of the weights. sign(0) = 1.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError, RecipeError
from lowbit.formats import Format, Grid
from lowbit.solvers._columns import ColumnHooks, solve_columns
from lowbit.solvers._spec import Exceptions, Solution, Spec
from lowbit.statistics import LayerStatistics, drift_target

SALIENT = range(1, 50)
QUANTILES = [q / 100 for q in range(10, 91)]
SAMPLE = 256  # rows on which the searches measure


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    damping: float = 0.01,
    drift: bool = True,
) -> Solution:
    """Quantize w (out, in) in the format kmeans2-gB, B the block. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("billm needs calibration text: add --data FILE, or use --method adpq.")
    if fmt.levels.name != "kmeans2" or fmt.scale_rule != "kmeans" or fmt.blocks.rows != 1:
        raise FormatError(f"billm stores four levels for each row and block, not {fmt}: use kmeans2-g128.")
    w = drift_target(w, statistics) if drift else w
    hooks = BlockHooks(fmt, *w.shape)
    loop = solve_columns(w, statistics.gram, hooks, damping=damping)
    notes = {"damping": loop.damping, "dead": loop.dead, "salient": float(hooks.salient.float().mean())}
    ones = torch.ones(hooks.tables[0].shape[0] * w.shape[0], 1)
    dense, other = (Grid(ones, None, t.transpose(0, 1).reshape(-1, 4)) for t in hooks.tables)
    mask = hooks.salient.expand(w.shape).contiguous()
    exceptions = (Exceptions(mask, fmt, other),) if bool(mask.any()) else ()
    return Solution(hooks.codes.T.contiguous(), dense, fmt, notes, exceptions)


class BlockHooks(ColumnHooks):
    """Rounds a block of columns at once."""

    def __init__(self, fmt: Format, out: int, in_: int) -> None:
        self.cols, across = fmt.blocks.size(out, in_)[1], fmt.blocks.grid(out, in_)[1]
        self.codes = torch.zeros(in_, out, dtype=torch.uint8)
        self.salient = torch.zeros(in_, dtype=torch.bool)
        self.tables = torch.zeros(across, out, 4), torch.zeros(across, out, 4)  # of the others, of salient columns

    def start(self, w: Tensor, order: Tensor, u: Tensor) -> None:
        self.u = u.diagonal()

    def block_size(self, wanted: int) -> int:
        return self.cols

    def feedback(self, i1: int, i2: int, columns: Tensor, errors: Tensor, u: Tensor) -> bool:
        torch.sub(columns[i1:i2], self._block(i1, columns[i1:i2]), out=errors).div_(self.u[i1:i2, None])
        return True

    def _block(self, j: int, columns: Tensor) -> Tensor:
        """The rounded block (columns, out)."""
        w, g = columns.T.contiguous(), j // self.cols
        salient = salient_columns(w, self.u[j : j + len(columns)])
        self.salient[j : j + len(columns)] = salient
        q, codes = torch.empty_like(w), torch.empty(w.shape, dtype=torch.uint8)
        for kind, place, binarized in ((0, ~salient, split_binary), (1, salient, residual_binary)):
            if bool(place.any()):
                self.tables[kind][g], codes[:, place] = binarized(w[:, place])
                q[:, place] = self.tables[kind][g].gather(1, codes[:, place].long())
        self.codes[j : j + len(columns)] = codes.T
        return q.T


def salient_columns(w: Tensor, u: Tensor) -> Tensor:
    """(columns,) bool: the top k by sum of w^2 / u^2, k of least error when they are binarized twice, the rest once."""
    order = (w.square() / u.square()).sum(0).argsort(descending=True)
    some = w[:: max(len(w) // SAMPLE, 1), order]
    errors = [_squares(some[:, :k], residual_binary) + _squares(some[:, k:], binary) for k in SALIENT if k < w.shape[1]]
    mask = torch.zeros(w.shape[1], dtype=torch.bool)
    if errors:
        mask[order[: SALIENT[errors.index(min(errors))]]] = True
    return mask


def _squares(w: Tensor, binarized) -> float:  # type: ignore[no-untyped-def]
    table, codes = binarized(w)
    return float((table.gather(1, codes.long()) - w).square().sum())


def binary(w: Tensor, mask: "Tensor | None" = None) -> tuple[Tensor, Tensor]:
    """mu +- mean |w - mu| of each row's masked weights: levels (rows, 2) ascending, codes (rows, n)."""
    m = torch.ones_like(w) if mask is None else mask.float()
    n = m.sum(1, keepdim=True).clamp(min=1)
    mu = (w * m).sum(1, keepdim=True) / n
    a = ((w - mu).abs() * m).sum(1, keepdim=True) / n
    return torch.cat([mu - a, mu + a], 1), (w >= mu).to(torch.uint8)


def residual_binary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Binarized, and what is left binarized again: levels (rows, 4) ascending and fp16, codes (rows, n)."""
    first, sign1 = binary(w)
    second, sign2 = binary(w - first.gather(1, sign1.long()))
    sums = first[:, :, None] + second[:, None]  # (rows, sign1, sign2)
    return _sorted(sums.flatten(1), 2 * sign1 + sign2)


def split_binary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights near 0 and the others binarized apart: levels (rows, 4) ascending and fp16, codes (rows, n)."""
    some = w[:: max(len(w) // SAMPLE, 1)]
    cuts = torch.quantile(some.abs().flatten()[: 1 << 23], torch.tensor(QUANTILES)).tolist()
    errors = [_squares(some, lambda x, cut=cut: _split_at(x, cut)) for cut in cuts]
    return _split_at(w, cuts[errors.index(min(errors))])


def _split_at(w: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    far = w.abs() > cut
    near_levels, near = binary(w, ~far)
    far_levels, sign = binary(w, far)
    return _sorted(torch.cat([near_levels, far_levels], 1), torch.where(far, 2 + sign, near).to(torch.uint8))


def _sorted(levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    table, order = levels.half().float().sort(1)
    return table, order.argsort(1).to(torch.uint8).gather(1, codes.long())


SPEC = Spec(
    name="billm",
    title="BiLLM: salient columns binarized twice, the others split in two",
    source="Huang 2024, arXiv:2402.04291",
    solve=solve,
    uses_gram=True,
    format="kmeans{bits}-{blocks}",
    needs_data=True,
    options={"damping": 0.01, "drift": True},
    bits=2,
    widths=(2,),
    group=128,
)
