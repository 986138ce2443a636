"""What turns ids into logits during generation: the native loop, or the model's own forward.

    engine.read([(0, [5, 6, 7]), (1, [8])])     text 0 goes on with three tokens, text 1 with one
    -> logits (2, vocabulary) float32: of the token after each

`pick` takes the native loop for packed models it covers and the model's forward for all others; the note says why.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.runtime.layers import PackedLinear
from lowbit.runtime.native import KV_BITS, NativeDecoder, why_not

ENGINES = ("auto", "native", "module")
PREFILL_ROWS = 512  # tokens read at once: bounds the memory of a long prompt
Unread = Sequence[tuple[int, Sequence[int]]]


class NativeEngine:
    """The C++ loop; all texts of a call go through the weights together."""

    name = "native"

    def __init__(self, model: Any, capacities: Sequence[int], kv_bits: int) -> None:
        self.decoder = NativeDecoder(model)
        self.cache = self.decoder.cache(len(capacities), max(capacities), kv_bits)

    def read(self, unread: Unread) -> Tensor:
        rows = [(token, text) for text, ids in unread for token in ids]
        ends, seen = [], 0
        for _, ids in unread:
            seen += len(ids)
            ends.append(seen - 1)
        parts = []
        for first in range(0, len(rows), PREFILL_ROWS):
            part = rows[first : first + PREFILL_ROWS]
            wanted = [e - first for e in ends if first <= e < first + len(part)]
            parts.append(self.decoder.forward(self.cache, [t for t, _ in part], [s for _, s in part], wanted))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ModuleEngine:
    """The model's own forward and cache object; texts one after the other. Without a cache everything is read again."""

    name = "module"

    def __init__(self, model: Any, texts: int, cache: bool) -> None:
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self._cached = cache and "past_key_values" in takes
        self._options = {k: v for k, v in {"use_cache": self._cached, "logits_to_keep": 1}.items() if k in takes}
        self._device = next((t.device for g in (model.parameters(), model.buffers()) for t in g), torch.device("cpu"))
        self._past: list[Any] = [None] * texts
        self._read: list[list[int]] = [[] for _ in range(texts)]

    def read(self, unread: Unread) -> Tensor:
        return torch.stack([self._one(text, list(ids)) for text, ids in unread])

    @torch.no_grad()
    def _one(self, text: int, ids: list[int]) -> Tensor:
        self._read[text] += ids
        known = self._past[text] is not None
        batch = torch.tensor([ids if known else self._read[text]], device=self._device)
        past = {"past_key_values": self._past[text]} if self._cached else {}
        with _evaluating(self.model):
            out = self.model(batch, **past, **self._options)
        if self._cached:
            self._past[text] = getattr(out, "past_key_values", None)
        return out.logits[0, -1].float().cpu()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside, every module's mode restored after. Free for a model that is in eval mode already."""
    modules = [m for m in model.modules() if m.training] if model.training else []
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m in modules:
            m.training = True


def pick(model: Any, word: str, cache: bool, kv_bits: int) -> "tuple[str, str | None]":
    """("native" or "module", why not native or None). Raises RecipeError where what was asked for cannot be had."""
    if word not in ENGINES:
        raise RecipeError(f"engine={word!r} is unknown. Use one of {', '.join(ENGINES)}.")
    if kv_bits not in KV_BITS:
        raise RecipeError(f"kv_bits={kv_bits} is unknown. Use 32 (exact) or 8.")
    why = "cache=False was asked for" if not cache else "engine='module' was asked for" if word == "module" else None
    why = why or why_not(model)
    if why and word == "native":
        raise RecipeError(f"the native loop cannot run here: {why}. Leave engine out.")
    packed = any(isinstance(m, PackedLinear) for m in model.modules()) if hasattr(model, "modules") else False
    if why is None and word == "auto" and not packed:
        why = "no linear layer is packed"
    if why and kv_bits != 32:
        raise RecipeError(f"kv_bits={kv_bits} needs the native loop, which cannot run here: {why}. Leave kv_bits out.")
    return ("module", why) if why else ("native", None)
