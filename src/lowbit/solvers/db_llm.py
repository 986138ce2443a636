"""Dual binarization: two binary planes with two scales for each group.

    w_hat = a1 b1 + a2 b2,   b1, b2 in {0, 1},  a1 > 0 > a2:   levels a2, 0, a1 + a2, a1
    start  a1 = 2 s, a2 = -s, s = max |w| / 2: rounding to -s, 0, s, 2 s

The levels are moved by least squares on the weights, then (with calibration text) codes and levels by gptq's column
loop, closed-form refits under the Gram matrix and sweeps of coordinate descent. `learned=false` keeps the start's
levels and rounds to the nearest. A block whose best a1 or a2 would change its sign keeps the old ones.
Bits: 2 + 32 / group.
Source: Chen 2024 (DB-LLM, arXiv:2402.11960) for planes and start, where training with distillation moves the levels.
"""

from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, encode, fit
from lowbit.formats.format import dual_grid
from lowbit.solvers import gptq
from lowbit.solvers._spec import Solution, Spec
from lowbit.statistics import LayerStatistics


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    learned: bool = True,
    damping: float = 0.01,
    drift: bool = True,
    sweeps: int = 2,
) -> Solution:
    """Quantize w (out, in) in the format kmeans2-gG-dual."""
    if fmt.scale_rule != "dual":
        raise FormatError(f"db_llm stores two binary planes with two scales, not {fmt}: use kmeans2-g64-dual.")
    if learned and statistics is not None:
        return gptq.solve(w, statistics, fmt, damping=damping, drift=drift, sweeps=sweeps)
    blocks = fmt.blocks.split(w)
    s = blocks.abs().amax(1, keepdim=True) / 2
    grid = fit(blocks, fmt) if learned else dual_grid((2 * s).half().float(), (-s).half().float())
    return Solution(fmt.blocks.merge(encode(blocks, grid, fmt), *w.shape), grid, fmt)


SPEC = Spec(
    name="db_llm",
    title="DB-LLM: two binary planes with two scales a group",
    source="Chen 2024, arXiv:2402.11960",
    solve=solve,
    uses_gram=True,
    format="kmeans{bits}-{blocks}-dual",
    options={"learned": True, "damping": 0.01, "drift": True, "sweeps": 2},
    bits=2,
    widths=(2,),
)
