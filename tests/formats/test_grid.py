"""A grid's members stay together: every selection and change reaches scale, zero and table alike."""

import pytest
import torch

from lowbit.formats import Grid

SCALE, ZERO, TABLE = torch.arange(1.0, 4.0)[:, None], torch.arange(4.0, 7.0)[:, None], torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("grid", [Grid(SCALE), Grid(SCALE, ZERO), Grid(SCALE, None, TABLE)])
def test_map_take_and_where_reach_every_member(grid: Grid) -> None:
    doubled = grid.map(lambda member: 2 * member)
    mixed = grid.where(torch.tensor([[True], [False], [True]]), doubled)
    for own, twice, part, chosen in zip(tuple(grid), tuple(doubled), tuple(grid.take(slice(1, 3))), tuple(mixed)):
        if own is None:
            assert (twice, part, chosen) == (None, None, None)
            continue
        assert torch.equal(twice, 2 * own)
        assert torch.equal(part, own[1:])
        assert torch.equal(chosen, torch.stack([own[0], 2 * own[1], own[2]]))


def test_a_plain_number_picks_the_member_as_of_any_tuple() -> None:
    grid = Grid(SCALE, ZERO)
    assert grid[0] is SCALE and grid[1] is ZERO and grid[2] is None
    assert torch.equal(grid[1:].zero, ZERO[1:])
