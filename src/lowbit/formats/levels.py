"""Level sets: the values a code can mean, as one sorted table.

    w_hat = (values[code] - zero) * scale          code = index into the sorted table

Integers, binary, ternary, powers of two, minifloats E(e)M(m) and NF4 are all such tables (at most 256 entries). A
sign-magnitude format has two zeros; only one is kept, so its table is one shorter than 2**bits and -0 is never emitted.

    name                 values                                                    bits stored
    int1                 -1, 1                                                     1
    int2 .. int8         -2**(b-1) .. 2**(b-1)-1                                   b
    uint1 .. uint8       0 .. 2**b-1, used with a zero point                       b
    binary, ternary      -1, 1   and   -1, 0, 1                                    1, and 1.6 (five trits a byte)
    pot2 .. pot4         0 and +-2**(k*stride), k < 2**(b-1)-1                     b     stride s: "pot3_s2"
    pot2nz .. pot4nz     +-2**(k*stride), k < 2**(b-1), no zero                    b
    fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2, mxint8                       4, 6, 6, 8, 8, 8
    nf4                  quantiles of the normal distribution                      4
    kmeans1 .. kmeans8   a table that travels with the tensor                      b

Sources: minifloats OCP MX v1.0 (E4M3 is the "fn" kind: maximum 448, no infinity; the codes of NaN and infinity are no
levels, so larger weights saturate); NF4 Dettmers 2023 (arXiv:2305.14314), its construction is repeated in the tests;
powers of two without zero Li 2023 (DenseShift, arXiv:2208.09708), with zero Li 2021 (S3, arXiv:2107.03453).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.errors import FormatError, near_names

ROUNDINGS = ("even", "half_away", "stochastic")
# eight positive and seven negative quantiles of the normal distribution and 0, divided by the largest, in float32
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833424, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class LevelSet:
    """A named, sorted table of at most 256 levels; `values` is empty for k-means: its table is data, not a constant."""

    name: str
    values: tuple[float, ...]
    bits: int
    packing: str = "bits"  # "bits": `bits` per code; "trits": five codes of three levels per byte
    is_integer_range: bool = field(init=False, repr=False, compare=False)  # consecutive integers: closed-form rounding
    is_even: bool = field(init=False, repr=False, compare=False)  # levels at equal distances

    def __post_init__(self) -> None:
        v = self.values  # once: torch.compile warns about caches
        consecutive = bool(v) and all(x == v[0] + i for i, x in enumerate(v)) and v[0] == int(v[0])
        object.__setattr__(self, "is_integer_range", consecutive)
        object.__setattr__(self, "is_even", len({b - a for a, b in pairwise(v)}) == 1)

    @property
    def storage_bits(self) -> float:
        """Bits per code in the file, scales excluded."""
        return 1.6 if self.packing == "trits" else float(self.bits)

    @property
    def unsigned(self) -> bool:
        """True for 0 .. 2**b-1, the level sets that need a zero point."""
        return self.is_integer_range and self.values[0] == 0

    @property
    def reach(self) -> float:
        """The largest magnitude present on both sides; absmax / reach never clips."""
        return min(-self.values[0], self.values[-1]) if self.values[0] < 0 else self.values[-1]

    def table(self) -> Tensor:
        """The levels as float32, shape (len(values),)."""
        return torch.tensor(self.values, dtype=torch.float32)


def minifloat_values(e: int, m: int, bias: int, n_codes: "int | None" = None) -> list[float]:
    """The non-negative finite values of E(e)M(m), by code: M*2^(1-bias-m) if E=0 else (2^m+M)*2^(E-bias-m).

    n_codes keeps only the first codes, where the last ones mean Inf or NaN.

    >>> minifloat_values(2, 1, 1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    codes = range(2 ** (e + m) if n_codes is None else n_codes)
    parts = [(code >> m, code & (2**m - 1)) for code in codes]
    subnormal, normal = 2.0 ** (1 - bias - m), 2.0 ** (-bias - m)
    return [frac * subnormal if exp == 0 else (2**m + frac) * 2.0**exp * normal for exp, frac in parts]


def _mirror(magnitudes: "list[float]") -> tuple[float, ...]:
    return tuple(sorted({-v for v in magnitudes if v > 0} | set(magnitudes)))


def _int(b: int) -> LevelSet:
    half = 2 ** (b - 1)
    return LevelSet(f"int{b}", (-1.0, 1.0) if b == 1 else tuple(float(v) for v in range(-half, half)), b)


def _uint(b: int) -> LevelSet:
    return LevelSet(f"uint{b}", tuple(float(v) for v in range(2**b)), b)


def _pot(b: int, nz: "str | None", stride: "str | None") -> LevelSet:
    step, count = int(stride or 1), 2 ** (b - 1) - (0 if nz else 1)
    magnitudes = [2.0 ** (k * step) for k in range(count)] + ([] if nz else [0.0])
    return LevelSet(f"pot{b}{nz or ''}" + (f"_s{step}" if step > 1 else ""), _mirror(magnitudes), b)


_FIXED: dict[str, Callable[[], LevelSet]] = {
    "binary": lambda: LevelSet("binary", (-1.0, 1.0), 1),
    "ternary": lambda: LevelSet("ternary", (-1.0, 0.0, 1.0), 2, "trits"),
    "fp4_e2m1": lambda: LevelSet("fp4_e2m1", _mirror(minifloat_values(2, 1, 1)), 4),
    "fp6_e2m3": lambda: LevelSet("fp6_e2m3", _mirror(minifloat_values(2, 3, 1)), 6),
    "fp6_e3m2": lambda: LevelSet("fp6_e3m2", _mirror(minifloat_values(3, 2, 3)), 6),
    "fp8_e4m3": lambda: LevelSet("fp8_e4m3", _mirror(minifloat_values(4, 3, 7, 127)), 8),
    "fp8_e5m2": lambda: LevelSet("fp8_e5m2", _mirror(minifloat_values(5, 2, 15, 124)), 8),
    "mxint8": lambda: LevelSet("mxint8", tuple(c / 64 for c in range(-127, 128)), 8),
    "nf4": lambda: LevelSet("nf4", NF4, 4),
}
LEVEL_SET_NAMES = tuple(
    [f"{kind}{b}" for kind in ("int", "uint", "kmeans") for b in range(1, 9)]
    + [f"pot{b}{nz}" for b in (2, 3, 4) for nz in ("", "nz")]
    + list(_FIXED)
)


@cache
def levels(name: str) -> LevelSet:
    """The level set called `name` (see the table above). Raises FormatError with the nearest names.

    >>> levels("ternary").values
    (-1.0, 0.0, 1.0)
    """
    if name in _FIXED:
        return _FIXED[name]()
    if m := re.fullmatch(r"(int|uint|kmeans)([1-8])", name):
        kind, b = m[1], int(m[2])
        return LevelSet(name, (), b) if kind == "kmeans" else _int(b) if kind == "int" else _uint(b)
    if m := re.fullmatch(r"pot([2-4])(nz)?(?:_s([2-4]))?", name):
        return _pot(int(m[1]), m[2], m[3])
    raise FormatError(f"unknown level set {name!r}. {near_names(name, LEVEL_SET_NAMES)}")


def thresholds(table: Tensor, rounding: str = "even") -> Tensor:
    """(..., L-1) float32: x takes level i where thresholds[i-1] < x <= thresholds[i].

    The middles of neighbours; where the tie goes up, the largest number below the middle (for a middle of 0 the
    smallest normal one, which survives flushing of subnormals).
    """
    mids = ((table[..., 1:].double() + table[..., :-1].double()) / 2).float()
    below = torch.nextafter(mids, torch.full_like(mids, -torch.inf))
    below = torch.where(mids == 0, -torch.finfo(mids.dtype).tiny, below)
    return torch.where(_goes_up(table) if rounding == "even" else mids >= 0, below, mids)


def _goes_up(table: Tensor) -> Tensor:
    """Does the tie of levels i and i+1 go up? To an even number of steps from 0; away from 0 where it is no level."""
    zero_at = (table == 0).to(torch.uint8).argmax(-1, keepdim=True)
    has_zero = (table == 0).any(-1, keepdim=True)
    upper_is_even = (torch.arange(1, table.shape[-1], device=table.device) - zero_at) % 2 == 0
    return torch.where(has_zero, upper_is_even, (table[..., 1:] + table[..., :-1]) >= 0)


def nearest(x: Tensor, table: Tensor, rounding: str = "even", generator: "torch.Generator | None" = None) -> Tensor:
    """Index of the level nearest to each x.

    x:       (..., n) float32
    table:   (L,) sorted, or (..., L) one sorted table per row of x
    returns: (..., n) uint8

    Ties: "even" takes the level an even number of steps from the level 0 (half to even for integers and minifloats;
    away from zero where 0 is no level, so sign(0) = +1); "half_away" the level farther from 0; "stochastic" draws the
    upper neighbour with probability (x - lower) / (upper - lower), seeded by `generator`. Beyond the ends: the end.
    """
    if table.ndim > 1:
        table = table.expand(*x.shape[:-1], table.shape[-1])
    if rounding == "stochastic":
        return _stochastic(x, table.contiguous(), generator)
    return torch.searchsorted(thresholds(table, rounding), x.contiguous(), out_int32=True).to(torch.uint8)


def _stochastic(x: Tensor, table: Tensor, generator: "torch.Generator | None") -> Tensor:
    low = torch.searchsorted(table, x.contiguous(), right=True).sub(1).clamp(0, table.shape[-1] - 2)
    lower, upper = ((table[i] if table.ndim == 1 else table.gather(-1, i)) for i in (low, low + 1))
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    gap = torch.where(upper > lower, upper - lower, torch.ones_like(upper))
    return (low + (draw < (x - lower) / gap)).to(torch.uint8)


def round_integers(x: Tensor, rounding: str = "even", generator: "torch.Generator | None" = None) -> Tensor:
    """Round to integers (float result): ties to even, ties away from zero, or seeded stochastic rounding."""
    if rounding == "even":
        return x.round()
    if rounding == "half_away":
        whole = x.trunc()
        return whole + x.sign() * ((x - whole).abs() >= 0.5)
    low = x.floor()  # not floor(x + draw): the sum rounds, and a whole number could move
    return low + (torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) < x - low)
