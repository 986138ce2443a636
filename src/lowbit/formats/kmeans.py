"""One-dimensional weighted k-means: a table of levels per row.

    minimise  sum_i h_i (w_i - c_(nearest))**2       over k levels c, row by row

Lloyd's iteration on sorted rows: a cluster is an interval, so with running sums of h and h w one round costs k binary searches a row,
however long the row. The start spreads levels with density p**(1/3) of the weights' density p, the best spread for many levels
(Panter and Dite 1951): between neighbours at a distance d the start's distribution grows by h**(1/3) d**(2/3). It is deterministic.
A cluster that runs empty takes the farther end of the cluster of the largest error.

Source: Kim 2023 (SqueezeLLM, arXiv:2306.07629) for weighting by importance.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError


def kmeans_table(w_blocks: Tensor, k: int, importance: "Tensor | None" = None, iterations: int = 50) -> Tensor:
    """Levels of each row by weighted k-means.

    w_blocks:   (B, n) float32
    importance: (B, n) non-negative, or None; a row whose total is 0 counts as uniform
    returns:    (B, k) float32, sorted, each value one that fp16 holds (as it is stored). Rows of fewer than k distinct
                values repeat levels.

    Raises FormatError where a level does not fit fp16 (65504). Cost: one sort, then iterations * B * k binary searches.
    """
    b, n = w_blocks.shape
    if n == 0:
        return torch.zeros(b, k, device=w_blocks.device)
    h = torch.ones_like(w_blocks) if importance is None else importance
    h = h.where((h > 0).any(1, keepdim=True), torch.ones_like(h))
    present = w_blocks.gather(1, (h > 0).to(torch.uint8).argmax(1, keepdim=True))
    x, order = w_blocks.where(h > 0, present).double().sort(1)  # weights of importance 0 are no places to go to
    h = h.double().gather(1, order)
    sums = _running(h), _running(h * x), _running(h * x * x)
    table, cuts = _start(x, h, k), None
    for _ in range(iterations):
        new_cuts = _cuts(x, table)
        if cuts is not None and torch.equal(cuts, new_cuts):
            break
        cuts, table = new_cuts, _centres(x, sums, new_cuts, table)
    if float(table.abs().max()) > 65504:
        raise FormatError(f"a level of {float(table.abs().max()):.3g} does not fit the fp16 table of k-means.")
    return table.half().float()


def _running(x: Tensor) -> Tensor:
    """(B, n + 1) sums of the first i entries."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _start(x: Tensor, h: Tensor, k: int) -> Tensor:
    """k levels at the middles of equal shares of the density p**(1/3), estimated from the distances of neighbours."""
    if x.shape[1] == 1:
        return x.expand(-1, k)
    growth = (x.diff(dim=1).square() * (h[:, 1:] + h[:, :-1])).pow(1 / 3)
    share = growth.cumsum(1)
    wanted = share[:, -1:] * ((torch.arange(k, device=x.device, dtype=x.dtype) + 0.5) / k)
    at = torch.searchsorted(share, wanted).clamp(max=x.shape[1] - 2)
    return (x.gather(1, at) + x.gather(1, at + 1)) / 2


def _cuts(x: Tensor, table: Tensor) -> Tensor:
    """(B, k + 1) positions in the sorted row where clusters begin and end."""
    inner = torch.searchsorted(x, (table[:, 1:] + table[:, :-1]) / 2)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=x.shape[1])


def _centres(x: Tensor, sums: tuple[Tensor, Tensor, Tensor], cuts: Tensor, table: Tensor) -> Tensor:
    """The weighted means of the clusters; one empty cluster a row moves to where it helps most."""
    weight, first, second = (s.gather(1, cuts).diff(dim=1) for s in sums)
    full = weight > 0
    centre = torch.where(full, first / torch.where(full, weight, 1.0), table)
    error = torch.where(full, second - weight * centre.square(), 0.0)
    worst_error, worst = error.max(1, keepdim=True)
    scale = second.abs().sum(1, keepdim=True)
    rows = (~full).any(1, keepdim=True) & (worst_error > 1e-12 * scale)
    if bool(rows.any()):
        ends = x.gather(1, cuts.gather(1, worst)), x.gather(1, (cuts.gather(1, worst + 1) - 1).clamp(min=0))
        middle = centre.gather(1, worst)
        far = torch.where(middle - ends[0] > ends[1] - middle, *ends)
        empty = (~full).to(torch.uint8).argmax(1, keepdim=True)
        centre = torch.where(rows, centre.scatter(1, empty, far), centre)
    return centre.sort(1).values
