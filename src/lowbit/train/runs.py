"""A whole training: every seed of a recipe, packed and measured, in one folder that says what is in it."""

import json
import os
import shutil
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from lowbit.errors import ArtifactError
from lowbit.runtime.artifact import load
from lowbit.train.checkpoint import check_identity
from lowbit.train.loop import Progress, Trainer, device_of, evaluate
from lowbit.train.packed import architecture_for, measure_packed
from lowbit.train.recipe import TrainRecipe, load_recipe
from lowbit.train.tasks import task

MARK = "train.json"  # in the folder: what was trained, and that --force may replace it


def run(
    recipe: "TrainRecipe | str | Path",
    out: "str | Path",
    force: bool = False,
    progress: "Progress | None" = None,
    checkpoint_seconds: float = 60,
) -> dict[str, Any]:
    """Train every seed, or go on where an interrupted run of the same recipe stopped; returns the result.

    force: begin again where OUT holds a training. progress gets {"event": "start" | "resume" | "early" | "step" |
    "epoch" | "pack" | "row", ...}. Raises RecipeError, DataError, TrainingError (NaN), KernelError (the packed network
    computes something else), ArtifactError (OUT holds a finished training, one of another recipe, or other files).
    """
    recipe = recipe if isinstance(recipe, TrainRecipe) else load_recipe(recipe)
    out, tell = Path(out), progress or (lambda event: None)
    began = time.perf_counter()
    kept = _kept_rows(out, recipe, force)
    data = task(recipe.task).load(recipe.data, device_of(recipe), recipe.train_examples, recipe.test_examples)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"recipe": recipe.as_dict(), "finished": False, "rows": kept})
    rows = list(kept)
    for seed in recipe.seeds:
        if all(r["seed"] != seed for r in rows):
            rows.append(_one_seed(recipe, data, seed, out, checkpoint_seconds, tell))
            _write(out, {"recipe": recipe.as_dict(), "finished": False, "rows": rows})
            tell({"event": "row", **rows[-1]})
    result = _result(recipe, rows, out, data.train_examples, data.test_examples)
    result["seconds"] = round(time.perf_counter() - began, 2)
    _write(out, {**result, "finished": True})
    return result


def load_trained(out: "str | Path", seed: "int | None" = None) -> nn.Module:
    """The packed network of a finished training, on the CPU. seed: the recipe's first if left out.

    The data are read for their sizes. Raises ArtifactError if there is no such network.
    """
    found = read_mark(Path(out))
    recipe = TrainRecipe(**found["recipe"])
    seed = recipe.seeds[0] if seed is None else seed
    data = task(recipe.task).load(recipe.data, torch.device("cpu"), recipe.train_examples, recipe.test_examples)
    return load(Path(out) / f"seed-{seed}" / "packed", model=architecture_for(recipe, data))


def read_mark(out: Path) -> dict[str, Any]:
    """train.json of a folder. Raises ArtifactError if there is none."""
    try:
        found = json.loads((out / MARK).read_text("utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
            raise ValueError("no recipe in it")
        return found
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{out} holds no training that can be read ({MARK}: {e}).") from None


def _kept_rows(out: Path, recipe: TrainRecipe, force: bool) -> list[dict[str, Any]]:
    """Rows of seeds that are finished. Raises ArtifactError where OUT may not be used."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return []
    if not out.is_dir() or not (out / MARK).is_file():
        raise ArtifactError(f"{out} holds something else than a training. Give another folder with -o.")
    if force:
        shutil.rmtree(out)
        return []
    found = read_mark(out)
    check_identity(TrainRecipe(**found["recipe"]).identity(), recipe.identity(), out)
    rows = [r for r in found.get("rows", []) if r["seed"] in recipe.seeds]
    if found.get("finished") and len(rows) == len(recipe.seeds):
        raise ArtifactError(
            f"{out} holds this very training, finished. Give another folder with -o, more seeds, or --force to begin "
            "again."
        )
    return rows


def _one_seed(recipe: TrainRecipe, data: Any, seed: int, out: Path, every: float, tell: Progress) -> dict[str, Any]:
    folder = out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    trainer = Trainer(recipe, data, seed, folder, every)
    weights = sum(p.numel() for p in trainer.net.parameters())
    sizes = {"train_examples": data.train_examples, "test_examples": data.test_examples, "parameters": weights}
    tell({"event": "start", "seed": seed, "total": trainer.total, "device": str(trainer.device), **sizes})
    trainer.run(tell)
    last = evaluate(trainer.net, data)
    row: dict[str, Any] = {"seed": seed, "accuracy": last["accuracy"], "loss": last["test_loss"]}
    row["train_seconds"] = round(trainer.log["seconds"], 2)
    row["seconds_per_epoch"] = round(trainer.log["seconds"] / recipe.epochs, 3)
    row["device"] = str(trainer.device)
    if recipe.rounds_weights:
        tell({"event": "pack", "seed": seed})
        row |= measure_packed(trainer.net, recipe, data, seed, folder / "packed")
    return row | {"curve": trainer.log["curve"], "diagnostics": trainer.log["diagnostics"]}


def _result(recipe: TrainRecipe, rows: list[dict[str, Any]], out: Path, train: int, test: int) -> dict[str, Any]:
    rows = sorted(rows, key=lambda r: recipe.seeds.index(r["seed"]))
    right = [r["accuracy"] for r in rows]
    return {
        "recipe": recipe.as_dict(),
        "rows": rows,
        "accuracy": fmean(right),
        "spread": stdev(right) if len(right) > 1 else None,
        "train_examples": train,
        "test_examples": test,
        "out": str(out),
    }


def _write(out: Path, values: dict[str, Any]) -> None:
    temporary = out / f".{MARK}.part"
    temporary.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    os.replace(temporary, out / MARK)
