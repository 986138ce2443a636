"""Gram matrices: what calibration keeps of a layer's inputs.

    H = (1/tokens) sum over tokens of x x^T          x (in,), float32 products added into float32 or better

Every layer-wise solver minimises tr[(W - Q) H (W - Q)^T], the mean squared change of the layer's outputs. The mean
magnitude of each input channel (AWQ) is gathered in the same pass, and where the float model's inputs are at hand too,
how far the inputs have drifted from them:

    D = (1/tokens) sum (x_float - x) x^T

Memory: 4 * in^2 bytes each (8 with dtype float64), whatever the number of tokens.
Sources: Frantar 2022 (GPTQ, arXiv:2210.17323); Lin 2023 (AWQ, arXiv:2306.00978); Li 2025 (GPTAQ, arXiv:2504.02692).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import DataError


@dataclass(frozen=True)
class LayerStatistics:
    """gram (in, in) = mean of x x^T; abs_mean (in,) = mean |x|; tokens: how many vectors were seen.

    drift (in, in) = mean of (x_float - x) x^T, or None where only x was seen
    fisher: (out, in) mean squared gradient of the loss, where it was gathered
    """

    gram: Tensor
    abs_mean: Tensor
    tokens: int
    drift: "Tensor | None" = None
    fisher: "Tensor | None" = None

    @property
    def dead(self) -> Tensor:
        """(in,) bool: input channels that were always zero."""
        return self.gram.diagonal() == 0

    def rescaled(self, t: Tensor) -> "LayerStatistics":
        """The statistics of x / t (AWQ folds t into the weight and 1/t into whatever produces x)."""
        fisher = None if self.fisher is None else self.fisher / t**2
        return LayerStatistics(self.gram / torch.outer(t, t), self.abs_mean / t, self.tokens, fisher=fisher)


class GramAccumulator:
    """Streams inputs of one layer: `add(x)` per batch, then `finish()`.

    size: input features; dtype: of the running sum, float32 or float64.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.gram = torch.zeros(size, size, dtype=dtype)
        self.drift: Tensor | None = None
        self.abs_sum = torch.zeros(size, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Tensor, x_float: "Tensor | None" = None) -> None:
        """x (..., in): any float dtype; leading dimensions are tokens. x_float: the float model's input, same shape."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if x_float is not None:
            self.drift = torch.zeros_like(self.gram) if self.drift is None else self.drift
            self.drift += (x_float.detach().reshape(x.shape).float() - x).T @ x
        if self.gram.dtype == torch.float32:
            self.gram.addmm_(x.T, x)
        else:
            self.gram += (x.T @ x).to(self.gram.dtype)
        self.abs_sum += x.abs().sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def finish(self) -> LayerStatistics:
        """Averages. Raises DataError where nothing was added or an input was not finite."""
        if self.tokens == 0:
            raise DataError(
                "no calibration tokens reached this layer: the forward pass does not use it. "
                "Leave it as it is: layers: [{match: NAME, format: float}] in a recipe."
            )
        gram = (self.gram / self.tokens).float()
        drift = None if self.drift is None else (self.drift / self.tokens).float()
        if not all(bool(torch.isfinite(m).all()) for m in (gram, drift) if m is not None):
            raise DataError(
                "calibration activations hold NaN or infinity: the model's weights or their dtype are broken."
            )
        return LayerStatistics(gram, (self.abs_sum / self.tokens).float(), self.tokens, drift)


def drift_target(w: Tensor, statistics: LayerStatistics, damping: float = 0.1) -> Tensor:
    """The weight whose outputs on x come nearest to W x_float: W + W D (H + damping mean(diag H) I)^-1.

    |W x_float - Q x|^2 = |(W* - Q) x|^2 + a constant, so a solver that is handed W* also mends what the layers before
    have done to its inputs. w itself where nothing has drifted. Derived; the objective is GPTAQ's (arXiv:2504.02692).
    """
    if statistics.drift is None:
        return w
    h = statistics.gram.clone()
    h.diagonal().add_(damping * h.diagonal().mean().clamp(min=torch.finfo(h.dtype).tiny))
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info) != 0:
        return w
    change = torch.cholesky_solve((w @ statistics.drift).T, lower)
    return w + change.T if bool(torch.isfinite(change).all()) else w


def output_error(w: Tensor, w_hat: Tensor, gram: Tensor) -> float:
    """tr[(W - Q) H (W - Q)^T]: mean over tokens of the squared change of the layer's output (summed over outputs)."""
    d = w.float() - w_hat.float()
    return float(((d @ gram) * d).sum(dtype=torch.float64))


def output_energy(w: Tensor, gram: Tensor) -> float:
    """tr[W H W^T]: the mean squared output itself; error / energy is the relative output error."""
    return output_error(w, torch.zeros_like(w), gram)
