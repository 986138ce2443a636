"""Perplexity of a causal language model over fixed windows.

    nll = sum over scored tokens of -log p(token | tokens before it in the window) / number of scored tokens
    perplexity = exp(nll)

Windows are of equal length except the last of a sliding run, so the mean over windows and the mean over tokens agree.
A figure means nothing without its context, stride, protocol and BOS: the result carries them.

Source: ptq_mixed section 26. Protocols and the tokens they score: see `lowbit.evaluate.windows`.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.evaluate._model import Progress, check_fits, logits_of, measuring, token_nll
from lowbit.evaluate.windows import Span, as_stream, plan_windows


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured, and under which protocol."""

    perplexity: float  # exp(nll); inf where that overflows
    nll: float  # mean over scored tokens, nats
    nll_stderr: float  # standard error taking tokens as independent, as llama.cpp prints it (times perplexity)
    nll_stderr_windows: float | None  # the same taking windows as independent, which is safer; None for one
    windows: int
    tokens: int  # scored
    context: int
    stride: int
    protocol: str  # "gptq", "llama.cpp" or "masked"
    bos: int | None  # the BOS id that was given, if any
    bos_count: int | None  # how often it stands in the windows as the model read them; None where bos is None
    seconds: float
    tokens_per_second: float  # tokens read by the model (scored or not) per second
    window_nll: tuple[float, ...]  # mean of each window, in order: subtract two models' for a paired comparison

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "window_nll": list(self.window_nll)}


def perplexity(
    model: Any,
    ids_or_windows: Any,
    context: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    batch: int = 1,
    protocol: str = "gptq",
    bos: int | bool | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of `model` on a token stream (n,), or on ready windows (n, context).

    stride:   None = context: windows side by side, remainder dropped. Smaller: sliding, every token scored once.
    windows:  at most so many windows, from the start of the text; None = all.
    batch:    windows per call of the model. Costs logits of batch * context * vocabulary; the figure does not change.
    protocol: "gptq" or "llama.cpp".
    bos:      BOS id. gptq: only counted, never inserted. llama.cpp: put at the start of the stream and over the first
              token of every window; bos=False says that this tokenizer adds none (llama.cpp then replaces nothing).
    progress: called as progress(windows done, windows in all).

    Works with any callable from ids (batch, length) to logits. Prints nothing; the model keeps its train/eval mode.
    Raises DataError (text too short, foreign token ids, context too long), RecipeError (options), ModelError (NaN).
    """
    stream, context = as_stream(ids_or_windows, context)
    ready = torch.as_tensor(ids_or_windows).ndim == 2
    if ready and stride not in (None, context):
        raise RecipeError("windows that are already cut have no stride. Give the uncut stream of ids to slide over.")
    bos_id = _bos_id(bos, protocol)
    if protocol == "llama.cpp" and bos_id is not None and not ready and int(stream[0]) != bos_id:
        stream = torch.cat([stream.new_tensor([bos_id]), stream])
    spans = _first(plan_windows(len(stream), context, stride, protocol), windows)
    check_fits(model, stream[: spans[-1].end], context)

    replaced = bos_id if protocol == "llama.cpp" else None
    sums: list[tuple[float, float, int]] = []
    started = time.perf_counter()
    with measuring(model):
        for group in batches(spans, batch):
            ids = _read(stream, group, replaced)
            for nll in _score(model, ids, group[0]):
                sums.append(window_sums(nll, len(sums)))
            if progress is not None:
                progress(len(sums), len(spans))
    seconds = time.perf_counter() - started
    count = None if bos_id is None else sum(int((_read(stream, [s], replaced) == bos_id).sum()) for s in spans)
    return summarize(
        sums,
        read=sum(s.length for s in spans),
        seconds=seconds,
        context=context,
        stride=stride or context,
        protocol=protocol,
        bos=bos_id,
        bos_count=count,
    )


def _bos_id(bos: int | bool | None, protocol: str) -> int | None:
    if bos is None and protocol == "llama.cpp":
        raise RecipeError(
            "the llama.cpp protocol replaces the first token of every window by BOS. "
            "Give bos=tokenizer.bos_token_id, or bos=False if this tokenizer adds none."
        )
    if bos is True:
        raise RecipeError("bos=True names no token. Give bos=tokenizer.bos_token_id.")
    return None if bos is None or bos is False else int(bos)


def _first(spans: list[Span], windows: int | None) -> list[Span]:
    if windows is not None and windows < 1:
        raise RecipeError(f"windows={windows} measures nothing. Give at least 1, or leave it out for all.")
    return spans[:windows]


def batches(spans: list[Span], batch: int) -> Iterator[list[Span]]:
    """Neighbouring spans of the same length and scored part, at most `batch` together."""
    if batch < 1:
        raise RecipeError(f"batch={batch} measures nothing. Try batch=1.")
    group: list[Span] = []
    for s in spans:
        if group and (len(group) == batch or s.shape != group[0].shape):
            yield group
            group = []
        group.append(s)
    if group:
        yield group


def _read(stream: Tensor, group: list[Span], replaced: int | None) -> Tensor:
    ids = torch.stack([stream[s.start : s.end] for s in group])
    if replaced is not None:
        ids[:, 0] = replaced
    return ids


def _score(model: Any, ids: Tensor, span: Span) -> Iterator[Tensor]:
    """NLL of the scored tokens, one float64 vector a window. Token t is predicted by logits row t-1."""
    keep = span.length - span.scored + 1
    logits = logits_of(model, ids, keep)
    for row, window in zip(logits, ids, strict=True):  # one window at a time: views, no copy of the logits
        yield token_nll(row[-keep:-1], window[span.scored :])


def window_sums(nll: Tensor, index: int) -> tuple[float, float, int]:
    """(sum, sum of squares, count) of one window. ModelError if the model computed NaN or infinity."""
    total, squares = float(nll.sum()), float(nll.square().sum())
    if not math.isfinite(total):
        raise ModelError(
            f"window {index}: the model's logits are NaN or infinite. Check its weights (lowbit inspect), "
            "or run it in float32."
        )
    return total, squares, len(nll)


def summarize(sums: list[tuple[float, float, int]], read: int, seconds: float, **protocol: Any) -> PerplexityResult:
    """Means and standard errors from the windows' sums. fsum is exact, so the order of windows cannot matter."""
    n = sum(count for _, _, count in sums)
    if n == 0:
        raise DataError("no token was scored: every window is empty. Give a longer text.")
    nll = math.fsum(total for total, _, _ in sums) / n
    variance = max(0.0, math.fsum(squares for _, squares, _ in sums) / n - nll * nll)
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 709 else math.inf,
        nll=nll,
        nll_stderr=math.sqrt(variance / max(n - 1, 1)),
        nll_stderr_windows=_stderr_of_windows(sums, nll, n),
        windows=len(sums),
        tokens=n,
        seconds=seconds,
        tokens_per_second=read / seconds if seconds > 0 else 0.0,
        window_nll=tuple(total / count for total, _, count in sums),
        **protocol,
    )


def _stderr_of_windows(sums: list[tuple[float, float, int]], nll: float, n: int) -> float | None:
    """Windows as clusters: sqrt(m/(m-1) * sum_w (total_w - count_w * nll)^2) / n."""
    m = len(sums)
    if m < 2:
        return None
    return math.sqrt(m / (m - 1) * math.fsum((total - count * nll) ** 2 for total, _, count in sums)) / n
