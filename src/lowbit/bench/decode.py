"""Tokens a second of a language model: the native loop, the model's own forward, and llama.cpp beside them.

prefill   a prompt of `prompt` tokens read at once        decode   one token at a time after it
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.bench import rivals
from lowbit.bench.timing import ROUNDS, threads
from lowbit.runtime import set_activations
from lowbit.runtime.engines import ModuleEngine, NativeEngine, pick

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """One way to run a model: `prefill(ids)` starts anew, `decode(count)` goes on."""

    what: str
    activations: "str | None"
    kv_bits: "int | None"
    start: Callable[[int], tuple[Callable[[list[int]], object], Callable[[int], object]]]  # threads -> prefill, decode


def bench_decode(
    model: Any,
    against: Any = None,
    gguf: Sequence[Path] = (),
    thread_counts: Sequence[int] = (1,),
    prompt: int = 256,
    tokens: int = 64,
    kv_bits: Sequence[int] = (32,),
    activations: Sequence[str] = ("int8", "float"),
    module: bool = True,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """{"rows": [...]}: one a candidate and thread count; keys in docs/json.md.

    model: packed. against: the float model, or None. gguf: files for llama-cpp-python, left out where that is absent.
    Every figure is the best of ROUNDS turns, candidates in turn: on a shared machine the best is what code can do.
    """
    ids = torch.randint(5, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    candidates = _candidates(model, against, gguf, prompt + tokens + 1, kv_bits, activations, module)
    rows = []
    for i, count in enumerate(thread_counts):
        with threads(count):
            best: dict[int, tuple[float, float]] = {}
            for turn in range(ROUNDS):
                for j, c in enumerate(candidates):
                    if progress is not None:
                        done = (i * ROUNDS + turn) * len(candidates) + j
                        progress(done, len(thread_counts) * ROUNDS * len(candidates), c.what)
                    now = _measure(c, count, ids, tokens)
                    old = best.get(j, now)
                    best[j] = (min(old[0], now[0]), min(old[1], now[1]))
            rows += [_row(c, count, prompt, tokens, *best[j]) for j, c in enumerate(candidates)]
    return {"rows": _with_ratios(rows)}


def _measure(c: Candidate, count: int, ids: list[int], tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, seconds of a token (the median of four stretches)."""
    prefill, decode = c.start(count)
    prefill(ids[:8])  # buffers and thread pools come to life
    started = time.perf_counter()
    prefill(ids)
    first = time.perf_counter() - started
    stretch, times = max(1, tokens // 4), []
    for _ in range(4):
        started = time.perf_counter()
        decode(stretch)
        times.append((time.perf_counter() - started) / stretch)
    return first, sorted(times)[1]


def _candidates(
    model: Any, against: Any, gguf: Sequence[Path], capacity: int, kv_bits: Sequence[int], activations: Sequence[str],
    module: bool,
) -> list[Candidate]:  # fmt: skip
    out = []
    native, _ = pick(model, "auto", True, 32)
    for how in activations:
        if native == "native":
            out += [Candidate("native", how, b, _lowbit(model, how, capacity, b)) for b in kv_bits]
        if module:
            out.append(Candidate("module", how, None, _lowbit(model, how, capacity, None)))
    if against is not None:
        out.append(Candidate("transformers", None, None, _lowbit(against, None, capacity, None)))
    if rivals.installed("llama_cpp"):
        out += [Candidate(f"llama.cpp {path.name}", None, None, _llama(path, capacity)) for path in gguf]
    return out


def _lowbit(model: Any, activations: "str | None", capacity: int, kv_bits: "int | None") -> Callable:
    """kv_bits None is the model's own forward."""

    def start(count: int) -> tuple[Callable[[list[int]], object], Callable[[int], object]]:
        if activations is not None:
            set_activations(model, activations)
        engine: list[Any] = []

        def prefill(ids: list[int]) -> None:
            new = ModuleEngine(model, 1, True) if kv_bits is None else NativeEngine(model, [capacity], kv_bits)
            engine[:] = [new]
            new.read([(0, ids)])

        def decode(tokens: int) -> None:
            for i in range(tokens):
                engine[0].read([(0, [i % model.config.vocab_size])])

        return prefill, decode

    return start


def _llama(path: Path, capacity: int) -> Callable:
    def start(count: int) -> tuple[Callable[[list[int]], object], Callable[[int], object]]:
        rival = rivals.Llama(path, count, capacity)
        return rival.prefill, rival.decode

    return start


def _row(c: Candidate, count: int, prompt: int, tokens: int, first: float, each: float) -> dict[str, Any]:
    return {
        "op": "decode", "what": c.what, "activations": c.activations, "kv_bits": c.kv_bits, "threads": count,
        "prompt": prompt, "tokens": tokens, "ms": 1000 * each, "prefill_tokens_per_second": prompt / first,
        "decode_tokens_per_second": 1 / each,
    }  # fmt: skip


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside llama.cpp's first file at the same number of threads."""
    for row in rows:
        other = next((r for r in rows if r["what"].startswith("llama.cpp") and r["threads"] == row["threads"]), None)
        for key in ("prefill", "decode"):
            name = f"{key}_tokens_per_second"
            row[f"{key}_against_llama_cpp"] = other and row[name] / other[name]
    return rows
