"""JSON from files that are not trusted: bounded in size and depth, no duplicate keys, no NaN."""

import json
from pathlib import Path
from typing import Any

from lowbit.errors import ArtifactError

MAX_BYTES = 100_000_000
MAX_DEPTH = 64
AGAIN = "copy the folder again, or re-run lowbit compress"


def read_json(path: Path) -> Any:
    """Parse a whole file. Raises ArtifactError."""
    return parse_json(read_limited(path), str(path))


def read_limited(path: Path) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES. Raises ArtifactError."""
    try:
        if not path.is_file():  # also keeps pipes and devices out, which could block
            raise ArtifactError(f"{path} is missing; {AGAIN}.")
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, far more than such a file needs; {AGAIN}.")
        return path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read ({e.strerror}); check its permissions, or {AGAIN}.") from e


def parse_json(raw: bytes, where: str) -> Any:
    """Raises ArtifactError naming `where`."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{where} is not valid JSON ({str(e) or type(e).__name__}); {AGAIN}.") from e


def canonical_json(value: Any) -> str:
    """The same text for equal values: sorted keys, one space of indent. Raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c if isinstance(c, list) else ())]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
