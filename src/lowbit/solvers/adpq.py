"""AdpQ: outliers by the adaptive LASSO of the weights, on a grid of their own. No data.

    minimise (w_hat - w)^2 / 2 + lambda |w_hat| / |w|   ->   w_hat = sign(w) relu(|w| - lambda / |w|)

A weight is an outlier where w_hat is not 0: where |w| > sqrt(lambda). Lambda falls until a fraction alpha of the matrix
survives, so sqrt(lambda) is the (1 - alpha) quantile of |w|. Outliers (8 bits, min-max of the row) and the core (the
recipe's format) are rounded apart; what is stored are the original weights, not the shrunk ones.
Bits: b + b_out * alpha + index + scales of both parts.
Source: Ghaffari 2024 (AdpQ, arXiv:2405.13358); the closed form of lambda is derived, width and mask are ours.
"""

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers._spec import Solution, Spec
from lowbit.solvers._split import Split, fit_masked, row_importance, solve_split
from lowbit.statistics import LayerStatistics


def solve(
    w: Tensor, statistics: "LayerStatistics | None", fmt: Format, *, alpha: float = 0.05, outlier_bits: int = 8
) -> Solution:
    """Quantize w (out, in); statistics are not used."""
    return solve_split(w, lambda _: separate(w, fmt, alpha, outlier_bits))


def separate(w: Tensor, fmt: Format, alpha: float, outlier_bits: int, importance: "Tensor | None" = None) -> Split:
    """The outliers of the matrix, and grids of both parts."""
    mask = survives(w, lasso_lambda(w, alpha))
    other = Format.parse(f"uint{outlier_bits}-channel")
    h = row_importance(importance, w)
    core, outliers = fit_masked(w, ~mask, fmt, h), fit_masked(w, mask, other, h)
    return Split(mask, fmt, core, other, outliers)


def lasso_lambda(w: Tensor, alpha: float) -> float:
    """The lambda at which round(alpha * n) weights survive (fewer where magnitudes tie)."""
    n = w.numel() - round(alpha * w.numel())
    return float(w.abs().flatten().kthvalue(n).values) ** 2 if n else -1.0


def survives(w: Tensor, lam: float) -> Tensor:
    """Bool: where the LASSO's solution is not 0."""
    return torch.ones_like(w, dtype=torch.bool) if lam < 0 else w.abs() > lam**0.5


def shrunk(w: Tensor, lam: float) -> Tensor:
    """The LASSO's solution: sign(w) relu(|w| - lambda / |w|), 0 at 0."""
    size = w.abs()
    return torch.where(size > 0, w.sign() * (size - lam / size.clamp(min=1e-30)).clamp(min=0), 0.0)


SPEC = Spec(
    name="adpq",
    title="AdpQ: outliers by the adaptive LASSO, no data",
    source="Ghaffari 2024, arXiv:2405.13358",
    solve=solve,
    format="uint{bits}-{blocks}",
    options={"alpha": 0.05, "outlier_bits": 8},
)
