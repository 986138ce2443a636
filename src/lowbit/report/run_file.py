"""run.json: what differs from run to run and so stands apart from the artifact proper: times, memory, the machine,
evaluations.

    {"seconds", "peak_memory_bytes", "machine", "threads", "evaluations": [{"text", "perplexity", "float_perplexity",
    ...}]}

A missing or damaged run.json is an empty one: nothing in it decides a weight.
"""

import json
import os
from pathlib import Path
from typing import Any

NAME = "run.json"
KINDS: dict[str, type | tuple[type, ...]] = {
    "seconds": (int, float), "peak_memory_bytes": (int, float), "machine": str, "threads": int, "calibration": dict,
    "choice": dict,
}  # fmt: skip


def read_run(folder: Path) -> dict[str, Any]:
    """The run of an artifact folder; {"evaluations": []} where there is none."""
    try:
        run = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        run = {}
    run = {k: v for k, v in run.items() if isinstance(v, KINDS.get(k, object))} if isinstance(run, dict) else {}
    rows = run.get("evaluations")
    return run | {"evaluations": [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []}


def add_evaluation(folder: Path, row: dict[str, Any]) -> None:
    """Append one evaluation; the file is replaced as a whole, so a crash leaves the old or the new one."""
    run = read_run(folder)
    run["evaluations"].append(row)
    write_run(folder, run)


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Replace run.json as a whole."""
    temporary = folder / f".{NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n", "utf-8")
        os.replace(temporary, folder / NAME)
    finally:
        temporary.unlink(missing_ok=True)
