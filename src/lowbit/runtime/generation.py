"""Text from a causal language model, streamed: one prefill, then one token a step through the key-value cache.

    prompts -> ids -> engine -> logits of the next token -> sampler -> id -> detokenizer -> stop strings -> text
                        ^ key-value cache, one token a step            |
                        '----------------------------------------------'

The engine is the native loop for packed models it covers (`native.why_not`), else the model's own forward with its own
cache object; several prompts advance together. Pieces are cut where whole characters end: joined, they are the text,
and no piece holds half a character. Times are those of the engine and the sampling, not of whoever consumes the stream.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowbit._threads import one_thread
from lowbit.errors import ModelError, RecipeError
from lowbit.runtime.engines import ModuleEngine, NativeEngine, pick
from lowbit.runtime.prompts import check_model, check_text, encode_prompt, eos_ids, room, wants_chat
from lowbit.runtime.sampling import Sampler
from lowbit.runtime.text_stream import Detokenizer, StopStrings


@dataclass(frozen=True)
class GenerationResult:
    text: str  # all pieces joined; without the stop string that ended it
    prompt_tokens: int  # chat template and BOS included
    new_tokens: int  # everything the model produced, the end token included
    prefill_seconds: float  # reading the prompt (of a batch: all prompts) and choosing the first token
    decode_seconds: float  # the tokens after the first, while this text was going on
    prefill_tokens_per_second: float  # prompt_tokens / prefill_seconds; 0 where nothing ran
    decode_tokens_per_second: float  # (new_tokens - 1) / decode_seconds; 0 where nothing ran
    finish_reason: str  # "eos", "stop" (a stop string), "length" (max_new_tokens), "context" (model is full), "closed"
    token_ids: tuple[int, ...]  # the new tokens
    engine: str  # "native" or "module"
    note: "str | None"  # why not native

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


class Batch:
    """Iterate over it for (number of the prompt, piece of text) as they come; `results()` runs what is left."""

    def __init__(self, model: Any, texts: "list[_Text]", engine: "tuple[str, str | None]", **options: Any) -> None:
        self._model, self._texts, self._options = model, texts, options
        self.engine, self.note = engine
        self._stream = self._run()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        number, piece = next(self._stream)
        self._texts[number].pieces.append(piece)
        return number, piece

    def close(self) -> None:
        """End early; `results()` then tells what there is so far, with finish_reason "closed"."""
        self._stream.close()

    def results(self) -> list[GenerationResult]:
        for _ in self:
            pass
        return [text.result(self.engine, self.note) for text in self._texts]

    def _run(self) -> Generator[tuple[int, str], None, None]:
        engine = self._start()
        while going := [(n, t) for n, t in enumerate(self._texts) if t.going]:
            started = time.perf_counter()
            logits = engine.read([(n, t.unread) for n, t in going])
            with one_thread():
                if logits.isnan().any():
                    raise ModelError(
                        "the model's logits are NaN. Check its weights (lowbit inspect), or run it in float32."
                    )
                tokens = [t.sampler(row) for (_, t), row in zip(going, logits)]
            seconds = time.perf_counter() - started
            for (number, text), token in zip(going, tokens):
                if piece := text.add(token, seconds):
                    yield number, piece

    def _start(self) -> Any:
        if self.engine == "module":
            return ModuleEngine(self._model, len(self._texts), self._options["cache"])
        return NativeEngine(self._model, [t.capacity for t in self._texts], self._options["kv_bits"])


class Generation:
    """A batch of one. Iterate for pieces of text as they come; `result()` runs what is left and tells how it went."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.engine, self.note = batch.engine, batch.note

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._batch)[1]

    def close(self) -> None:
        """End early; `result()` then tells what there is so far, with finish_reason "closed"."""
        self._batch.close()

    def result(self) -> GenerationResult:
        return self._batch.results()[0]


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 128, **options: Any) -> Generation:
    """Stream an answer to `prompt`: `for piece in generate(...)`, then `.result()` on what generate returned.

    Options, errors and everything else as `generate_batch`, which takes several prompts.
    """
    return Generation(generate_batch(model, tokenizer, [prompt], max_new_tokens, **options))


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
    stop: str | Iterable[str] | None = None,
    cache: bool = True,
    kv_bits: int = 32,
    engine: str = "auto",
) -> Batch:
    """Stream answers to several prompts of any lengths, which go through the model together.

    temperature: 0 = greedy. top_k: 0 = all tokens. top_p: 1 = all tokens. seed: of the draws, on the CPU; the same for
            every prompt, so that an answer does not depend on its neighbours.
    chat:   True puts the prompt into the tokenizer's chat template, False continues it as plain text, None uses the
            template if there is one. system: a system message before it, for templates that know such.
    stop:   text that ends the answer; it is not part of it.
    cache:  False reads everything again at every step: slow, for checking.
    kv_bits: 32 keeps keys and values exact; 8 rounds each to int8, a quarter of the memory (native loop only).
    engine: "auto" is the native loop where it can run, else "module", the model's own forward.

    An empty prompt starts from BOS (or EOS, for models without BOS). An answer ends early when the model's context is
    full. Everything is checked here, before the first piece; the model runs when the pieces are asked for.
    Raises DataError (prompt too long, no template, foreign tokenizer), RecipeError (options), ModelError (not a
    generator, NaN logits).
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    if not prompts:
        raise RecipeError("no prompt was given. Give one or more.")
    check_text(*prompts, system or "")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if "" in stops:
        raise RecipeError("an empty stop string would end every answer at once. Leave it out.")
    check_model(model)
    picked = pick(model, engine, cache, kv_bits)
    chat, ends = wants_chat(tokenizer, chat, system), eos_ids(model, tokenizer)
    texts = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, model, prompt, chat, system)
        sampler, words = Sampler(temperature, top_k, top_p, seed), Detokenizer(tokenizer, () if chat else ids[-8:])
        texts.append(_Text(ids, max_new_tokens, room(model, ids), ends, sampler, words, StopStrings(stops)))
    return Batch(model, texts, picked, cache=cache, kv_bits=kv_bits)


class _Text:
    """One prompt and its answer so far. Keeps the ids, the times and why it ended (`reason`)."""

    def __init__(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        room: int | None,
        eos_ids: frozenset[int],
        sampler: Sampler,
        detokenizer: Detokenizer,
        stop: StopStrings,
    ) -> None:
        self.prompt_ids, self.eos_ids, self.sampler = prompt_ids, eos_ids, sampler
        # the last token of an answer is never read again, so one more fits than the context has room for
        self.limit = max_new_tokens if room is None else min(max_new_tokens, room + 1)
        self.full = "length" if self.limit == max_new_tokens else "context"
        self.reason = "closed" if self.limit else self.full
        self.going = self.limit > 0
        self.new_ids: list[int] = []
        self.pieces: list[str] = []
        self.prefill_seconds = self.decode_seconds = 0.0
        self._detokenizer, self._stop = detokenizer, stop

    @property
    def capacity(self) -> int:
        """Tokens the cache must hold."""
        return len(self.prompt_ids) + self.limit

    @property
    def unread(self) -> list[int]:
        return self.new_ids[-1:] or self.prompt_ids

    def add(self, token: int, seconds: float) -> str:
        """The text that a new token completes. Ends the answer where it ends."""
        if self.new_ids:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        self.new_ids.append(token)
        ended = "eos" if token in self.eos_ids else self.full if len(self.new_ids) >= self.limit else ""
        piece = self._stop.add("" if token in self.eos_ids else self._detokenizer.add(token))
        if ended and not self._stop.found:
            piece += self._stop.add(self._detokenizer.flush())
            piece += "" if self._stop.found else self._stop.flush()
        if ended or self._stop.found:
            self.going, self.reason = False, "stop" if self._stop.found else ended
        return piece

    def result(self, engine: str, note: "str | None") -> GenerationResult:
        n = len(self.new_ids)
        return GenerationResult(
            text="".join(self.pieces),
            prompt_tokens=len(self.prompt_ids),
            new_tokens=n,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            prefill_tokens_per_second=len(self.prompt_ids) / self.prefill_seconds if self.prefill_seconds else 0.0,
            decode_tokens_per_second=(n - 1) / self.decode_seconds if self.decode_seconds else 0.0,
            finish_reason=self.reason,
            token_ids=tuple(self.new_ids),
            engine=engine,
            note=note,
        )


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
