"""From text to scored windows: what each evaluation protocol reads and which tokens it scores.

A stream is one text tokenised once: BOS stands where the tokenizer puts it (usually the very start) and nowhere else.

    gptq        windows [0,L) [L,2L) ..., remainder dropped; tokens 1..L-1 of each scored
    sliding     gptq with stride S < L: windows start every S tokens, the last one may be shorter; each scores what no
                window before it scored, so every token but the first of the text is scored exactly once
    llama.cpp   windows as gptq, but the first token of each is replaced by BOS and only tokens L//2+1..L-1 are scored

Source: ptq_mixed section 26; GPTQ's evaluation, HQQ's script and llama.cpp's perplexity tool, as described there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError, RecipeError, near_names

PROTOCOLS = ("gptq", "llama.cpp")


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of the stream make one window; its tokens from index `scored` (>= 1) on are scored."""

    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.scored


def tokenize(text: str, tokenizer: Any, special: bool = True) -> Tensor:
    """The whole text as one stream of ids, (n,) int64. special=False leaves out BOS, [CLS] and the like."""
    out = tokenizer(text, add_special_tokens=special, verbose=False)
    return torch.tensor(out["input_ids"], dtype=torch.int64)


def plan_windows(n: int, context: int, stride: int | None = None, protocol: str = "gptq") -> list[Span]:
    """The windows of a stream of n tokens. stride None or equal to context: non-overlapping, remainder dropped.

    Raises DataError if not even one window fits, RecipeError for options that contradict each other.
    """
    check_options(context, stride, protocol)
    if n < context:
        raise DataError(
            f"the text has {n} tokens and one window needs {context}: give a longer text"
            + (f", or context={n} (--context {n})." if n >= 3 else ".")
        )
    first = context // 2 + 1 if protocol == "llama.cpp" else 1
    if stride is None or stride == context:
        return [Span(i, i + context, first) for i in range(0, n - context + 1, context)]
    spans = [Span(0, context, 1)]
    while spans[-1].end < n:
        start, end = spans[-1].start + stride, min(spans[-1].end + stride, n)
        spans.append(Span(start, end, spans[-1].end - start))
    return spans


def check_options(context: int, stride: int | None, protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise RecipeError(f"protocol={protocol!r} is unknown. {near_names(protocol, PROTOCOLS)}")
    if context < 3:
        raise RecipeError(f"context={context} leaves nothing to predict. Try context=512.")
    if stride is None:
        return
    if protocol == "llama.cpp" and stride != context:
        raise RecipeError("the llama.cpp protocol has no stride. Leave stride out, or use protocol='gptq'.")
    if not 1 <= stride <= context:
        raise RecipeError(
            f"stride={stride} must lie between 1 and context={context}: a longer one would skip tokens. "
            f"Leave it out for non-overlapping windows, or try stride={context // 2}."
        )


def as_stream(ids: Any, context: int) -> tuple[Tensor, int]:
    """(stream (n,) int64 on the CPU, context) from a 1-D stream or from 2-D windows, whose width is the context."""
    t = torch.as_tensor(ids)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.ndim not in (1, 2):
        raise DataError(
            f"token ids must be whole numbers, as a stream (n,) or as windows (n, context); "
            f"got {t.dtype} of shape {tuple(t.shape)}. Tokenise the text first."
        )
    if t.numel() == 0:
        raise DataError("the text is empty: it has 0 tokens. Give a text of at least one window.")
    if int(t.min()) < 0:
        raise DataError(f"token id {int(t.min())} is negative: labels or padding were given instead of token ids.")
    return t.reshape(-1).to("cpu", torch.int64), t.shape[1] if t.ndim == 2 else context
