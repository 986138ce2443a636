"""What people call: compress a model in memory or on disk; attach, train and pack a network of their own.

model = lowbit.compress(model, "gptq", bits=3, group=64, data=texts, tokenizer=tokenizer)
lowbit.api.compress_model("model.gguf", "out/", method="gptq", bits=4, data="valid.txt[:50%]")
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.evaluate import peak_memory_bytes, resident_memory_bytes
from lowbit.pipeline.assemble import assemble, compress_network, tied_modules
from lowbit.pipeline.checkpoint import FolderStore, MemoryStore
from lowbit.pipeline.space import check_space
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.runtime import swap
from lowbit.runtime.artifact import auto_class_of, load, refuse_existing, save, write_artifact
from lowbit.runtime.artifact_write import publish
from lowbit.sources import check_tokenizer, foreign_note, open_model, read_text, token_windows
from lowbit.sources.module import ModuleSource
from lowbit.training import bits_per_weight, pack, penalty, prepare, step, summary

__all__ = [
    "bits_per_weight",
    "compress",
    "compress_model",
    "load",
    "pack",
    "penalty",
    "prepare",
    "save",
    "step",
    "summary",
]

Progress = Callable[[dict[str, Any]], None]


def compress(
    model: nn.Module,
    method: "str | None" = None,
    *,
    bits: "int | None" = None,
    group: "int | None" = None,
    format: "str | None" = None,
    data: "str | Path | list[str] | Tensor | None" = None,
    tokenizer: Any = None,
    recipe: "str | Path | Recipe | None" = None,
    windows: "int | None" = None,
    context: "int | None" = None,
    seed: "int | None" = None,
    embed_bits: "int | None" = None,
    activations: "str | None" = None,
    gram: "str | None" = None,
    options: "dict[str, Any] | None" = None,
    progress: "Progress | None" = None,
) -> nn.Module:
    """A packed copy of a model in memory; the model itself stays as it is.

    data: texts (a list, a long string, or a file's path) with the `tokenizer`, or token ids (windows, context)

    A transformers language model (decoder or encoder) is walked block by block. Of any other network each linear layer
    and 2-d convolution is rounded on its own, or with data=inputs (a tensor (n, ...), or a list of batches) one after
    the other, biases corrected and batch norms counted again; the first convolution and the last linear layer stay in
    float.
    Raises RecipeError, DataError, ShapeError, ModelError with what to change.
    """
    widths = {"bits": bits, "group": group, "format": format, "embeddings": embed_bits, "activations": activations}
    calibration = {"gram": gram, "windows": windows, "context": context, "seed": seed}
    plan = Recipe.merged(recipe, method=method, options=options, **widths, **calibration)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"lowbit.compress takes a torch module, not a {type(model).__name__}; "
            "a model on disk goes to lowbit.api.compress_model(model, out)."
        )
    if any(True for _ in swap.packed_modules(model)):
        raise ModelError("the model's layers are packed already; give the float model it came from.")
    if not hasattr(model, "config"):
        return compress_network(model, plan, data, progress)
    ids = _ids(data, tokenizer, plan)
    if ids is not None:
        _check_ids(ids, model.config)
    source: Any = ModuleSource(model)
    store = MemoryStore()
    walk = Walk(source, plan, store, ids, progress or (lambda event: None))
    walk.run()
    return assemble(walk, store, plan)


def compress_model(
    model: "str | Path",
    out: "str | Path",
    *,
    method: "str | None" = None,
    bits: "int | float | None" = None,
    group: "int | None" = None,
    format: "str | None" = None,
    data: "str | None" = None,
    recipe: "str | Path | Recipe | None" = None,
    windows: "int | None" = None,
    context: "int | None" = None,
    seed: "int | None" = None,
    budget: "int | None" = None,
    max_loss: "float | None" = None,
    latency: "float | None" = None,
    allocate: "str | None" = None,
    sensitivity: "str | None" = None,
    max_ram: "int | None" = None,
    force: bool = False,
    embed_bits: "int | None" = None,
    activations: "str | None" = None,
    gram: "str | None" = None,
    tokenizer: "str | Path | None" = None,
    options: "dict[str, Any] | None" = None,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """Compress a model on disk (GGUF file, folder, hub name) into the artifact OUT, block by block.

    budget:    bytes of model.safetensors; max_loss: perplexity / float perplexity - 1, on held-out windows of the
               data; latency: seconds to generate a token; bits that are no whole number: an average. With one of
               these, formats are chosen layer by layer: see `lowbit.pipeline.auto`
    allocate, sensitivity: how formats are chosen on the way to a goal, see `lowbit.pipeline.goals.Search`
    max_ram:   ceiling in bytes; the plan is made, and said through progress, before anything runs
    tokenizer: a folder, if not the model's own
    returns:   the JSON object of `lowbit compress`; with a goal, "choice" in it says what was chosen and measured

    A run that was killed goes on from the last finished block when it is called again, and ends with the same bytes.
    Raises LowbitError with one sentence that says what to type; OUT then does not exist (or is what it was).
    """
    began, say, out = time.perf_counter(), progress or (lambda event: None), Path(out)
    goals = _goals(budget, bits, max_loss, latency, method)
    width = None if goals else bits
    widths = {"bits": width, "group": group, "format": format, "embeddings": embed_bits, "activations": activations}
    calibration = {"gram": gram, "data": data, "windows": windows, "context": context, "seed": seed}
    plan = Recipe.merged(recipe, method=method, options=options, **widths, **calibration)
    refuse_existing(out, force)
    search = _search(method, group, embed_bits is not None or goals.only_bits, allocate, sensitivity)
    if goals:
        _check_goals(goals, plan, format)
    elif allocate or sensitivity:
        raise RecipeError("--allocate and --sensitivity choose formats for a goal: add --budget 60MB or --bits 2.5.")
    if plan.needs_data and not plan.data:
        raise RecipeError(f"{plan.method} needs calibration text: add --data FILE, or use --method rtn or hqq.")
    source = open_model(model)
    words = _tokenizer(source, tokenizer)
    ids, notes, text = None, [source.unused_note(), source.rounded_note()], ""
    if plan.data:
        text = read_text(plan.data)
        found = token_windows(text, words, plan.windows, plan.context, plan.seed, shorten=context is None)
        ids, notes = found.ids, [*notes, found.note, foreign_note(text, found.tokens_total)]
        _check_ids(ids, source.config)
    job = _Job(source, words, ids, say, max_ram, began, [note for note in notes if note])
    if not goals:
        manifest, run = job.compress(plan, out, Path(f"{out}.partial"), force)
        return result_of(manifest, run)
    from lowbit.pipeline import auto

    assert ids is not None
    more = token_windows(text, words, plan.windows + auto.HELD_WINDOWS, plan.context, plan.seed).ids
    wanted = {"goals": goals.as_dict(), "search": asdict(search), "embeddings": embed_bits}
    with closing(FolderStore(Path(f"{out}.partial"), _identity(source, plan, ids) | wanted, replace=force)) as store:
        folder, choice = auto.compress_to(
            goals,
            plan,
            source,
            auto.split_windows(more, ids),
            store,
            lambda recipe, to, work: job.compress(recipe, to, work, True)[0],
            say,
            search,
        )
        manifest, run = _put_in_place(folder, out, force, choice, began)
        store.discard()
    return result_of(manifest, run) | {"choice": choice}


def _goals(
    budget: "int | None",
    bits: "int | float | None",
    max_loss: "float | None",
    latency: "float | None",
    method: "str | None",
) -> Any:
    """What was asked for; bits are an average where they are no whole number, stand beside another goal, or where the
    method mixes widths.
    """
    from lowbit.pipeline.goals import Goals
    from lowbit.solvers import find

    others = (budget, max_loss, latency) != (None, None, None)
    mixes = method is not None and bool(find(method).averages)
    average = bits is not None and (others or bits != int(bits) or mixes)
    return Goals(budget, float(bits) if average and bits is not None else None, max_loss, latency)


def _search(
    method: "str | None", group: "int | None", fixed_ends: bool, allocate: "str | None", sensitivity: "str | None"
) -> Any:
    from lowbit.pipeline.goals import Search

    return Search(method, group, fixed_ends, allocate, sensitivity or "fisher")


def _check_goals(goals: Any, plan: Recipe, format: "str | None") -> None:
    """A goal chooses formats itself, from a probe of the model on a text."""
    if format or plan.format or plan.layers:
        raise RecipeError(f"a goal ({goals.words()}) chooses the formats: leave out --format and the recipe's formats.")
    if not plan.data:
        raise RecipeError(f"a goal ({goals.words()}) needs calibration text to choose by: add --data FILE.")
    if plan.solver.smooth is not None:
        raise RecipeError(f"{plan.method} scales whole blocks and takes no goal: leave out --method.")


def _put_in_place(
    folder: Path, out: Path, force: bool, choice: dict[str, Any], began: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Move a finished artifact to OUT, with what was chosen and measured in its run.json."""
    from lowbit.report.run_file import read_run, write_run
    from lowbit.runtime.manifest import load_manifest

    got = choice["measured"]
    row = {k: got[k] for k in ("perplexity", "float_perplexity", "windows", "context")}
    run = read_run(folder) | {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes()}
    run |= {"choice": choice, "evaluations": [row | {"text": "held-out calibration windows", "protocol": "gptq"}]}
    write_run(folder, run)
    publish(folder, out, force)
    return load_manifest(out), run


@dataclass(frozen=True)
class _Job:
    """A model and its calibration, compressed by a recipe as often as needed."""

    source: Any
    words: Any
    ids: "Tensor | None"
    say: Progress
    max_ram: "int | None"
    began: float
    notes: list[str]

    def compress(self, plan: Recipe, out: Path, work: Path, force: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Walk and write: (manifest, run). `work` holds the finished blocks until then."""
        source, ids = self.source, self.ids
        walk = Walk(source, plan, MemoryStore(), ids, self.say)
        estimate = walk.plan(resident_memory_bytes(), self.max_ram)
        self.say(
            {"event": "plan"}
            | estimate.as_dict()
            | {"notes": [*estimate.notes, *self.notes], "model": source.describe()}
        )
        check_space(walk, out, work)
        with closing(FolderStore(work, _identity(source, plan, ids), replace=force)) as store:
            walk.store = store
            pieces = walk.run(estimate.recompute)
            self.say({"event": "write"})
            layers = {name: row for piece in pieces for name, row in store.entries(piece)["layers"].items()}
            run = {
                "seconds": time.perf_counter() - self.began,
                "peak_memory_bytes": peak_memory_bytes(),
                "machine": machine(),
                "threads": torch.get_num_threads(),
                "calibration": _trouble(layers, plan),
            }
            manifest = write_artifact(
                out,
                [store.path(piece) for piece in pieces],
                layers,
                tied=tied_modules(source.tied, layers),
                config=source.config,
                auto_class=auto_class_of(walk.model),
                recipe=plan.as_dict(),
                seed=plan.seed,
                source={
                    "describe": source.describe(),
                    "fingerprint": source.fingerprint,
                    "nbytes_float": source.nbytes_float,
                },
                activations=plan.activations,
                tokenizer=self.words,
                generation_config=getattr(walk.model, "generation_config", None),
                run=run | {"evaluations": []},
                force=force,
            )
            store.discard()
        return manifest, run


def _trouble(layers: dict[str, Any], plan: Recipe) -> dict[str, Any]:
    """{"dead": layer -> inputs that were always zero, "damped": layers whose Gram matrix needed more damping}."""
    notes = {name: row.get("notes") or {} for name, row in layers.items()}
    asked = {name: plan.solver_for(name)[1].get("damping", 0.0) for name in notes}
    return {
        "dead": {name: n["dead"] for name, n in notes.items() if n.get("dead")},
        "damped": [name for name, n in notes.items() if n.get("damping", 0.0) > asked[name]],
    }


def result_of(manifest: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of `lowbit compress` from an artifact's two descriptions."""
    rows = [
        {"name": name, "format": row["meta"]["parts"][0]["format"], "shape": row["meta"]["shape"]}
        | {k: row.get(k) for k in ("bits_per_weight", "error", "error_rtn", "sensitivity")}
        for name, row in manifest["layers"].items()
    ]
    return {
        **{k: manifest["summary"][k] for k in ("bits_per_weight", "bits_per_weight_file", "bytes")},
        "seconds": run.get("seconds"),
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "layers": rows,
    }


def machine() -> str:
    """Processor, cores and system in a line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _tokenizer(source: Any, given: "str | Path | None") -> Any:
    """The model's tokenizer, or the given folder's; checked against the vocabulary."""
    if given is None:
        words = source.load_tokenizer()
    else:
        from transformers import AutoTokenizer

        try:
            words = AutoTokenizer.from_pretrained(str(given), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise DataError(
                f"no tokenizer could be read from {str(given)!r} ({str(e).splitlines()[0]}); give its folder."
            ) from e
    check_tokenizer(words, source.config)
    return words


def _check_ids(ids: Tensor, config: Any) -> None:
    """Token ids (windows, context) that the model can read."""
    rows = getattr(_of_text(config), "vocab_size", None)
    if not ids.numel():
        raise DataError(
            f"token ids of shape {tuple(ids.shape)} hold no token; give (windows, context), e.g. (24, 512)."
        )
    if int(ids.min()) < 0 or (rows and int(ids.max()) >= rows):
        raise DataError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary is 0 to "
            f"{rows - 1 if rows else '...'}: use the model's own tokenizer."
        )
    _check_context(config, ids.shape[1])


def _of_text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _check_context(config: Any, context: int) -> None:
    limit = getattr(_of_text(config), "max_position_embeddings", None)
    if limit and context > limit:
        raise DataError(f"--context {context} is longer than the model's {limit} positions. Try --context {limit}.")


def _identity(source: Any, plan: Recipe, ids: "Tensor | None") -> dict[str, Any]:
    """What must be the same for a stopped run to go on and end with the same bytes."""
    import transformers

    import lowbit

    tokens = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    versions = {"lowbit": lowbit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": source.fingerprint,
        "recipe": plan.as_dict(),
        "tokens": tokens,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def _ids(data: Any, tokenizer: Any, plan: Recipe) -> "Tensor | None":
    """Token windows from whatever was given as data."""
    if data is None:
        data = plan.data or None
    if data is None:
        if plan.needs_data:
            raise RecipeError(
                f"{plan.method} needs calibration data: data=texts with tokenizer=..., or data=token_ids; "
                "or use rtn or hqq."
            )
        return None
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise DataError(f"token ids should be integers (windows, context), not {tuple(data.shape)} {data.dtype}.")
        return data.long().cpu()
    several = isinstance(data, (list, tuple))
    if not isinstance(data, (str, Path)) and not (several and all(isinstance(text, str) for text in data)):
        raise DataError("data should be texts with tokenizer=..., a file's path, or a tensor of token ids.")
    if tokenizer is None:
        raise DataError("texts need tokenizer=..., the model's own; or give data=token_ids (windows, context).")
    text = "\n\n".join(data) if several else str(data)
    if not several and "\n" not in text and len(text) < 1000:
        text = read_text(text)
    return token_windows(text, tokenizer, plan.windows, plan.context, plan.seed).ids
