"""From lowbit.json and run.json to what the page shows: plain numbers, words and rows. No HTML here."""

import re
from dataclasses import dataclass, field
from math import prod
from statistics import fmean
from typing import Any

PARTS = ("codes", "scales", "zeros", "tables", "exceptions")


@dataclass(frozen=True)
class Layer:
    """One compressed layer as the report shows it."""

    name: str
    type: str
    shape: tuple[int, ...]
    formats: str
    bytes: int
    bits: float
    error: "float | None"
    error_rtn: "float | None"
    sensitivity: "float | None"
    bytes_by_part: dict[str, int] = field(repr=False)

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def place(self) -> "tuple[int, str] | None":
        """(block, layer in it): model.layers.3.mlp.up_proj -> (3, "mlp.up_proj"); None outside of blocks."""
        m = re.fullmatch(r"(?:[^.]+\.)*?(\d+)\.(.+)", self.name)
        return (int(m[1]), m[2]) if m and len(m[1]) < 7 else None


def layers_of(manifest: dict[str, Any]) -> list[Layer]:
    """Every compressed layer, in natural order (block 10 after block 9)."""
    return [_layer(name, row) for name, row in sorted(manifest["layers"].items(), key=lambda item: natural(item[0]))]


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key under which numbers inside names count as numbers."""
    return [(1, int(w), "") if w.isdigit() and len(w) < 10 else (0, 0, w) for w in re.split(r"(\d+)", name)]


def _layer(name: str, row: dict[str, Any]) -> Layer:
    by_part = dict.fromkeys(PARTS, 0)
    for key, stored in row["tensors"].items():
        by_part[_part_of(key)] += stored["bytes"]
    formats = " + ".join(str(p["format"]) for p in row["meta"]["parts"])
    error, error_rtn, sensitivity = (row.get(k) for k in ("error", "error_rtn", "sensitivity"))
    shape, size, bits = tuple(row["meta"]["shape"]), row["bytes"], row["bits_per_weight"]
    return Layer(name, row["type"], shape, formats, size, bits, error, error_rtn, sensitivity, by_part)


def _part_of(key: str) -> str:
    if key.startswith("part"):
        return "exceptions"
    return {"codes": "codes", "zero": "zeros", "table": "tables"}.get(key, "scales")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensor file by what they hold, and of the float model."""

    blocks: int
    embeddings: int
    other: int
    before: int

    @property
    def after(self) -> int:
        return self.blocks + self.embeddings + self.other


def is_embedding(layer: Layer) -> bool:
    """Embeddings and output heads: what a language model keeps in 8-bit groups."""
    return layer.type == "embedding" or layer.name.rpartition(".")[2] in ("lm_head", "embed_out", "output_projection")


def sizes(manifest: dict[str, Any], layers: list[Layer]) -> Sizes:
    embeddings = sum(la.bytes for la in layers if is_embedding(la))
    return Sizes(
        blocks=sum(la.bytes for la in layers) - embeddings,
        embeddings=embeddings,
        other=sum(row["bytes"] for row in manifest["plain"].values()),
        before=manifest["summary"]["float_bytes"],
    )


def kinds(layers: list[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers by what they are in their block, in the order of the model; those outside of blocks by their own name."""
    table: dict[str, list[Layer]] = {}
    for la in layers:
        table.setdefault(la.place[1] if la.place else la.name, []).append(la)
    return list(table.items())


def bits_by_part(layers: list[Layer]) -> dict[str, float]:
    """Bits per weight spent on codes, scales, ... over some layers."""
    n = sum(la.weights for la in layers) or 1
    return {part: 8 * sum(la.bytes_by_part[part] for la in layers) / n for part in PARTS}


def by_block(layers: list[Layer], attribute: str) -> list[tuple[int, float]]:
    """(block, mean of an attribute over its layers), for blocks that have it."""
    table: dict[int, list[float]] = {}
    for la in layers:
        value = getattr(la, attribute)
        if la.place and value is not None:
            table.setdefault(la.place[0], []).append(value)
    return [(b, fmean(values)) for b, values in sorted(table.items())]


def left_alone(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensors kept as they were, similar names together: model.layers.*.input_layernorm.weight x 30."""
    table: dict[str, dict[str, Any]] = {}
    for name, row in manifest["plain"].items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}")[1:]
        entry = table.setdefault(
            pattern, {"name": pattern, "count": 0, "bytes": 0, "dtype": row["dtype"], "shape": row["shape"]}
        )
        entry["count"] += 1
        entry["bytes"] += row["bytes"]
    return sorted(table.values(), key=lambda e: (-e["bytes"], e["name"]))


def best_evaluation(run: dict[str, Any]) -> "dict[str, Any] | None":
    """The last evaluation that has a float figure beside it, else the last."""
    rows = [
        r
        for r in run["evaluations"]
        if isinstance(r.get("perplexity"), (int, float)) or isinstance(r.get("accuracy"), (int, float))
    ]
    both = [r for r in rows if r.get("float_perplexity") or r.get("float_accuracy")]
    return (both or rows or [None])[-1]


def choice_of(run: dict[str, Any]) -> "dict[str, Any] | None":
    """What run.json says about how the formats were chosen; None where nothing was, or where it is damaged."""
    choice: Any = run.get("choice")
    try:
        rows = [choice["expected"], choice["measured"], *choice["frontier"], *choice["uniform"]]
        good = all(isinstance(r[k], (int, float)) for r in rows for k in ("bytes", "bits_per_weight", "loss"))
        return choice if good and choice["words"] and choice["tries"] and "probe_seconds" in choice else None
    except (KeyError, TypeError):
        return None


def error_words(manifest: dict[str, Any]) -> str:
    """What the layers' `error` is the error of: of outputs where a text was read, else of the weights."""
    if manifest["recipe"].get("data"):
        return "the squared error of its output on the calibration text, relative to the output"
    return "the squared error of its weights, relative to the weights (no text was read)"


def honest_notes(manifest: dict[str, Any], run: dict[str, Any], layers: list[Layer]) -> list[str]:
    """What a reader must know before quoting a figure from this page."""
    notes = [
        "Sizes are counted from the tensors in model.safetensors: codes, scales, zero points, tables, masks and "
        "padding. Tokenizer and JSON files come on top.",
    ]
    if any(la.error is not None for la in layers):
        notes.append(
            f"A layer's error is {error_words(manifest)}. It says where bits hurt, "
            "not how well the model writes: only an evaluation says that."
        )
    if not run["evaluations"]:
        notes.append("This model has not been evaluated yet. Its size says nothing about its quality.")
    elif not any(r.get("float_perplexity") or r.get("float_accuracy") for r in run["evaluations"]):
        notes.append("The float model was not measured beside it: a perplexity alone cannot be compared with others.")
    else:
        notes.append(
            "Perplexities depend on text, context, stride and protocol. Compare only figures whose settings agree."
        )
    if manifest["recipe"].get("data"):
        notes.append("Evaluate on another text than the one used for calibration, or on another part of it.")
    notes += trouble(run.get("calibration"))
    notes.append("Speed and memory are those of the machine named here, whole process included.")
    return notes


def trouble(found: Any) -> list[str]:
    """Sentences on inputs that were always zero, and on Gram matrices that had to be damped more than asked."""
    found = found if isinstance(found, dict) else {}  # run.json is read without checks
    dead, damped = found.get("dead"), found.get("damped")
    dead = {k: n for k, n in dead.items() if isinstance(n, int)} if isinstance(dead, dict) else {}
    damped = [n for n in damped if isinstance(n, str)] if isinstance(damped, list) else []
    notes = []
    if dead:
        notes.append(
            f"{sum(dead.values())} inputs of {len(dead)} layers (first {next(iter(dead))}) were always zero on the "
            "calibration text: nothing is known of them, and their weights are 0."
        )
    if damped:
        notes.append(
            f"The inputs of {len(damped)} layers (first {damped[0]}) vary in too few directions for their Gram matrix "
            "to be inverted as it is; it was damped more. More calibration text helps."
        )
    return notes
