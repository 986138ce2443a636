"""How far a compressed model's predictions are from the original's, token by token.

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v)),  p the reference, q the model
    top-1 agreement = share of tokens where both put the same token first
    relative logit difference = max over tokens of  max_v |l_q - l_p| / max_v |l_p|

KL and agreement separate methods with fewer tokens than perplexity does (ptq_mixed section 26). One window of
logits of each model is held at a time.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import ModelError
from lowbit.evaluate._model import Progress, check_fits, logits_of, measuring, row_chunks
from lowbit.evaluate.windows import as_stream, plan_windows


@dataclass(frozen=True)
class CompareResult:
    kl: float  # nats per token, >= 0 up to rounding
    kl_stderr: float  # tokens as independent
    top1_agreement: float  # 0 to 1; of equal logits the lowest token id counts
    max_relative_logit_difference: float
    perplexity: float  # of the model on these windows, GPTQ protocol
    reference_perplexity: float
    windows: int
    tokens: int  # positions compared: all of every window
    context: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    model: Any, reference: Any, windows: Any, context: int = 512, progress: Progress | None = None
) -> CompareResult:
    """Compare `model` with `reference` on windows (n, length), or on a stream (n,) cut every `context` tokens.

    progress: called as progress(windows done, windows in all). Raises DataError, and ModelError where the two
    vocabularies differ or logits are not finite.
    """
    stream, context = as_stream(windows, context)
    spans = plan_windows(len(stream), context)
    for m in (model, reference):
        check_fits(m, stream, context)
    totals = torch.zeros(6, dtype=torch.float64)
    worst = 0.0
    started = time.perf_counter()
    with measuring(model, reference):
        for done, span in enumerate(spans, 1):
            ids = stream[span.start : span.end]
            logits_q, logits_p = logits_of(model, ids[None])[0], logits_of(reference, ids[None])[0]
            sums, difference = compare_logits(logits_q, logits_p.to(logits_q.device), ids)
            if not torch.isfinite(sums).all():
                raise ModelError(f"window {done - 1}: logits are NaN or infinite. Check the weights of both models.")
            totals, worst = totals + sums, max(worst, difference)
            if progress is not None:
                progress(done, len(spans))
    kl, squares, same, nll_q, nll_p, n = totals.tolist()
    scored = n - len(spans)  # the last position of a window predicts a token outside it
    return CompareResult(
        kl=kl / n,
        kl_stderr=math.sqrt(max(0.0, squares / n - (kl / n) ** 2) / max(n - 1, 1)),
        top1_agreement=same / n,
        max_relative_logit_difference=worst,
        perplexity=math.exp(min(nll_q / scored, 709.0)),
        reference_perplexity=math.exp(min(nll_p / scored, 709.0)),
        windows=len(spans),
        tokens=int(n),
        context=context,
        seconds=time.perf_counter() - started,
    )


def compare_logits(logits_q: Tensor, logits_p: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """Sums over one window, ids (n,), logits (n, vocabulary) each, and the largest relative logit difference.

    Sums, (6,) float64: KL, KL squared, equal top tokens, NLL of the model, NLL of the reference, positions.
    """
    if logits_q.shape != logits_p.shape:
        raise ModelError(
            f"the model's logits are {tuple(logits_q.shape)}, the reference's {tuple(logits_p.shape)}: "
            "they have different vocabularies. Compare a model with the one it was made from."
        )
    n = len(ids)
    following = torch.cat([ids[1:], ids[:1]]).to(logits_q.device)
    totals, worst = torch.zeros(6, dtype=torch.float64), 0.0
    for rows in row_chunks(*logits_p.shape):
        q, p = logits_q[rows].float(), logits_p[rows].float()
        size = p.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float(((q - p).abs().amax(1) / size).max()))
        same = (q.argmax(1) == p.argmax(1)).sum()
        q, p = q.log_softmax(1), p.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1).double()
        scored = slice(0, min(rows.stop, n - 1) - rows.start)
        target = following[rows][scored, None]
        nll_q, nll_p = (-t[scored].gather(1, target).double().sum() for t in (q, p))
        sums = [kl.sum(), kl.square().sum(), same.double(), nll_q, nll_p, kl.new_tensor(len(kl))]
        totals += torch.stack(sums).cpu()
    return totals, worst
