"""Statistical pre-calibration: AdpQ's split of the weights first, then GPTQ's error feedback on its grids.

    outliers |w| > sqrt(lambda) on an 8-bit grid of the row, the core on searched grids; then the column loop

The split needs no data and keeps the distribution of the rounded weights close to that of the original ones; the
calibration then starts from it.
Bits: as adpq.
Source: Ghaffari 2025 ("Rethinking Post-Training Quantization: Introducing a Statistical Pre-Calibration Approach"); its
claim, abstract only, is a start that makes calibration robust. The combination with the column loop is built from the
description.
"""

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers._spec import Solution, Spec
from lowbit.solvers._split import solve_split
from lowbit.solvers.adpq import separate
from lowbit.statistics import LayerStatistics, drift_target


def solve(
    w: Tensor,
    statistics: "LayerStatistics | None",
    fmt: Format,
    *,
    alpha: float = 0.05,
    outlier_bits: int = 8,
    damping: float = 0.01,
    refit: bool = True,
    drift: bool = True,
    sweeps: int = 2,
) -> Solution:
    """Quantize w (out, in) under the layer's Gram matrix. Raises RecipeError without statistics."""
    if statistics is None:
        raise RecipeError("precalibration needs calibration text: add --data FILE, or use --method adpq.")
    w = drift_target(w, statistics) if drift else w
    return solve_split(
        w,
        lambda importance: separate(w, fmt, alpha, outlier_bits, importance),
        statistics,
        damping=damping,
        refitted=refit,
        sweeps=sweeps,
    )


SPEC = Spec(
    name="precalibration",
    title="Statistical pre-calibration: AdpQ's split, then error feedback",
    source="Ghaffari 2025, Rethinking PTQ",
    solve=solve,
    uses_gram=True,
    format="uint{bits}-{blocks}-search",
    needs_data=True,
    options={"alpha": 0.05, "outlier_bits": 8, "damping": 0.01, "refit": True, "drift": True, "sweeps": 2},
)
