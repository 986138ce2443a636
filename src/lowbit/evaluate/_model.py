"""Calling a model for measurement: evaluation mode and back, its device, and logits with nothing extra computed."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import DataError, ModelError

Progress = Callable[[int, int], object]  # progress(done, total), called after each window or batch

CHUNK = 1 << 22  # logits turned to float32 at once: 16 MiB, whatever the vocabulary


@contextmanager
def measuring(*models: Any) -> Iterator[None]:
    """Dropout off and no gradients inside; afterwards every module is in the mode it was in."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    before = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in zip(modules, before, strict=True):
            m.training = training


def device_of(model: Any) -> torch.device:
    """Where the model lives: its first parameter, else its first buffer (all that packed layers have), else the CPU."""
    if isinstance(model, nn.Module):
        for group in (model.parameters(), model.buffers()):
            for t in group:
                return t.device
    return torch.device("cpu")


def logits_of(model: Any, ids: Tensor, keep: int = 0) -> Tensor:
    """Logits (batch, rows, vocabulary) of ids (batch, length) in the model's own dtype.

    keep: only the last `keep` rows are needed. A model that cannot restrict itself returns all rows, so index from
    the end. 0 asks for all. The model may return a tensor, a tuple starting with it, or an object with `.logits`.
    """
    wanted = {"use_cache": False, "logits_to_keep": keep}
    takes = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    out = model(ids.to(device_of(model)), **{k: v for k, v in wanted.items() if k in takes})
    out = getattr(out, "logits", out)
    logits = out[0] if isinstance(out, tuple) else out
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(
            f"{type(model).__name__} returned no logits of shape (batch, tokens, vocabulary). "
            "Load it with its language-model head, for example AutoModelForCausalLM."
        )
    return logits


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices over `rows` rows of logits, each of about CHUNK numbers."""
    step = max(1, CHUNK // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] per row, in float32 whatever dtype the logits have.

    logits: (n, vocabulary), targets: (n,) on any device; returns (n,) float64 on the CPU.
    Cost: one pass; float32 copies are CHUNK numbers at a time, never the whole logits.
    """
    targets = targets.to(logits.device)
    parts = []
    for rows in row_chunks(*logits.shape):
        chunk = logits[rows].float()
        picked = chunk.gather(1, targets[rows, None]).squeeze(1)
        parts.append((chunk.logsumexp(1) - picked).double().cpu())
    return torch.cat(parts)


def check_fits(model: Any, ids: Tensor, context: int) -> None:
    """DataError where ids or window length do not belong to this model. Models without a `config` are not checked."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and ids.numel() and int(ids.max()) >= vocabulary:
        raise DataError(
            f"token id {int(ids.max())} appears in the text, but the model has {vocabulary} tokens: "
            "this tokenizer belongs to another model. Give the tokenizer that came with the model."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0 and context > longest:
        raise DataError(
            f"context={context} is longer than the {longest} positions the model was made for. "
            f"Try context={longest} (--context {longest})."
        )
