"""Proximal maps: P that hardens while training goes on. x in steps of the grid; the backward pass is the identity.

    parq    c + (x - c) / s  clipped to [lo, hi]     lo, hi: the levels round x, c their middle; s from 1 to 0
    relax   (1 - theta) x + theta nearest(x)         theta from 0 to 1

s = 1 is x itself inside the range of the levels (plain SGD), s = 0 and theta = 1 are the nearest level (BinaryConnect).
Both are non-decreasing and leave levels where they are, which is all that a proximal map has to be.

Source: Dockhorn et al. 2021, ProxConnect (arXiv:2110.13220); Jin et al. 2025, PARQ (arXiv:2503.15748) for the map and
its schedule; Yin et al. 2018, BinaryRelax (arXiv:1801.06313). The published convergence needs a convex regularizer,
which the levels' indicator is not.
"""

from collections.abc import Callable
from functools import partial
from math import exp

import torch
from torch import Tensor

from lowbit.estimators._estimator import Value
from lowbit.estimators._project import project
from lowbit.formats import LevelSet

STEEPNESS, CENTRE = 10.0, 0.5
ProximalMap = Callable[[Tensor, Value, LevelSet], Tensor]


def parq(x: Tensor, s: Value, levels: LevelSet) -> Tensor:
    """The piecewise affine map of inverse slope s, 1 (identity in the range) to 0 (nearest level)."""
    low, high = _neighbours(x, levels)
    centre = (low + high) / 2
    s = torch.as_tensor(s, dtype=x.dtype, device=x.device)
    soft = torch.clamp(centre + (x - centre) / s.clamp(min=1e-12), low, high)
    return torch.where(s > 0, soft, project(x, levels))


def relax(x: Tensor, theta: Value, levels: LevelSet) -> Tensor:
    """Between x (theta 0) and its nearest level (theta 1)."""
    return torch.lerp(x, project(x, levels), torch.as_tensor(theta, dtype=x.dtype, device=x.device))


def nearest_level(x: Tensor, t: Value, levels: LevelSet) -> Tensor:
    """The hard projection, at every t: BinaryConnect."""
    return project(x, levels)


MAPS: dict[str, ProximalMap] = {"parq": parq, "relax": relax, "hard": nearest_level}


def schedule(name: str, start: float, stop: float) -> "Callable[[float], float] | None":
    """The parameter of a map by the position in the training: soft until `start`, hard from `stop` on."""
    if name == "hard":
        return None
    return partial(_inverse_slope if name == "parq" else _share, start, stop)


def _share(start: float, stop: float, position: float) -> float:
    return min(max((position - start) / (stop - start), 0.0), 1.0)


def _inverse_slope(start: float, stop: float, position: float) -> float:
    """A sigmoid of steepness 10 that goes exactly from 1 to 0."""
    first, here, last = (1 / (1 + exp(STEEPNESS * (x - CENTRE))) for x in (0.0, _share(start, stop, position), 1.0))
    return (here - last) / (first - last)


def _neighbours(x: Tensor, levels: LevelSet) -> tuple[Tensor, Tensor]:
    """The level at or below x and the one above; at the ends the outermost two."""
    if levels.values == (-1.0, 1.0):
        return torch.full_like(x, -1), torch.ones_like(x)
    if levels.is_integer_range:
        low = x.floor().clamp(levels.values[0], levels.values[-1] - 1)
        return low, low + 1
    table = levels.table().to(x.device)
    at = torch.searchsorted(table, x.contiguous(), right=True).sub(1).clamp(0, len(table) - 2)
    return table[at], table[at + 1]
