"""Rows of a run beside those of an earlier one: what moved."""

from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("op", "format", "isa", "threads", "m", "k", "n", "buffers", "model", "what", "activations", "kv_bits")
NOISE = 1.10  # ratios within this are called unchanged


def key_of(row: Mapping[str, Any]) -> tuple:
    """What makes two rows the same measurement."""
    return tuple(row.get(k) for k in KEYS)


def compare_rows(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each row: its key's fields, `ms`, `baseline_ms` and `ratio` (above 1: faster than before).

    baseline_ms and ratio are None for rows the baseline lacks. Other machines' baselines compare machines, not code.
    """
    before = {key_of(r): r["ms"] for r in baseline}
    out = []
    for row in rows:
        old = before.get(key_of(row))
        ratio = None if old is None or not row["ms"] else old / row["ms"]
        out.append({k: row[k] for k in KEYS if k in row} | {"ms": row["ms"], "baseline_ms": old, "ratio": ratio})
    return out


def moved(entry: Mapping[str, Any]) -> str:
    """ "new", "same", "faster" or "slower"."""
    ratio = entry["ratio"]
    if ratio is None:
        return "new"
    return "same" if 1 / NOISE <= ratio <= NOISE else "faster" if ratio > 1 else "slower"
