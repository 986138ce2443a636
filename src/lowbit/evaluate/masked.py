"""Pseudo-perplexity of a masked language model (BERT and its kin): how well it restores hidden tokens.

    hide round(fraction * L) tokens of each window, all at once, each replaced by the mask token
    pseudo-perplexity = exp(mean over hidden tokens of -log p(token | the window with its holes))

Which tokens are hidden depends on the seed and the window's own tokens, not on its place in the text, the batch or
the model: two models are asked the same questions. Hiding one token at a time would be the exact pseudo-likelihood
(Salazar et al. 2020, arXiv:1910.14659) at L times the cost; this is the training objective's form (Devlin et al. 2018,
arXiv:1810.04805, without its 10% random and 10% kept tokens). Compare figures of equal fraction and seed only.
"""

import time
import zlib
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.evaluate._model import Progress, check_fits, logits_of, measuring, token_nll
from lowbit.evaluate.perplexity import PerplexityResult, _first, batches, summarize, window_sums
from lowbit.evaluate.windows import as_stream, plan_windows


def hidden_places(window: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices of the hidden tokens of one window (L,): max(1, round(fraction * L)) of them, none twice."""
    key = zlib.crc32(window.numpy().tobytes(), seed & 0xFFFFFFFF)
    order = torch.randperm(len(window), generator=torch.Generator().manual_seed(key))
    return order[: max(1, round(fraction * len(window)))].sort().values


def pseudo_perplexity(
    model: Any,
    ids_or_windows: Any,
    mask_id: int,
    context: int = 512,
    windows: int | None = None,
    batch: int = 1,
    fraction: float = 0.15,
    seed: int = 0,
    cls_id: int | None = None,
    sep_id: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Pseudo-perplexity on a stream (n,) tokenised without special tokens, or on windows (n, length) without them.

    cls_id, sep_id: put before and after each window, never hidden. context counts them, so a window of the stream has
    context - (how many are given) tokens. Ready windows keep their width and become longer by as many.
    progress: called as progress(windows done, windows in all). Raises as `perplexity` does.
    """
    if not 0 < fraction <= 1:
        raise RecipeError(f"fraction={fraction} must be above 0 and at most 1. Try fraction=0.15.")
    before = torch.tensor([i for i in (cls_id,) if i is not None], dtype=torch.int64)
    after = torch.tensor([i for i in (sep_id,) if i is not None], dtype=torch.int64)
    extra = len(before) + len(after)
    stream, body = as_stream(ids_or_windows, context - extra)
    spans = _first(plan_windows(len(stream), body), windows)
    check_fits(model, torch.cat([stream, before, after, torch.tensor([mask_id])]), body + extra)

    sums: list[tuple[float, float, int]] = []
    started = time.perf_counter()
    with measuring(model):
        for group in batches(spans, batch):
            bodies = [stream[s.start : s.end] for s in group]
            places = [hidden_places(b, fraction, seed) for b in bodies]
            ids = torch.stack([torch.cat([before, b.index_fill(0, p, mask_id), after]) for b, p in zip(bodies, places)])
            for row, b, p in zip(logits_of(model, ids), bodies, places):
                nll = token_nll(row[(p + len(before)).to(row.device)], b[p])
                sums.append(window_sums(nll, len(sums)))
            if progress is not None:
                progress(len(sums), len(spans))
    return summarize(
        sums,
        read=len(spans) * (body + extra),
        seconds=time.perf_counter() - started,
        context=body + extra,
        stride=body,
        protocol="masked",
        bos=None,
        bos_count=None,
    )
