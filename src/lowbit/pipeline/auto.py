"""Compressing to a goal: probe, choose, compress, measure; again with what was learned where a quality goal was missed.

    OUT.partial/                     the probe's pieces: the probe is not repeated when the run is typed again
    OUT.partial/work-1/ try-1/       blocks and artifact of the first try, then work-2/ try-2/ ...

The expected loss is a model's opinion (see `probe` and `goals`); what was got is measured on windows of the calibration
text that neither probe nor solver saw, against the float model on the same windows.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.evaluate import perplexity
from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.pipeline.blocks import layer_matrix, linear_layers
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.goals import Goals, Search, choose, embedding_menu, menu
from lowbit.pipeline.probe import FLOAT, Option, Prober
from lowbit.pipeline.stream import Progress, Walk
from lowbit.recipe import Recipe
from lowbit.solvers import find
from lowbit.sources import ModelSource
from lowbit.statistics import GramAccumulator

PROBE_WINDOWS, FIT_WINDOWS = 4, 8
HELD_WINDOWS = 8
TRIES = 3
MARGIN = 0.9  # of a quality goal, for the first try
MEASURED_SHARE = 0.75  # of the probe's prediction: solvers of a real run see more text and mend each other's errors

Once = Callable[[Recipe, Path, Path], dict[str, Any]]  # (recipe, artifact folder, work folder) -> its manifest


def split_windows(all_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probe, solvers', held-out) windows: of the calibration's `ids` twice, and those of `all_ids` that are not there.

    A text too short for all gives its last calibration windows as held-out ones. Raises DataError for fewer than two.
    """
    if len(ids) < 2:
        raise DataError("choosing formats needs at least two windows of calibration text: --windows 2 or more.")
    known = {tuple(row) for row in ids.tolist()}
    rest = [row for row in all_ids if tuple(row.tolist()) not in known]
    held = torch.stack(rest) if rest else ids[-max(1, len(ids) // 4) :]
    order = torch.linspace(0, len(ids) - 1, min(PROBE_WINDOWS + FIT_WINDOWS, len(ids))).round().long()
    n = max(1, len(order) // 3)
    mine = torch.zeros(len(order), dtype=torch.bool)
    mine[torch.linspace(0, len(order) - 1, n).round().long()] = True
    return ids[order[mine]], ids[order[~mine]], held


def compress_to(
    goals: Goals,
    base: Recipe,
    source: ModelSource,
    windows: tuple[Tensor, Tensor, Tensor],
    store: FolderStore,
    once: Once,
    say: Progress,
    search: Search,
) -> tuple[Path, dict[str, Any]]:
    """(folder of the artifact, what was chosen, expected and measured). See the module's text.

    windows: from `split_windows`; once: compresses by a recipe
    Raises BudgetError where a goal is out of reach.
    """
    walk = Walk(source, FLOAT, MemoryStore(), None, say)
    shapes = [tuple(layer_matrix(m).shape) for m in linear_layers(walk.blocks[0]).values()]
    options = menu([w for _, w in shapes], search.method, search.group, fast=goals.latency is not None)
    embedding = walk.embedding()
    width = layer_matrix(walk.model.get_submodule(embedding)).shape[1] if embedding else 0
    ends = embedding_menu(width, base if search.fixed_ends else None)
    found = Prober(walk, *windows, options, ends, base.seed, search.sensitivity).run(store)
    found["plain_bytes"] = _plain_bytes(source, found)
    seconds, rest = _latencies(walk, found, store, say) if goals.latency else (None, 0.0)
    del walk
    scale = MEASURED_SHARE
    for attempt in range(1, TRIES + 1):
        aim = _with_margin(goals, MARGIN)
        chosen = choose(found, aim, base, scale, seconds, rest, search.allocate)
        say({"event": "chosen", "goals": goals.words(), "attempt": attempt, **chosen.as_dict()})
        folder = store.folder / f"try-{attempt}"
        manifest = _finished(folder, chosen.recipe) or once(chosen.recipe, folder, store.folder / f"work-{attempt}")
        got = _measured(store, attempt, folder, windows[2], found["float_nll"], say, goals.latency is not None)
        got |= {"bytes": _file_bytes(folder), "bits_per_weight": manifest["summary"]["bits_per_weight"]}
        say({"event": "measured", **got})
        if goals.max_loss is None or got["loss"] <= goals.max_loss or attempt == TRIES:
            break
        expected = math.log1p(chosen.expected["loss"]) / scale
        scale = max(math.log1p(got["loss"]) / max(expected, 1e-9), 1.05 * scale)
        say({"event": "note", "text": f"Perplexity rose by {100 * got['loss']:.2f}%: trying again with more bits."})
    return folder, {
        "goals": goals.as_dict(),
        "words": goals.words(),
        "met": _met(goals, got),
        "tries": attempt,
        "probe_seconds": found["seconds"],
        **chosen.as_dict(),
        "measured": got,
    }


def _finished(folder: Path, recipe: Recipe) -> "dict[str, Any] | None":
    """The manifest of an artifact that a stopped run left behind."""
    from lowbit.runtime.manifest import load_manifest

    if not (folder / "lowbit.json").is_file():
        return None
    manifest = load_manifest(folder)
    return manifest if manifest["recipe"] == recipe.as_dict() else None


def _with_margin(goals: Goals, margin: float) -> Goals:
    if goals.max_loss is None:
        return goals
    return Goals(goals.bytes, goals.bits, goals.max_loss * margin, goals.latency)


def _met(goals: Goals, got: dict[str, Any]) -> bool:
    """Whether every goal was reached as measured. A latency depends on the moment: 10% more still counts."""
    return all(
        wanted is None or got[key] <= wanted * slack
        for key, wanted, slack in (
            ("bytes", goals.bytes, 1.0),
            ("bits_per_weight", goals.bits, 1.0),
            ("loss", goals.max_loss, 1.0),
            ("latency", goals.latency, 1.1),
        )
    )


def _plain_bytes(source: ModelSource, found: dict[str, Any]) -> int:
    """Bytes of the tensors that stay as they are, their headers and the file's own."""
    taken = {f"{n}.weight" for n in (*found["layers"], *found["ends"])}
    kept = [n for n in source if n not in taken]
    return 256 + sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize + 110 for n in kept)


def _file_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def _measured(
    store: FolderStore, attempt: int, folder: Path, held: Tensor, float_nll: list[float], say: Progress, timed: bool
) -> dict[str, Any]:
    """Perplexity of the artifact on the held-out windows, beside the float model's; speed where that is a goal."""
    name = f"measured-{attempt}"
    if store.has(name):
        return store.entries(name)
    from lowbit.runtime.artifact import load

    model = load(folder)
    result = perplexity(
        model, held, progress=lambda done, total: say({"event": "measuring", "done": done, "of": total})
    )
    rises = [a - b for a, b in zip(result.window_nll, float_nll)]
    mean = fmean(rises)
    got: dict[str, Any] = {
        "loss": math.expm1(min(mean, 50.0)),
        "loss_stderr": math.exp(min(mean, 50.0)) * stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else None,
        "perplexity": result.perplexity,
        "float_perplexity": math.exp(min(fmean(float_nll), 700.0)),
        "windows": len(held),
        "context": held.shape[1],
    }
    if timed:
        got["latency"] = seconds_a_token(model, held[0])
    store.put(name, {"none": torch.zeros(1)}, got)
    return got


# -- latency


@torch.no_grad()
def seconds_a_token(model: Any, ids: Tensor, tokens: int = 16, before: int = 32) -> float:
    """Seconds to generate one token: the median of `tokens` steps with a key-value cache, after `before` tokens."""
    out = model(ids[None, :before], use_cache=True)
    times = []
    for _ in range(tokens):
        following = out.logits[:, -1:].argmax(-1)
        began = time.perf_counter()
        out = model(following, past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _latencies(
    walk: Walk, found: dict[str, Any], store: FolderStore, say: Progress
) -> tuple[dict[tuple[int, int, str], float], float]:
    """((out, in, label) -> seconds of its product with one token, seconds of everything else a token needs)."""
    if not store.has("latency"):
        say({"event": "note", "text": "Timing the kernels on this machine."})
        rows = [*found["layers"].values(), *found["ends"].values()]
        wanted = sorted({(*r["shape"], la) for r in rows for la in r["loss"]})
        times = [[*key, _kernel_seconds(*key)] for key in wanted]
        store.put("latency", {"none": torch.zeros(1)}, {"times": times, "rest": _rest_seconds(walk)})
    kept = store.entries("latency")
    return {(o, i, f): t for o, i, f, t in kept["times"]}, kept["rest"]


def _kernel_seconds(out: int, in_: int, label: str) -> float:
    """One token through one packed layer: the median of several calls."""
    from lowbit.runtime.layers import PackedLinear

    layer = PackedLinear.from_quantized(_stand_in(torch.randn(out, in_), label), None)
    return _median_seconds(lambda: layer(torch.ones(1, in_)))


def _stand_in(w: Tensor, label: str) -> QuantizedTensor:
    """Any weight in an option's format, with exceptions where the method makes them; an embedding's has no method."""
    option = Option.of(label)
    fmt = Format.parse(option.format).with_(**_quick(option.format))
    if option.method != "icquant" and option.average is None:
        return quantize(w, fmt)
    spec, statistics = find(option.method), None
    if option.average is not None:
        made = GramAccumulator(w.shape[1])
        made.add(torch.randn(2 * w.shape[1], w.shape[1]))
        statistics = made.finish()
    return spec.solve(w, statistics, fmt, **spec.options | option.options).quantized()


def _quick(fmt: str) -> dict[str, str]:
    """Searched scales take long to find and make no difference to the time of a product."""
    return {"scale_rule": "minmax"} if Format.parse(fmt).scale_rule == "search" else {}


@torch.no_grad()
def _rest_seconds(walk: Walk) -> float:
    """What a token needs beside the products: one block's time without its linear layers, times the blocks."""
    block = walk.blocks[0]
    names = [n for n in walk.names if n.startswith(f"{walk.prefix}.0.")]
    walk._read(names)
    layers = linear_layers(block)
    widths = {n: layer_matrix(m).shape[1] for n, m in layers.items()}
    args, kwargs = walk.calls[0]
    kwargs = {k: _first_token(v) for k, v in kwargs.items()}
    hidden = torch.randn(1, 1, walk.model.get_input_embeddings().embedding_dim)  # type: ignore[operator, union-attr]
    whole = _median_seconds(lambda: block(hidden, *args, **kwargs))
    inputs = {n: torch.ones(1, 1, width) for n, width in widths.items()}
    products = sum(_median_seconds(partial(m, inputs[n])) for n, m in layers.items())
    walk._forget(names)
    return max(whole - products, 0.0) * len(walk.blocks)


def _first_token(value: Any) -> Any:
    """A block's argument as it would be for the first token alone."""
    if isinstance(value, tuple):
        return tuple(_first_token(v) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim == 4:
        return value[..., :1, :1]
    return value[:, :1] if value.ndim > 1 else value[:1]


def _median_seconds(call: Callable[[], Any], times: int = 9) -> float:
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]
