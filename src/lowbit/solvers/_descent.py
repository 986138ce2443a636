"""Coordinate descent on the codes: what the column loop left on the table.

With the grids fixed, a row's output error is quadratic in each weight. Column by column every code moves to the level
nearest to the least-squares value given all the others:

    t_j = q_j + (H (w - q))_j / H_jj,   q_j <- round(t_j)

A step never raises tr[(W - Q) H (W - Q)^T] with the damped H: the level nearest to t_j is the best one for column j.
Errors are applied inside a block of columns at once and to the rest in one product, as in the column loop, so a sweep
costs what the column loop costs.
Source: Behdin 2023 (QuantEase, arXiv:2309.01885), section 3; the blocked form is derived.
"""

import torch
from torch import Tensor

from lowbit._threads import one_thread
from lowbit.solvers._columns import GridHooks


def descend(w: Tensor, q: Tensor, gram: Tensor, hooks: GridHooks, *, damping: float, block: int = 64) -> None:
    """One sweep over the columns in the hooks' order, on their static grids; the codes change in the hooks.

    w (out, in), q (out, in) the rounded weights as they are, gram (in, in).
    """
    order = hooks.order
    h = gram[order][:, order]
    h.diagonal().add_(damping * gram.diagonal().mean())
    columns = q[:, order].T.contiguous()
    gradient = h @ (w[:, order].T - columns)
    for i1 in range(0, len(h), block):
        i2 = min(i1 + block, len(h))
        moved = torch.empty(i2 - i1, columns.shape[1], dtype=columns.dtype)
        if not hooks.descend(i1, i2, columns, gradient, moved, h):
            with one_thread():
                _columns(i1, i2, columns, gradient, moved, h, hooks)
        gradient[:i1].addmm_(h[:i1, i1:i2], moved, alpha=-1)
        gradient[i2:].addmm_(h[i2:, i1:i2], moved, alpha=-1)


def _columns(i1: int, i2: int, columns: Tensor, gradient: Tensor, moved: Tensor, h: Tensor, hooks: GridHooks) -> None:
    local, diagonal = gradient[i1:i2], h.diagonal()[i1:i2].tolist()
    for j in range(i1, i2):
        new = hooks.quantize(j, columns[j] + gradient[j] / diagonal[j - i1])
        torch.sub(new, columns[j], out=moved[j - i1])
        columns[j] = new
        local.addr_(h[i1:i2, j], moved[j - i1], alpha=-1)
