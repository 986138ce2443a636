"""The table of a methods folder: accuracy over seeds, bits counted, cost, what failed; as data, words and Markdown.

Reads what `lowbit bench methods` wrote: results.jsonl (trainings), packed.jsonl (`--pack`), cost.jsonl (`--cost`),
corrupted.jsonl (`--corrupt`).
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lowbit.bench.pool import read_rows
from lowbit.bench.rows import ROWS, Protocol

COLUMNS = (
    "row", ">accuracy", ">spread", ">to fp32", ">seeds", ">failed", "format", ">bits", ">bits, file", ">bytes", ">cost",
    ">corrupted",
)  # fmt: skip


def table(folder: Path, protocol: Protocol) -> list[dict[str, Any]]:
    """One dict a row that was tried under this protocol, in the order of the rows.

    accuracy, spread: mean and standard deviation over seeds, 0 to 1, None where there is none; to_fp32: difference of
    the means; bits_per_weight, bits_per_weight_file, bytes, same_class: of the packed network (the worst agreement of
    all seeds), None before `--pack`; cost: time of a step over fp32's, None before `--cost`; corrupted: accuracy on
    corrupted images over clean ones, mean over seeds, None before `--corrupt`; errors: of failed seeds
    """
    found = [r for r in read_rows(folder) if r["protocol"] == vars(protocol)]
    packed, costs, worse = (_by_row(folder / f"{name}.jsonl") for name in ("packed", "cost", "corrupted"))
    rows = [
        _row(name, [r for r in found if r["row"] == name], *(kept.get(name, []) for kept in (packed, costs, worse)))
        for name in ROWS
        if any(r["row"] == name for r in found) or name in costs
    ]
    base = next((r["accuracy"] for r in rows if r["row"] == "fp32"), None)
    for r in rows:
        known = base is not None and r["accuracy"] is not None
        r["to_fp32"] = r["accuracy"] - base if known else None
    return rows


def _row(name: str, runs: list[dict], packed: list[dict], costs: list[dict], worse: list[dict]) -> dict[str, Any]:
    right = [r["accuracy"] for r in runs if r["status"] == "done"]
    size = packed[0] if packed else {}
    relative = [r["relative"] for r in {r["seed"]: r for r in worse}.values() if r["relative"] is not None]
    return {
        "row": name,
        "accuracy": fmean(right) if right else None,
        "spread": stdev(right) if len(right) > 1 else None,
        "seeds": len(right),
        "failed": len(runs) - len(right),
        "errors": [r["error"] for r in runs if r["status"] == "failed"],
        "format": ROWS[name].make().format,
        "bits": ROWS[name].bits,
        **{k: size.get(k) for k in ("bits_per_weight", "bits_per_weight_file", "bytes")},
        "same_class": min((p["same_class"] for p in packed), default=None),
        "cost": costs[-1]["cost"] if costs else None,
        "corrupted": fmean(relative) if relative else None,
    }


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    """A row as words, under COLUMNS."""
    accuracy = "failed" if r["accuracy"] is None and r["failed"] else _points(r["accuracy"])
    gap = "" if r["to_fp32"] is None or r["row"] == "fp32" else f"{100 * r['to_fp32']:+.2f}"
    size = (_or_empty(r["bits_per_weight"], ".3f"), _or_empty(r["bits_per_weight_file"], ".3f"),
            _or_empty(r["bytes"], ","))  # fmt: skip
    return (r["row"], accuracy, _points(r["spread"]), gap, str(r["seeds"]), str(r["failed"] or ""), r["format"],
            *size, _or_empty(r["cost"], ".2f"), _or_empty(r["corrupted"], ".3f"))  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a page."""
    head = [c.removeprefix(">") for c in COLUMNS]
    rule = ["---:" if c.startswith(">") else "---" for c in COLUMNS]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *map(cells, rows))) + "\n"


def _points(share: "float | None") -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _or_empty(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _by_row(path: Path) -> dict[str, list[dict]]:
    kept: dict[str, list[dict]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        kept.setdefault(row["row"], []).append(row)
    return kept
