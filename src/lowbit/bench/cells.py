"""Tasks x architectures x methods: a small training in every cell that makes sense, through `lowbit train`.

    lowbit bench tasks -o tasks/ --data cifar10=cifar10/ --data shakespeare=input.txt --seeds 3

Every cell is a folder of its own with checkpoints, the packed network and a report; typed again, what is finished is
kept and what is not goes on. A cell that fails is a row with its reason. Tasks without data are left out.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lowbit.errors import RecipeError, near_names
from lowbit.train.recipe import TrainRecipe
from lowbit.train.runs import read_mark, run

Say = Callable[[str], object]
BINARY = {"method": "quantize", "format": "binary-channel", "estimator": "clipped"}
METHODS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "float"},
    "w1": {"weights": BINARY},
    "w1-parq": {"weights": {"method": "prox", "map": "parq"}},
    "ternary": {"weights": "twn"},
    "w3-s3": {"weights": "s3"},
    "w4-lsq": {"weights": "lsq"},
    "w1a1": {"weights": BINARY, "activations": {"method": "sign", "estimator": "approxsign"}},
}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 20, "batch": 64, "lr": 0.003, "warmup": 1},
    "cifar10": {"epochs": 5, "batch": 128, "lr": 0.003, "warmup": 0.5},
    "shakespeare": {"epochs": 2, "batch": 32, "lr": 0.003, "warmup": 0.1, "clip": 1.0},
}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "resnet": {"depth": 8, "width": 8},
        "mlp": {"width": 128, "depth": 2},
        "vit": {"width": 48, "depth": 2, "heads": 4, "patch": 2},
        "lstm": {"width": 64},
    },
    "cifar10": {
        "resnet": {"depth": 8, "width": 16, "stem_stride": 2},
        "mlp": {"width": 256, "depth": 3},
        "vit": {"width": 64, "depth": 4, "heads": 4, "patch": 4},
        "lstm": {"width": 96},
    },
    "shakespeare": {
        "mlp": {"width": 256, "window": 8},
        "lstm": {"width": 128},
        "gpt": {"width": 64, "depth": 4, "heads": 4},
    },
}
QUICK: dict[str, Any] = {"epochs": 1, "batch": 16, "train_examples": 64, "test_examples": 32}
SMALLEST = {"resnet": {"depth": 8, "width": 4}, "mlp": {"width": 8}, "vit": {"width": 8, "depth": 1, "heads": 2},
            "lstm": {"width": 8}, "gpt": {"width": 8, "depth": 1, "heads": 2}}  # fmt: skip


class Cell(NamedTuple):
    """One cell of the table."""

    task: str
    architecture: str
    method: str

    @property
    def name(self) -> str:
        return "-".join(self)


def cells(tasks: Iterable[str], architectures: Iterable[str], methods: Iterable[str]) -> Iterator[Cell]:
    """All that make sense of these; empty lists stand for all. Raises RecipeError for unknown names."""
    known = tuple(dict.fromkeys(a for networks in NETWORKS.values() for a in networks))
    asked = (("task", tasks, tuple(TASKS)), ("architecture", architectures, known), ("method", methods, tuple(METHODS)))
    wanted = [_checked(what, given, names) for what, given, names in asked]
    found = [Cell(t, a, m) for t in wanted[0] for a in wanted[1] if a in NETWORKS[t] for m in wanted[2]]
    if not found:
        raise RecipeError(f"{', '.join(wanted[1])} does not fit {', '.join(wanted[0])}. Leave --architecture out.")
    yield from found


def recipe_of(cell: Cell, data: str, seeds: int, quick: bool = False, **changes: Any) -> TrainRecipe:
    """The training of a cell. quick: a few steps of a tiny network, to see that it runs."""
    network = NETWORKS[cell.task][cell.architecture] | (SMALLEST[cell.architecture] if quick else {})
    network = {"name": cell.architecture} | network
    if cell.architecture == "resnet" and "activations" in METHODS[cell.method]:
        network |= {"activations": "signed", "block": "single"}  # the signs take the place of the ReLUs
    fields = TASKS[cell.task] | METHODS[cell.method] | (QUICK if quick else {})
    fields |= {k: v for k, v in changes.items() if v is not None}
    return TrainRecipe(task=cell.task, data=data, architecture=network, seeds=tuple(range(seeds)), **fields)


def run_cells(
    out: Path, chosen: Iterable[Cell], data: dict[str, str], seeds: int, say: Say, quick: bool = False, **changes: Any
) -> list[dict[str, Any]]:
    """Train every cell, or take it as it was finished; rows in order, also in OUT/tasks.json."""
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for cell in chosen:
        if cell.task != "digits" and cell.task not in data:
            say(f"{cell.name}: left out, no data (--data {cell.task}=PATH)")
            continue
        row = _row(cell, out / cell.name, recipe_of(cell, data.get(cell.task, ""), seeds, quick, **changes))
        rows.append(row)
        say(f"{cell.name:<28} {words(row)}")
        (out / "tasks.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows


def words(row: dict[str, Any]) -> str:
    """A row in one line."""
    if row["error"]:
        return f"failed: {row['error']}"
    spread = "" if row["spread"] is None else f" +- {100 * row['spread']:.2f}"
    bits = "" if row["bits_per_weight"] is None else f", {row['bits_per_weight']:.2f} bits, {row['bytes']:,} bytes"
    return f"{100 * row['accuracy']:.2f} %{spread}{bits}, {row['seconds_per_epoch']:.2f} s an epoch"


def _row(cell: Cell, folder: Path, recipe: TrainRecipe) -> dict[str, Any]:
    row: dict[str, Any] = {"task": cell.task, "architecture": cell.architecture, "method": cell.method}
    row |= dict.fromkeys(("accuracy", "spread", "loss", "bits_per_weight", "bytes", "same_class", "seconds_per_epoch"))
    try:
        runs = _finished(folder, recipe) or run(recipe, folder)["rows"]
    except Exception as e:  # whatever it was, the other cells go on
        return row | {"seeds": 0, "error": f"{type(e).__name__}: {e}"}
    right = [r["accuracy"] for r in runs]
    row |= {"accuracy": fmean(right), "spread": stdev(right) if len(right) > 1 else None}
    row |= {"loss": fmean(r["loss"] for r in runs), "seconds_per_epoch": fmean(r["seconds_per_epoch"] for r in runs)}
    row |= {k: runs[0].get(k) for k in ("bits_per_weight", "bytes")}
    row["same_class"] = min((r["same_class"] for r in runs if "same_class" in r), default=None)
    return row | {"seeds": len(runs), "error": None}


def _finished(folder: Path, recipe: TrainRecipe) -> "list[dict[str, Any]] | None":
    """The rows of a folder that holds this very training, finished."""
    if not (folder / "train.json").is_file():
        return None
    found = read_mark(folder)
    same = TrainRecipe(**found["recipe"]).identity() == recipe.identity()
    rows = [r for r in found.get("rows", []) if r["seed"] in recipe.seeds]
    return rows if same and found.get("finished") and len(rows) == len(recipe.seeds) else None


def _checked(what: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(given) or known
    for name in chosen:
        if name not in known:
            raise RecipeError(f"unknown {what} {name!r}. {near_names(name, known)}")
    return chosen
