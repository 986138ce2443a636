"""Choosing the next token.

    logits -> / temperature -> keep the top_k largest -> keep the smallest set with probability >= top_p -> draw
    temperature 0 is greedy: the largest logit, no randomness; so is one that float32 takes for 0

Source of top-p: Holtzman et al. 2019 (arXiv:1904.09751), section 3.1.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


class Sampler:
    """Logits (vocabulary,) -> token id. Same options, seed and logits: same tokens, on every machine's CPU."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        if self.temperature < TINY:
            return int(logits.argmax())
        p = self.probabilities(logits)
        return int(torch.multinomial(p, 1, generator=self.generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (vocabulary,) float32, summing to 1. Ties at an edge keep the lowest ids."""
        logits = logits.float()
        logits = (logits - logits.max()) / self.temperature  # the largest becomes 0: no overflow at tiny temperatures
        order = logits.argsort(descending=True, stable=True)
        p = logits[order].softmax(0)
        if 0 < self.top_k < len(p):
            p[self.top_k :] = 0
            p /= p.sum()
        if self.top_p < 1:
            before = p.cumsum(0) - p  # probability of everything likelier: the first always stays
            p[before >= self.top_p] = 0
        return torch.zeros_like(p).scatter_(0, order, p / p.sum())
