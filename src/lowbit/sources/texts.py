"""Texts for calibration and evaluation, from wherever they lie.

    notes.txt   folder/            text files; a folder's .txt and .md in sorted order
    a.parquet   folder-of-parquet/ rows of one column, joined by newlines
    a.jsonl                        one JSON object a line, one column of it
    datasets:NAME[/CONFIG][:SPLIT] or NAME    a dataset of the Hugging Face hub, through the `datasets` library

Any of them may end in a part, `valid.txt[:50%]` or `valid.txt[50%:]`: cut at whole lines, so that calibration and
evaluation can take different halves of one file. Percentages are of characters.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lowbit.errors import DataError

TEXTS, PARQUET, JSONL = (".txt", ".md"), (".parquet",), (".jsonl", ".ndjson")
PART = re.compile(r"(?P<spec>.*)\[(?P<begin>\d+(\.\d+)?%)?:(?P<end>\d+(\.\d+)?%)?\]", re.DOTALL)
HUB = re.compile(r"(datasets:)?(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+){0,2})(:(?P<split>\w+))?")


def read_text(spec: str, column: str = "text", split: str = "train", limit_chars: int | None = None) -> str:
    """One string of text, never empty.

    column:      for Parquet, JSON lines and datasets
    split:       for datasets that name none (`NAME:validation` wins)
    limit_chars: stop reading there; a part such as `[:50%]` is taken of what was read

    Raises DataError: missing, empty, not UTF-8, no such column (listing those there are), a part that selects nothing.
    """
    path, begin, end = _split_part(str(spec))
    text = _limited(_pieces(path, column, split), limit_chars)
    if not text.strip():
        raise DataError(f"{path} holds no text; give a text file, e.g. --data FILE.txt.")
    cut = _part(text, begin, end)
    if not cut.strip():
        raise DataError(f"{spec} selects nothing of the {len(text)} characters there; widen the part in brackets.")
    return cut


def _split_part(spec: str) -> tuple[str, float, float]:
    match = PART.fullmatch(spec)
    if match is None or Path(spec).exists():
        if spec.endswith("%]"):
            raise DataError(f"{spec}: a part is written [a%:b%], e.g. {spec.partition('[')[0]}[:50%].")
        return spec, 0.0, 1.0
    begin, end = (float(match[k].rstrip("%")) / 100 if match[k] else d for k, d in (("begin", 0.0), ("end", 1.0)))
    if not 0 <= begin < end <= 1:
        raise DataError(f"{spec}: the part must run upwards within 0% to 100%, e.g. {match['spec']}[50%:100%].")
    return match["spec"], begin, end


def _part(text: str, begin: float, end: float) -> str:
    return text[_line_start(text, begin) : _line_start(text, end)]


def _line_start(text: str, fraction: float) -> int:
    """The first start of a line at or after the fraction: parts that meet neither overlap nor leave a gap."""
    place = round(len(text) * fraction)
    if place in (0, len(text)):
        return place
    return (text.find("\n", place - 1) + 1) or len(text)


def _limited(pieces: Iterable[str], limit: int | None) -> str:
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if limit is not None and size >= limit:
            break
    return "".join(kept)[:limit]


def _pieces(spec: str, column: str, split: str) -> Iterator[str]:
    path = Path(spec).expanduser()
    if path.is_dir() and not spec.startswith("datasets:"):
        for file in _folder(path):
            yield from _reader(file)(file, column)
    elif path.exists():  # a pipe, too
        yield from _reader(path)(path, column)
    elif (match := HUB.fullmatch(spec)) and (match[1] or Path(spec).suffix.lower() not in (*TEXTS, *PARQUET, *JSONL)):
        yield from _dataset(match["name"], match["split"] or split, column)
    else:
        raise DataError(
            f"{spec}: no such file or folder; check the path, or give a dataset as datasets:NAME/CONFIG:SPLIT."
        )


def _folder(path: Path) -> list[Path]:
    for kinds in (TEXTS, PARQUET, JSONL):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
        if files:
            return files
    raise DataError(f"{path} has no .txt, .md, .parquet or .jsonl files; give a folder that has, or one file.")


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    suffix = path.suffix.lower()
    return _parquet if suffix in PARQUET else _jsonl if suffix in JSONL else _plain


def _plain(path: Path, column: str) -> Iterator[str]:
    data = path.read_bytes()
    if b"\0" in data:
        raise DataError(f"{path} is binary, not text; give a UTF-8 text file, .parquet or .jsonl.")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8 (byte {e.start}); convert it: `iconv -t UTF-8 -f LATIN1 {path} > NEW`."
        ) from e
    yield text if text.endswith("\n") or not text else text + "\n"


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: type `pip install pyarrow`.") from None
    try:
        with pq.ParquetFile(path) as file:
            _check_column(column, list(file.schema_arrow.names), str(path))
            for batch in file.iter_batches(columns=[column]):
                yield from _lines(batch.column(0).to_pylist(), str(path), column)
    except (ArrowException, OSError) as e:
        raise DataError(
            f"{path} is not a whole Parquet file ({str(e).splitlines()[0]}); download or write it again."
        ) from e


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate("".join(_plain(path, column)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path}, line {number} is not JSON ({e}); one object a line is needed.") from e
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number} is no JSON object; one object a line is needed, e.g. {{"text": "..."}}.'
            )
        _check_column(column, list(row), f"{path}, line {number}")
        yield from _lines([row[column]], str(path), column)


def _check_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        raise DataError(f"{where} has no column {column!r}; it has {', '.join(known)}. Name one with --column.")


def _lines(rows: Iterable[object], where: str, column: str) -> Iterator[str]:
    for row in rows:
        if row is not None and not isinstance(row, str):
            raise DataError(
                f"{where}: column {column!r} holds {type(row).__name__}, not text; name another with --column."
            )
        if row:
            yield row if row.endswith("\n") else row + "\n"


def _dataset(name: str, split: str, column: str) -> Iterator[str]:
    """name: owner/dataset[/config], or dataset/config without an owner (wikitext/wikitext-2-raw-v1)."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name!r} is no file here, and datasets of the hub need a library: `pip install datasets`."
        ) from None
    tries = [(name, None)] if "/" not in name else [(name, None), tuple(name.rsplit("/", 1))]
    tries = tries[::-1] if name.count("/") == 2 else tries
    reasons = []
    for repo, config in tries:
        try:
            table = datasets.load_dataset(repo, config, split=split)
            break
        except Exception as e:  # the library raises its own, the hub's and the network's errors
            reasons.append(f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}")
    else:
        raise DataError(
            f"{name!r} is no file or folder here, and cannot be loaded as a dataset (split {split!r}; {reasons[0]}); "
            "check the name, or without a network give a text file."
        )
    _check_column(column, list(table.column_names), f"dataset {name}")
    yield from _lines((row[column] for row in table), name, column)
