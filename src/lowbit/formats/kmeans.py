"""One-dimensional weighted k-means: a table of levels per row.

    minimise  sum_i h_i (w_i - c_(nearest))**2       over k levels c, row by row

Lloyd's iteration on sorted rows: a cluster is an interval, so with running sums of h, h w and h w**2 one round costs k
binary searches a row, however long the row. It stops in a local optimum; from there the level that is missed least
moves to where a cut helps most and Lloyd runs again, while that lowers the error. On rows of 60 weights this ends
within 1% of the exact optimum for 4 levels and 8% for 8, where Lloyd alone is off by up to 18%; on long rows both are
nearer.

The start spreads levels with density p**(1/3) of the weights' density p, the best spread of many levels (Panter and
Dite 1951): between neighbours at a distance d it grows by h**(1/3) d**(2/3). Everything is deterministic.

Source: Kim 2023 (SqueezeLLM, arXiv:2306.07629) for levels by k-means weighted with importance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import FormatError

SHARED_SAMPLE = 1 << 17  # weights that make a shared table
FULL_ROUNDS = 3  # over all weights, from the sample's table
_ATTEMPTS = 4  # pairs of levels tried before a row is left alone
_TINY = 1e-300  # keeps 0 / 0 out
Sums = tuple[Tensor, Tensor, Tensor]  # running sums of h, h x and h x**2, each (B, n + 1)


def kmeans_table(w_blocks: Tensor, k: int, importance: "Tensor | None" = None, iterations: int = 50) -> Tensor:
    """Levels of each row by weighted k-means.

    w_blocks:   (B, n) float32
    importance: (B, n) non-negative, or None; a row whose total is 0 counts as uniform
    returns:    (B, k) float32, sorted, each value one that fp16 holds (as it is stored). Rows of fewer than k distinct
                values repeat levels.

    iterations bounds each run of Lloyd. Raises FormatError where a level does not fit fp16 (65504). Cost: a sort,
    then about a dozen passes over the weights for each level that moves (few do; at most 64 are tried).
    """
    b = len(w_blocks)
    if w_blocks.numel() == 0:
        return torch.zeros(b, k, dtype=torch.float32, device=w_blocks.device)
    x, h = _sorted(w_blocks, importance)
    sums = _running(h), _running(h * x), _running(h * x * x)
    table, cuts, error = _lloyd(x, sums, _start(x, h, k), iterations)
    trying, failed = torch.arange(b, device=x.device), torch.zeros(b, 1, dtype=torch.int64, device=x.device)
    for _ in range(min(2 * k, 64)):
        x_t, sums_t = x[trying], (sums[0][trying], sums[1][trying], sums[2][trying])
        moved = _move_one(x_t, sums_t, table[trying], cuts[trying], failed)
        new = _lloyd(x_t, sums_t, moved, iterations)
        better = new[2] < error[trying] * (1 - 1e-6)
        for kept, found in zip((table, cuts, error), new):
            kept[trying[better]] = found[better]
        failed = torch.where(better[:, None], 0, failed + 1)
        again = failed[:, 0] < min(_ATTEMPTS, k - 1)
        trying, failed = trying[again], failed[again]
        if not len(trying):
            break
    if float(table.abs().max()) > 65504:
        raise FormatError(f"a level of {float(table.abs().max()):.3g} does not fit the fp16 table of k-means.")
    return table.half().float()


def shared_table(
    w_blocks: Tensor,
    k: int,
    importance: "Tensor | None" = None,
    stored: "Callable[[Tensor], Tensor]" = lambda scale: scale.half().float(),
    rounds: int = 8,
) -> tuple[Tensor, Tensor]:
    """One table for all blocks and a scale for each: w ~ scale * table[code].

    minimise  sum_b sum_i h_bi (w_bi - s_b c_(code))**2   by turns: codes, then s_b = sum h w c / sum h c**2, then the
    levels (mean of w / s in each cluster, weighted with h s**2). Starts from scales of the root mean square. Of many
    blocks an even sample of about SHARED_SAMPLE weights makes the table; then every block finds its scale.

    w_blocks, importance: as `kmeans_table`; stored: scales as the file gives them back
    returns: scale (B, 1), table (k,) float32 as fp16 holds it. A block of zeros has scale 0.
    """
    if w_blocks.numel() == 0:
        return w_blocks.new_zeros(len(w_blocks), 1), w_blocks.new_zeros(k)
    h = torch.ones_like(w_blocks) if importance is None else importance
    scale = stored(_root_mean_square(w_blocks, h))
    wanted = min(max(SHARED_SAMPLE // w_blocks.shape[1], 1), len(w_blocks))
    at = torch.linspace(0, len(w_blocks) - 1, wanted, dtype=torch.float64, device=w_blocks.device).round().long()
    some, h_some, scale_some = (t[at] for t in (w_blocks, h, scale))
    table = _levels_of(some, h_some, scale_some, k)
    for _ in range(rounds):
        scale_some = _scale_of(some, h_some, scale_some, table, stored)
        table = _moved(some, h_some, scale_some, table)
    for last in range(FULL_ROUNDS):
        scale = _scale_of(w_blocks, h, scale, table, stored)
        table = table if last == FULL_ROUNDS - 1 else _moved(w_blocks, h, scale, table)
    return scale, table


def _root_mean_square(w: Tensor, h: Tensor) -> Tensor:
    return ((h * w.square()).sum(1, keepdim=True) / h.sum(1, keepdim=True).clamp(min=1e-30)).sqrt()


def _scale_of(w: Tensor, h: Tensor, scale: Tensor, table: Tensor, stored: "Callable[[Tensor], Tensor]") -> Tensor:
    """The best scale of each block for the codes that the old one gives."""
    level = table[_nearest(w, scale, table)]
    weighted = h * level
    found = (weighted * w).sum(1, keepdim=True) / (weighted * level).sum(1, keepdim=True).clamp(min=1e-30)
    return stored(found.clamp(min=0))


def dual_scales(w: Tensor, importance: "Tensor | None" = None, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """a1 > 0 > a2 of each block, w ~ a1 b1 + a2 b2 with b1, b2 in {0, 1}: both (blocks, 1), as fp16 holds them.

    Starts from a1 = 2 s, a2 = -s, s = max |w| / 2 (levels -s, 0, s, 2 s); then nearest levels and least squares in turn
    while the error falls.
    Source: Chen 2024 (DB-LLM, arXiv:2402.11960) for planes and start; the turns are ours.
    """
    h = torch.ones_like(w) if importance is None else importance
    s = w.abs().amax(1, keepdim=True) / 2 if w.shape[1] else w.new_zeros(len(w), 1)
    a1, a2 = (2 * s).half().float(), (-s).half().float()
    best, b1, b2 = _dual_error(w, h, a1, a2)
    for _ in range(rounds):
        new1, new2 = _dual_fit(w, h, b1, b2, a1, a2)
        error, new_b1, new_b2 = _dual_error(w, h, new1, new2)
        better = error < best
        if not bool(better.any()):
            break
        best, a1, a2 = (torch.where(better, n, o) for n, o in ((error, best), (new1, a1), (new2, a2)))
        b1, b2 = torch.where(better, new_b1, b1), torch.where(better, new_b2, b2)
    return a1, a2


def _dual_error(w: Tensor, h: Tensor, a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted squared error (blocks, 1) and the planes of the nearest levels."""
    levels = torch.stack([torch.zeros_like(a1), a2, a1, a1 + a2], -1)  # codes 2 b1 + b2
    gap, code = (w[..., None] - levels).abs().min(-1)
    return (h * gap.square()).sum(1, keepdim=True), (code >= 2).float(), (code % 2).float()


def _dual_fit(w: Tensor, h: Tensor, b1: Tensor, b2: Tensor, a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for fixed planes; the old numbers where the signs would turn or a plane is empty."""

    def total(x: Tensor) -> Tensor:
        return (h * x).sum(1, keepdim=True)

    p, q, r = total(b1), total(b1 * b2), total(b2)
    x, y, d = total(b1 * w), total(b2 * w), p * r - q * q
    safe = torch.where(d > 0, d, 1.0)
    new1, new2 = ((x * r - y * q) / safe).half().float(), ((y * p - x * q) / safe).half().float()
    good = (d > 1e-6 * p * r) & (new1 > 0) & (new2 < 0) & (new1 < torch.inf) & (new2 > -torch.inf)
    return torch.where(good, new1, a1), torch.where(good, new2, a2)


def _levels_of(w: Tensor, h: Tensor, scale: Tensor, k: int, sample: int = 1 << 16) -> Tensor:
    """The k-means levels of w / scale; of an even sample where there are many weights."""
    x, weight = (w / scale.clamp(min=1e-30)).reshape(1, -1), (h * scale.square()).reshape(1, -1)
    step = max(x.shape[1] // sample, 1)
    step += 1 - step % 2  # an odd step does not fall in with groups
    return kmeans_table(x[:, ::step].contiguous(), k, weight[:, ::step].contiguous())[0]


def _nearest(w: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return torch.searchsorted((table[1:] + table[:-1]) / 2, w / scale.clamp(min=1e-30), out_int32=True)


def _moved(w: Tensor, h: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Each level at the mean of its cluster, weighted with h scale**2; an empty cluster's level stays."""
    codes = _nearest(w, scale, table).reshape(-1)
    weight = torch.zeros(len(table), dtype=torch.float64, device=w.device)
    first = weight.index_add(0, codes, (h * scale * w).reshape(-1).double())
    weight = weight.index_add(0, codes, (h * scale.square()).expand_as(w).reshape(-1).double())
    return torch.where(weight > 0, first / weight.clamp(min=_TINY), table.double()).sort().values.half().float()


def _sorted(w: Tensor, importance: "Tensor | None") -> tuple[Tensor, Tensor]:
    """Rows in ascending order and their importance, float64. Weights of importance 0 move onto one that counts."""
    h = torch.ones_like(w) if importance is None else importance
    h = h.where((h > 0).any(1, keepdim=True), torch.ones_like(h))
    present = w.gather(1, (h > 0).to(torch.uint8).argmax(1, keepdim=True))
    x, order = w.where(h > 0, present).double().sort(1)
    return x, h.double().gather(1, order)


def _running(x: Tensor) -> Tensor:
    """(B, n + 1) sums of the first i entries."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _start(x: Tensor, h: Tensor, k: int) -> Tensor:
    """k levels at the middles of equal shares of the density p**(1/3), estimated from the distances of neighbours."""
    if x.shape[1] == 1:
        return x.repeat(1, k)
    share = (x.diff(dim=1).square() * (h[:, 1:] + h[:, :-1])).pow(1 / 3).cumsum(1)
    wanted = share[:, -1:] * ((torch.arange(k, device=x.device, dtype=x.dtype) + 0.5) / k)
    at = torch.searchsorted(share, wanted).clamp(max=x.shape[1] - 2)
    return (x.gather(1, at) + x.gather(1, at + 1)) / 2


def _lloyd(x: Tensor, sums: Sums, table: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """(table (B, k), cuts (B, k + 1), error (B,)) once nothing moves. Cluster j is x[cuts[j] : cuts[j + 1]]."""
    cuts = _cuts(x, table)
    for _ in range(iterations):
        weight, first, _ = _inside(sums, cuts)
        table = torch.where(weight > 0, first / weight.clamp(min=_TINY), table).sort(1).values
        before, cuts = cuts, _cuts(x, table)
        if torch.equal(before, cuts):
            break
    weight, first, second = _inside(sums, cuts)
    error = second - table * (2 * first - table * weight)
    return table, cuts, error.sum(1)


def _cuts(x: Tensor, table: Tensor) -> Tensor:
    """(B, k + 1) positions in the sorted row where clusters begin and end."""
    inner = torch.searchsorted(x, (table[:, 1:] + table[:, :-1]) / 2)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=x.shape[1])


def _inside(sums: Sums, cuts: Tensor) -> Sums:
    """Weight, first and second moment of each cluster."""
    weight, first, second = (s.gather(1, cuts).diff(dim=1) for s in sums)
    return weight, first, second


def _move_one(x: Tensor, sums: Sums, table: Tensor, cuts: Tensor, rank: Tensor) -> Tensor:
    """Merge the neighbours that cost least (rank 0; an empty cluster costs nothing); cut where that gains most."""
    weight, _, _ = _inside(sums, cuts)
    a, b = weight[:, :-1], weight[:, 1:]
    cost = a * b / (a + b).clamp(min=_TINY) * table.diff(dim=1).square()
    pair = cost.argsort(1).gather(1, rank)
    cuts = cuts.scatter(1, pair + 1, cuts.gather(1, pair))  # the left one of the pair is empty now
    cuts = cuts.scatter(1, pair + 1, _best_cut(x, sums, cuts)).sort(1).values
    weight, first, _ = _inside(sums, cuts)
    return torch.where(weight > 0, first / weight.clamp(min=_TINY), table)


def _best_cut(x: Tensor, sums: Sums, cuts: Tensor) -> Tensor:
    """(B, 1) position p where a cut lowers the error most: (sum h x)**2 / sum h, left and right, less the whole's."""
    p = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    cluster = torch.searchsorted(cuts[:, 1:].contiguous(), p, right=True)
    start, end = cuts.gather(1, cluster), cuts.gather(1, cluster + 1)
    gain = torch.zeros_like(x)
    for sign, low, high in ((1, start, p), (1, p, end), (-1, start, end)):
        weight, first = (s.gather(1, high) - s.gather(1, low) for s in sums[:2])
        gain += torch.where(weight > 0, sign * first.square() / weight.clamp(min=_TINY), 0.0)
    return gain.argmax(1, keepdim=True)
