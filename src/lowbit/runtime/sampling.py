"""Choosing the next token.

    logits -> / temperature -> keep the top_k largest -> keep the smallest set with probability >= top_p -> draw
    temperature 0 is greedy: the largest logit, no randomness; so is one that float32 takes for 0

A vocabulary is not sorted for a handful of tokens: the candidates are the CANDIDATES largest logits, and all of them
only where these do not reach top_p. Source of top-p: Holtzman et al. 2019 (arXiv:1904.09751), section 3.1.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
CANDIDATES = 256


class Sampler:
    """Logits (vocabulary,) -> token id. Same options, seed and logits: same tokens, on every machine's CPU."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        if self.temperature < TINY:
            return int(logits.argmax())
        ids, p = self._kept(logits)
        return int(ids[torch.multinomial(p, 1, generator=self.generator)])

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (vocabulary,) float32, summing to 1. Ties at an edge keep the lowest ids."""
        ids, p = self._kept(logits)
        return torch.zeros(len(logits)).scatter_(0, ids, p)

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids that may be drawn and their probabilities; sorted, likeliest first, where anything is cut off."""
        logits = logits.float()
        logits = (logits - logits.max()) / self.temperature  # the largest becomes 0: no overflow at tiny temperatures
        weight = logits.exp()
        k = min(self.top_k or len(logits), len(logits))
        if k == len(logits) and self.top_p >= 1:
            return torch.arange(len(logits)), weight / weight.sum()
        ids = _largest(logits, min(k, CANDIDATES))
        if k > len(ids) and (self.top_k or float(weight[ids].sum() / weight.sum()) < self.top_p):
            ids = _largest(logits, k)
        p = weight[ids] / (weight[ids].sum() if self.top_k else weight.sum())
        p = p[p.cumsum(0) - p < self.top_p] if self.top_p < 1 else p  # the first always stays
        return ids[: len(p)], p / p.sum()


def _largest(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest, largest first; among equals the lowest ids."""
    if k == len(logits):
        return logits.argsort(descending=True, stable=True)
    candidates = (logits >= logits.topk(k).values[-1]).nonzero()[:, 0]
    return candidates[logits[candidates].argsort(descending=True, stable=True)[:k]]
