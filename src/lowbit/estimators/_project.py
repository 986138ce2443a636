"""P: the nearest level, as a float, and the code of a level. The only place where training decides on a level."""

import torch
from torch import Tensor

from lowbit.formats import LevelSet
from lowbit.formats.levels import nearest, round_integers, thresholds

TINY = torch.finfo(torch.float32).tiny


def project(x: Tensor, levels: LevelSet, rounding: str = "even") -> Tensor:
    """The level nearest to each x (float32), x in steps of the grid; ties as `formats.levels.nearest` takes them.

    Two levels cost one comparison, consecutive integers a rounding, others a search.
    """
    if levels.values == (-1.0, 1.0):
        return torch.where(x > -TINY, 1.0, -1.0)
    if levels.is_integer_range:
        return round_integers(x, rounding).clamp_(levels.values[0], levels.values[-1])
    table = levels.table().to(x.device)
    return table[torch.searchsorted(thresholds(table, rounding), x.contiguous(), out_int32=True)]


def code_of(level: Tensor, levels: LevelSet) -> Tensor:
    """The code (uint8) of values that are levels."""
    if levels.values == (-1.0, 1.0):
        return (level > 0).to(torch.uint8)
    if levels.is_integer_range:
        return (level - levels.values[0]).to(torch.uint8)
    return nearest(level, levels.table().to(level.device))
