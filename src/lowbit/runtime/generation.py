"""Text from a causal language model, streamed: one prefill, then one token a step through the key-value cache.

    prompt -> ids -> model -> logits of the next token -> sampler -> id -> detokenizer -> stop strings -> piece of text
                       ^ key-value cache, one token a step                |
                       '--------------------------------------------------'

The model is any Hugging Face causal LM, packed or not; its own cache object (`past_key_values`) is handed back to it
as it came. Pieces are cut where whole characters end: joined, they are the text, and no piece holds half a character.
Times are those of the model and the sampling, not of whoever consumes the stream.
"""

import inspect
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.runtime.sampling import Sampler
from lowbit.runtime.text_stream import Detokenizer, StopStrings


@dataclass(frozen=True)
class GenerationResult:
    text: str  # all pieces joined; without the stop string that ended it
    prompt_tokens: int  # chat template and BOS included
    new_tokens: int  # everything the model produced, the end token included
    prefill_seconds: float  # reading the prompt and choosing the first token
    decode_seconds: float  # the tokens after the first
    prefill_tokens_per_second: float  # prompt_tokens / prefill_seconds; 0 where nothing ran
    decode_tokens_per_second: float  # (new_tokens - 1) / decode_seconds; 0 where nothing ran
    finish_reason: str  # "eos", "stop" (a stop string), "length" (max_new_tokens), "context" (model is full), "closed"
    token_ids: tuple[int, ...]  # the new tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


class Generation:
    """Iterate over it for pieces of text as they come; `result()` runs what is left and tells how it went."""

    def __init__(self, steps: "_Steps", detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._steps = steps
        self._pieces: list[str] = []
        self._reason = "closed"
        self._stream = self._run(detokenizer, StopStrings(stop))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._stream)
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """End early; `result()` then tells what there is so far, with finish_reason "closed"."""
        self._stream.close()

    def result(self) -> GenerationResult:
        for _ in self:
            pass
        s, n = self._steps, len(self._steps.new_ids)
        return GenerationResult(
            text="".join(self._pieces),
            prompt_tokens=len(s.prompt_ids),
            new_tokens=n,
            prefill_seconds=s.prefill_seconds,
            decode_seconds=s.decode_seconds,
            prefill_tokens_per_second=len(s.prompt_ids) / s.prefill_seconds if s.prefill_seconds else 0.0,
            decode_tokens_per_second=(n - 1) / s.decode_seconds if s.decode_seconds else 0.0,
            finish_reason=self._reason,
            token_ids=tuple(s.new_ids),
        )

    def _run(self, detokenizer: Detokenizer, stop: StopStrings) -> Generator[str, None, None]:
        for token in self._steps:
            piece = stop.add("" if token in self._steps.eos_ids else detokenizer.add(token))
            if piece:
                yield piece
            if stop.found:
                self._reason = "stop"
                return
        rest = stop.add(detokenizer.flush())
        rest = rest if stop.found else rest + stop.flush()
        self._reason = "stop" if stop.found else self._steps.reason
        if rest:
            yield rest


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
    stop: str | Iterable[str] | None = None,
    cache: bool = True,
) -> Generation:
    """Stream an answer to `prompt`: `for piece in generate(...)`, then `.result()` on what generate returned.

    temperature: 0 = greedy. top_k: 0 = all tokens. top_p: 1 = all tokens. seed: of the draws, on the CPU.
    chat:   True puts the prompt into the tokenizer's chat template, False continues it as plain text, None uses the
            template if there is one. system: a system message before it, for templates that know such.
    stop:   text that ends the answer; it is not part of it.
    cache:  False reads everything again at every step: slow, for checking.

    An empty prompt starts from BOS (or EOS, for models without BOS). The answer ends early when the model's context is
    full. Everything is checked here, before the first piece; the model runs when the pieces are asked for.
    Raises DataError (prompt too long, no template, foreign tokenizer), RecipeError (options), ModelError (not a
    generator, NaN logits).
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    _check_text(prompt, system or "")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if "" in stops:
        raise RecipeError("an empty stop string would end every answer at once. Leave it out.")
    _check_model(model)
    chat = _wants_chat(tokenizer, chat, system)
    prompt_ids = encode_prompt(tokenizer, model, prompt, chat, system)
    room = _room(model, prompt_ids)
    steps = _Steps(
        model,
        prompt_ids,
        max_new_tokens,
        room,
        eos_ids(model, tokenizer),
        Sampler(temperature, top_k, top_p, seed),
        cache,
    )
    return Generation(steps, Detokenizer(tokenizer, () if chat else prompt_ids[-8:]), stops)


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    if max_new_tokens < 0:
        raise RecipeError(f"max_new_tokens={max_new_tokens} is negative. Try max_new_tokens=128.")
    if not 0 <= temperature < float("inf"):
        raise RecipeError(f"temperature={temperature} must be 0 (greedy) or more. Try temperature=0.7.")
    if top_k < 0:
        raise RecipeError(f"top_k={top_k} is negative. Use top_k=0 for all tokens, or try top_k=50.")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p={top_p} must be above 0 and at most 1. Use top_p=1 for all tokens, or try top_p=0.9.")
    if not -(2**63) <= seed < 2**64:
        raise RecipeError(f"seed={seed} does not fit 64 bits. Try seed=0.")


def _check_text(*texts: str) -> None:
    """A terminal's bytes that are not UTF-8 arrive as surrogates, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8 text. Type it again, or set the terminal to UTF-8.") from None


def _check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (callable(can) and not can()):
        raise ModelError(
            f"{type(model).__name__} does not continue text: generation needs a decoder-only causal language model. "
            "Measure this model with `lowbit eval` instead."
        )


# ---------------------------------------------------------------- the prompt


def _wants_chat(tokenizer: Any, chat: bool | None, system: str | None) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise DataError("this tokenizer has no chat template. Leave chat out to continue the prompt as plain text.")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        why = "chat is off" if has_template else "this tokenizer has no chat template"
        raise DataError(f"a system message needs a chat template, and {why}. Put its text into the prompt instead.")
    return chat


def encode_prompt(tokenizer: Any, model: Any, prompt: str, chat: bool, system: str | None = None) -> list[int]:
    """Ids the model reads: the filled chat template, or the plain text with the tokenizer's own BOS. Never empty."""
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        return _fill_template(tokenizer, messages)
    ids = list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if ids:
        return ids
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, getattr(model, "config", None)):
            first = _as_ids(getattr(holder, name, None))
            if first:
                return [min(first)]
    raise DataError("the prompt is empty and this model has no token to start from. Give a prompt.")


def _fill_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the template, the answer's header included. transformers 4 returns a list, 5 a mapping: both are read."""
    from jinja2 import TemplateError

    try:
        out = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    except TemplateError as e:
        roles = " and ".join(m["role"] for m in messages)
        raise DataError(
            f"the chat template refuses messages of role {roles}: {e}. "
            "Put the system text into the prompt, or use chat=False."
        ) from e
    ids = out["input_ids"] if hasattr(out, "keys") else out
    ids = ids[0] if len(ids) and not isinstance(ids[0], int) else ids
    if not len(ids):
        raise DataError("the chat template turned the prompt into nothing. Give a prompt, or use chat=False.")
    return [int(i) for i in ids]


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: generation config, model config and tokenizer may each name one or several."""
    holders = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    return frozenset(i for h in holders for i in _as_ids(getattr(h, "eos_token_id", None)))


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple | set) else [int(value)]


def _room(model: Any, prompt_ids: list[int]) -> int | None:
    """How many tokens the model's context still takes after the prompt; None = no limit known."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and max(prompt_ids) >= vocabulary:
        raise DataError(
            f"the prompt has token id {max(prompt_ids)}, but the model has {vocabulary} tokens: "
            "this tokenizer belongs to another model. Give the tokenizer that came with the model."
        )
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return None
    if len(prompt_ids) > context:
        raise DataError(
            f"the prompt has {len(prompt_ids)} tokens, but the model reads at most {context}: "
            f"shorten it by {len(prompt_ids) - context} tokens or more."
        )
    return context - len(prompt_ids)


# ---------------------------------------------------------------- the model


class _Steps:
    """Iterator over new token ids. Keeps the ids, the times and why it ended (`reason`)."""

    def __init__(
        self,
        model: Any,
        prompt_ids: list[int],
        max_new_tokens: int,
        room: int | None,
        eos_ids: frozenset[int],
        sampler: Sampler,
        cache: bool,
    ) -> None:
        self.model, self.prompt_ids, self.eos_ids, self.sampler = model, prompt_ids, eos_ids, sampler
        # the last token of an answer is never read again, so one more fits than the context has room for
        self.limit = max_new_tokens if room is None else min(max_new_tokens, room + 1)
        self.reason = "length" if self.limit == max_new_tokens else "context"
        self.new_ids: list[int] = []
        self.prefill_seconds = self.decode_seconds = 0.0
        self._past: Any = None
        takes = inspect.signature(model.forward).parameters
        self._cached = cache and "past_key_values" in takes
        self._options = {k: v for k, v in {"use_cache": self._cached, "logits_to_keep": 1}.items() if k in takes}
        self._device = next((t.device for g in (model.parameters(), model.buffers()) for t in g), torch.device("cpu"))

    def __iter__(self) -> Iterator[int]:
        while len(self.new_ids) < self.limit:
            started = time.perf_counter()
            token = self.sampler(self._next_logits())
            seconds = time.perf_counter() - started
            if self.new_ids:
                self.decode_seconds += seconds
            else:
                self.prefill_seconds = seconds
            self.new_ids.append(token)
            if token in self.eos_ids:
                self.reason = "eos"
            yield token
            if self.reason == "eos":
                return

    @torch.no_grad()
    def _next_logits(self) -> Tensor:
        """Logits (vocabulary,) of the next token; reads only the last token where there is a cache."""
        unread = self.new_ids[-1:] if self._past is not None else self.prompt_ids + self.new_ids
        ids = torch.tensor([unread], device=self._device)
        past = {"past_key_values": self._past} if self._cached else {}
        with _evaluating(self.model):
            out = self.model(ids, **past, **self._options)
        if self._cached:
            self._past = getattr(out, "past_key_values", None)
        logits = out.logits[0, -1].float().cpu()
        if logits.isnan().any():
            raise ModelError("the model's logits are NaN. Check its weights (lowbit inspect), or run it in float32.")
        return logits


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
