"""Gram matrices: what calibration keeps of a layer's inputs.

    H = (1/tokens) sum over tokens of x x^T          x (in,), float32 products added into float32 or better

Every layer-wise solver minimises tr[(W - Q) H (W - Q)^T], the mean squared change of the layer's outputs. The mean
magnitude of each input channel (AWQ) is gathered in the same pass. Memory: 4 * in^2 bytes (8 with dtype float64),
whatever the number of tokens.
Sources: Frantar 2022 (GPTQ, arXiv:2210.17323); Lin 2023 (AWQ, arXiv:2306.00978).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import DataError


@dataclass(frozen=True)
class LayerStatistics:
    """gram (in, in) = mean of x x^T; abs_mean (in,) = mean |x|; tokens: how many vectors were seen."""

    gram: Tensor
    abs_mean: Tensor
    tokens: int

    @property
    def dead(self) -> Tensor:
        """(in,) bool: input channels that were always zero."""
        return self.gram.diagonal() == 0

    def rescaled(self, t: Tensor) -> "LayerStatistics":
        """The statistics of x / t (AWQ folds t into the weight and 1/t into whatever produces x)."""
        return LayerStatistics(self.gram / torch.outer(t, t), self.abs_mean / t, self.tokens)


class GramAccumulator:
    """Streams inputs of one layer: `add(x)` per batch, then `finish()`.

    size: input features; dtype: of the running sum, float32 or float64.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.gram = torch.zeros(size, size, dtype=dtype)
        self.abs_sum = torch.zeros(size, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x (..., in): any float dtype; leading dimensions are tokens."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
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
        if not bool(torch.isfinite(gram).all()):
            raise DataError(
                "calibration activations hold NaN or infinity: the model's weights or their dtype are broken."
            )
        return LayerStatistics(gram, (self.abs_sum / self.tokens).float(), self.tokens)


def output_error(w: Tensor, w_hat: Tensor, gram: Tensor) -> float:
    """tr[(W - Q) H (W - Q)^T]: mean over tokens of the squared change of the layer's output (summed over outputs)."""
    d = w.float() - w_hat.float()
    return float(((d @ gram) * d).sum(dtype=torch.float64))


def output_energy(w: Tensor, gram: Tensor) -> float:
    """tr[W H W^T]: the mean squared output itself; error / energy is the relative output error."""
    return output_error(w, torch.zeros_like(w), gram)
