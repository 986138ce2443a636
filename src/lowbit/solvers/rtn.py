"""RTN: round to nearest, min-max or searched range. No calibration.

    s = (max - min) / (2^b - 1);  z = round(-min / s);  q = clamp(round(w / s) + z, 0, 2^b - 1);  w_hat = s (q - z)

search=True shrinks the range by 1.00, 0.99 .. 0.21 and keeps the least sum |w_hat - w|^2.4 per group, so its error is
never larger.
Source: the default grid of GPTQ (arXiv:2210.17323). Bits: b + (16 + b) / group with an integer zero.
"""

from torch import Tensor

from lowbit.formats import Format, encode, fit
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics


def solve(w: Tensor, statistics: "LayerStatistics | None", fmt: Format, *, search: bool = False) -> Solution:
    """Quantize w (out, in); statistics are not used."""
    fmt = fmt.with_(scale_rule="search") if search else fmt
    blocks = fmt.blocks.split(w)
    grid = fit(blocks, fmt)
    return Solution(fmt.blocks.merge(encode(blocks, grid, fmt), *w.shape), grid, fmt)


SPEC = Spec(
    name="rtn",
    title="Round to nearest",
    source="Frantar 2022, arXiv:2210.17323 (grid)",
    solve=solve,
    format="uint{bits}-{blocks}",
    options={"search": False},
)
