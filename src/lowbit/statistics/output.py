"""Output-adaptive statistics: what the loss says about a layer, from its inputs x and its outputs' gradients r.

    oac      H = (1/N) sum over windows of G^T G,   G = r^T x (out, in), the weight's gradient in one window
    guided   a weight for each token, mean over outputs of r_t^2; H = sum over tokens of weight_t x_t x_t^T
    fisher   (out, in) mean over windows of G^2

oac has the cross terms between tokens and between rows of one window; guided keeps its diagonal over tokens; fisher its
diagonal over weights. r are gradients of the loss of one window (mean over its tokens) at the float model. If r has
independent zero-mean entries, E[G^T G] = out * sum x x^T, the plain Gram matrix. The rank of H is at most windows *
min(out, tokens): a damping is mandatory.
Memory: in^2, tokens, or out * in floats a layer.
Sources: Edalati 2024 (OAC, arXiv:2405.15025); Kim 2025 (GuidedQuant, arXiv:2505.07004), with one group of outputs; Kim
2023 (SqueezeLLM, arXiv:2306.07629).
"""

import torch
from torch import Tensor

KINDS = ("inputs", "oac", "guided", "fisher")


class OutputAccumulator:
    """Streams one layer, window by window: `add(x, r)`, then `finish()`."""

    def __init__(self, kind: str) -> None:
        if kind not in KINDS[1:]:
            raise ValueError(f"kind {kind!r} needs no gradients, or is none of {', '.join(KINDS)}")
        self.kind, self.windows = kind, 0
        self.total: Tensor | None = None
        self.tokens: list[Tensor] = []

    def add(self, x: Tensor, r: Tensor) -> None:
        """x (..., in) and r (..., out) of all tokens of one window."""
        x, r = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, r))
        self.windows += 1
        if self.kind == "guided":
            self.tokens.append(r.square().mean(1))
            return
        g = r.T @ x
        new = g.T @ g if self.kind == "oac" else g.square()
        self.total = new if self.total is None else self.total.add_(new)

    def finish(self) -> Tensor:
        """oac: (in, in); fisher: (out, in); guided: (windows, tokens), 1 in the mean."""
        if self.kind == "guided":
            weights = torch.stack(self.tokens)
            return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
        assert self.total is not None
        return self.total / self.windows
