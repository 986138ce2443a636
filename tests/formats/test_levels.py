"""Level sets against the published tables, and rounding against brute force."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import LevelSet, levels
from lowbit.formats.levels import LEVEL_SET_NAMES, minifloat_values, nearest, round_integers

ALL = [name for name in LEVEL_SET_NAMES if not name.startswith("kmeans")] + ["pot2nz_s2", "pot3_s3", "pot3nz_s2"]

E3M2 = """
    0 .0625 .125 .1875 .25 .3125 .375 .4375 .5 .625 .75 .875 1 1.25 1.5 1.75
    2 2.5 3 3.5 4 5 6 7 8 10 12 14 16 20 24 28
"""
POSITIVE = {
    "fp4_e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "fp6_e2m3": [k * 0.125 for k in range(16)] + [2 + k * 0.25 for k in range(8)] + [4 + k * 0.5 for k in range(8)],
    "fp6_e3m2": [float(v) for v in E3M2.split()],
    "pot2": [0.0, 1.0],
    "pot3": [0.0, 1.0, 2.0, 4.0],
    "pot4": [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
    "pot2nz": [1.0, 2.0],
    "pot3nz": [1.0, 2.0, 4.0, 8.0],
    "pot4nz": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
    "pot2nz_s2": [1.0, 4.0],
    "ternary": [0.0, 1.0],
    "binary": [1.0],
}


@pytest.mark.parametrize("name", POSITIVE)
def test_symmetric_tables(name: str) -> None:
    positive = [float(v) for v in POSITIVE[name]]
    assert list(levels(name).values) == [-v for v in reversed(positive) if v] + positive


@pytest.mark.parametrize(
    ("name", "count", "smallest", "smallest_normal", "largest"),
    [("fp8_e4m3", 127, 2.0**-9, 2.0**-6, 448.0), ("fp8_e5m2", 124, 2.0**-16, 2.0**-14, 57344.0)],
)
def test_eight_bit_floats(name: str, count: int, smallest: float, smallest_normal: float, largest: float) -> None:
    values = levels(name).values
    positive = [v for v in values if v >= 0]
    assert len(positive) == count and len(values) == 2 * count - 1
    assert positive[1] == smallest and positive[-1] == largest
    mantissas = 2 ** {"fp8_e4m3": 3, "fp8_e5m2": 2}[name]
    assert positive[mantissas] == smallest_normal
    torch_kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    theirs = torch.arange(256, dtype=torch.uint8).view(torch_kind).float()
    assert sorted({float(v) for v in theirs if math.isfinite(v)}) == list(values)


def test_minifloat_rows_of_the_family() -> None:
    assert minifloat_values(2, 0, 1) == [0.0, 1.0, 2.0, 4.0]  # S3 and DeepShift at 3 bits
    assert minifloat_values(0, 3, 0) == [k / 4 for k in range(8)]  # no exponent: fixed point
    assert len(levels("mxint8").values) == 255 and levels("mxint8").values[-1] == 127 / 64


def test_integers() -> None:
    assert levels("int4").values == tuple(range(-8, 8)) and levels("uint3").values == tuple(range(8))
    assert levels("int1").values == (-1, 1) and levels("uint1").values == (0, 1)
    assert levels("int4").reach == 7 and levels("uint1").unsigned and not levels("int1").is_integer_range


def test_nf4_literal_and_construction() -> None:
    literal = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    literal += [-0.18477343022833424, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    literal += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    literal += [0.7229568362236023, 1.0]
    assert list(levels("nf4").values) == literal
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    ends = [torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    values = torch.cat([normal.icdf(ends[0]), -normal.icdf(ends[1]), torch.zeros(1, dtype=torch.float64)])
    built = (values / values.max()).sort().values
    assert (built - torch.tensor(literal, dtype=torch.float64)).abs().max() < 2e-7


@pytest.mark.parametrize("name", ALL)
def test_tables_are_sorted_small_and_have_no_minus_zero(name: str) -> None:
    level_set = levels(name)
    values = level_set.values
    assert list(values) == sorted(set(values)) and len(values) <= 2**level_set.bits
    assert all(math.copysign(1, v) > 0 for v in values if v == 0)
    assert level_set.name == name and torch.equal(level_set.table().double(), torch.tensor(values).double())


@pytest.mark.parametrize("name", ALL)
def test_every_level_is_its_own_nearest_in_every_rounding(name: str) -> None:
    table = levels(name).table()
    own = torch.arange(len(table), dtype=torch.uint8)
    for rounding in ("even", "half_away", "stochastic"):
        assert torch.equal(nearest(table, table, rounding), own)


def slow_nearest(x: float, values: tuple[float, ...], rounding: str) -> int:
    """Brute force over the table, ties as documented."""
    best = min(abs(x - v) for v in values)
    tied = [i for i, v in enumerate(values) if abs(x - v) == best]
    if rounding == "half_away":
        return max(tied, key=lambda i: (abs(values[i]), values[i]))
    if 0 not in values:
        return max(tied, key=lambda i: (abs(values[i]), values[i]))
    return min(tied, key=lambda i: (i - values.index(0)) % 2)


@pytest.mark.parametrize("rounding", ["even", "half_away"])
@pytest.mark.parametrize("name", ALL)
def test_nearest_is_brute_force(name: str, rounding: str) -> None:
    values = levels(name).values[:60] if name.startswith(("fp8", "int8", "uint8", "mxint8")) else levels(name).values
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    beyond = [values[0] - 3, values[-1] + 3, 0.0, -0.0]
    points = [x for x in middles + beyond + [m * 1.01 for m in middles] if x == float(torch.tensor(x))]
    codes = nearest(torch.tensor(points), torch.tensor(values), rounding).tolist()
    assert codes == [slow_nearest(x, values, rounding) for x in points]


@settings(max_examples=15)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=8))
def test_nearest_is_nearest(points: list[float]) -> None:
    x = torch.tensor(points)
    for name in ("fp8_e4m3", "nf4", "pot4nz", "int5"):
        table = levels(name).table()
        gap = (x[:, None] - table).abs()
        chosen = gap.gather(1, nearest(x, table).long()[:, None])[:, 0]
        assert torch.equal(chosen, gap.min(1).values)


def test_one_table_per_row() -> None:
    tables = torch.tensor([[-1.0, 0.0, 2.0], [5.0, 6.0, 6.0]])
    x = torch.tensor([[-0.4, 0.9, 1.1, -9.0], [5.4, 5.6, 6.0, 7.0]])
    codes = nearest(x, tables)
    assert codes[0].tolist() == [1, 1, 2, 0]
    assert tables[1][codes[1].long()].tolist() == [5.0, 6.0, 6.0, 6.0]


def test_ties_of_integers() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert round_integers(x).tolist() == [-2, -2, 0, 0, 2, 2]
    assert round_integers(x, "half_away").tolist() == [-3, -2, -1, 1, 2, 3]


@pytest.mark.parametrize("name", ["int4", "nf4", "pot3nz", "binary"])
def test_stochastic_rounding_is_unbiased_seeded_and_keeps_levels(name: str) -> None:
    table, n = levels(name).table(), 20_000
    x = torch.tensor([0.3, -0.21, float(table[0]), float(table[-1])])[:, None].expand(-1, n)
    codes = nearest(x, table, "stochastic", torch.Generator().manual_seed(1))
    again = nearest(x, table, "stochastic", torch.Generator().manual_seed(1))
    other = nearest(x, table, "stochastic", torch.Generator().manual_seed(2))
    assert torch.equal(codes, again) and not torch.equal(codes, other)
    value = table[codes.long()]
    step = float(table.diff().max())
    assert ((value.mean(1) - x[:, 0]).abs() < 4 * step / 2 / n**0.5).all()  # four standard errors
    assert torch.equal(value[2:], x[2:])


def test_stochastic_integers_never_move_a_whole_number() -> None:
    x = torch.full((200_000,), 127.0)  # floor(x + draw) would move about two of these
    assert torch.equal(round_integers(x, "stochastic", torch.Generator().manual_seed(0)), x)
    half = round_integers(torch.full((10_000,), -3.25), "stochastic", torch.Generator().manual_seed(0))
    assert set(half.tolist()) == {-4.0, -3.0} and abs(float(half.mean()) + 3.25) < 0.02


@pytest.mark.parametrize("name", ["int9", "int0", "uint", "pot5", "pot3_s1", "fp8_e3m4", "nf3", "", "kmeans9", "INT4"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(FormatError, match="unknown level set"):
        levels(name)


def test_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(FormatError, match="'ternary'"):
        levels("ternery")


def test_a_level_set_of_ones_own() -> None:
    odd = LevelSet("odd2", (-3.0, -1.0, 1.0, 3.0), 2)
    assert nearest(torch.tensor([-5.0, -0.1, 0.0, 2.5]), odd.table()).tolist() == [0, 1, 2, 3]
    assert odd.storage_bits == 2 and levels("ternary").storage_bits == 1.6


def test_sign_of_zero_survives_flushing_of_subnormals() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        codes = nearest(torch.tensor([0.0, -0.0, 1e-30, -1e-30]), torch.tensor([-1.0, 1.0]))
    finally:
        torch.set_flush_denormal(False)
    assert codes.tolist() == [1, 1, 1, 0]
