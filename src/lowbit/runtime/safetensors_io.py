"""safetensors files, read and written one tensor at a time, every number checked.

    u64 header length | JSON {name: {dtype, shape, data_offsets: [begin, end]}}, padded | tensor bytes without gaps

Written here so that several finished blocks can be streamed into one file without holding the model; read here so that
a tensor owns its memory (no memory map) and its checksum is taken from the very bytes that are used.
Order of tensors: widest element first, then by name, so every tensor is aligned and equal inputs give equal bytes.
Source: the safetensors format description (huggingface/safetensors README).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.runtime.strict_json import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit
CHUNK = 1 << 20
AGAIN = "copy the folder again, or re-run lowbit compress"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: begin and end count from the start of the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Entries in file order; they fill data_bytes exactly."""

    entries: dict[str, Entry]
    data_start: int
    data_bytes: int


@dataclass(frozen=True)
class Source:
    """A tensor to be written: its size is known now, its bytes are produced when their turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[memoryview]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def source_of(tensor: Tensor) -> Source:
    """A tensor in memory, of any layout and device. Raises ArtifactError for a dtype the file format lacks."""
    if tensor.dtype not in NAMES:
        raise ArtifactError(
            f"a tensor of {tensor.dtype} cannot be stored; convert it to one of {', '.join(sorted(NAMES.values()))}."
        )
    if tensor.is_meta:
        raise ArtifactError(
            "a tensor is on the meta device and has no values to store; load the model's weights first."
        )

    def chunks() -> Iterator[memoryview]:
        view = bytes_of(tensor.detach().cpu().contiguous())
        yield from (view[i : i + CHUNK] for i in range(0, len(view), CHUNK))

    return Source(tensor.dtype, tuple(tensor.shape), chunks)


def sources_in(path: Path) -> dict[str, Source]:
    """The tensors of an existing safetensors file, to be copied in chunks."""
    header = read_header(path)

    def copier(entry: Entry) -> Callable[[], Iterator[memoryview]]:
        def chunks() -> Iterator[memoryview]:
            with open(path, "rb") as file:
                file.seek(header.data_start + entry.begin)
                for begin in range(entry.begin, entry.end, CHUNK):
                    block = file.read(min(CHUNK, entry.end - begin))
                    if len(block) != min(CHUNK, entry.end - begin):
                        raise ArtifactError(f"{path} was cut off while it was being copied; re-run lowbit compress.")
                    yield memoryview(block)

        return chunks

    return {name: Source(e.dtype, e.shape, copier(e)) for name, e in header.entries.items()}


def file_order(sources: dict[str, Source]) -> list[str]:
    """Names in the order they are written: widest element first, then by name."""
    return sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))


def header_bytes(sources: dict[str, Source]) -> bytes:
    """Length and JSON, padded so that the data begins at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in file_order(sources):
        s = sources[name]
        table[name] = {"dtype": NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(sources: dict[str, Source], write: Callable[[bytes | memoryview], object]) -> dict[str, str]:
    """Send the whole file to `write`, chunk by chunk; returns the SHA-256 of each tensor's bytes."""
    write(header_bytes(sources))
    sums = {}
    for name in file_order(sources):
        digest, done = hashlib.sha256(), 0
        for block in sources[name].chunks():
            write(block)
            digest.update(block)
            done += len(block)
        assert done == sources[name].nbytes, name
        sums[name] = digest.hexdigest()
    return sums


def read_header(path: Path) -> Header:
    """The table of a file.

    Raises ArtifactError unless every offset, shape and dtype agrees with the file's size, without gaps or overlaps.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            if size < 8 or n > min(MAX_HEADER, size - 8):
                raise ArtifactError(f"{path}: the header does not fit the file of {size} bytes; {AGAIN}.")
            text = file.read(n)
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read ({e.strerror}); {AGAIN}.") from e
    table = parse_json(text, str(path))
    if not isinstance(table, dict):
        raise ArtifactError(f"{path}: the header is not a table of tensors; {AGAIN}.")
    _check_metadata(path, table.pop("__metadata__", {}))
    try:
        entries = {name: _entry(row) for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{path}: the header is damaged ({e}); {AGAIN}.") from e
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in entries.items():
        if entry.begin != at:
            raise ArtifactError(f"{path}: tensor {name!r} begins at byte {entry.begin}, not {at}; {AGAIN}.")
        at = entry.end
    if 8 + n + at != size:
        raise ArtifactError(f"{path}: the file has {size} bytes, its header describes {8 + n + at}; {AGAIN}.")
    return Header(entries, 8 + n, at)


def read_tensors(
    path: Path, header: Header, on_bytes: Callable[[bytes | memoryview], object] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in file order, each in memory of its own. on_bytes sees every byte once, header included.

    Raises ArtifactError if the file ends early.
    """
    with open(path, "rb") as file:
        head = file.read(header.data_start)
        if on_bytes:
            on_bytes(head)
        for name, e in header.entries.items():
            tensor = torch.empty(e.shape, dtype=e.dtype)
            view = bytes_of(tensor)
            _read_into(file, view, path)
            if on_bytes:
                on_bytes(view)
            yield name, tensor


def read_tensor(path: Path, header: Header, name: str) -> Tensor:
    """One tensor, in memory of its own. Raises ArtifactError if the file ends early."""
    entry = header.entries[name]
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with open(path, "rb") as file:
        file.seek(header.data_start + entry.begin)
        _read_into(file, bytes_of(tensor), path)
    return tensor


def merge(parts: Iterable["Path | tuple[str, Tensor]"]) -> dict[str, Source]:
    """Sources from files and single tensors. Raises ArtifactError when two give the same name."""
    merged: dict[str, Source] = {}
    for part in parts:
        new = sources_in(part) if isinstance(part, Path) else {part[0]: source_of(part[1])}
        twice = sorted(new.keys() & merged.keys())
        if twice:
            raise ArtifactError(
                f"tensor {twice[0]!r} is given twice; each tensor is stored once (name ties in `tied`)."
            )
        merged |= new
    return merged


def bytes_of(tensor: Tensor) -> memoryview:
    """A view of a contiguous CPU tensor's memory."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat) if flat.size else memoryview(b"")


def _read_into(file: BinaryIO, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        n = file.readinto(view[done : done + CHUNK])  # type: ignore[attr-defined]
        if not n:
            raise ArtifactError(f"{path} ends {len(view) - done} bytes too early; {AGAIN}.")
        done += n


def _entry(row: dict[str, Any]) -> Entry:
    if set(row) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"a tensor has the fields {sorted(row)}")
    (begin, end), shape = row["data_offsets"], row["shape"]
    numbers = [begin, end, *shape]
    if any(type(v) is not int or not 0 <= v < 2**48 for v in numbers) or len(shape) > 8:
        raise ValueError(f"impossible numbers {numbers}")
    if row["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {row['dtype']!r}")
    entry = Entry(DTYPES[row["dtype"]], tuple(shape), begin, end)
    if end - begin != prod(shape) * entry.dtype.itemsize:
        raise ValueError(f"shape {shape} does not make {end - begin} bytes")
    return entry


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: the header's __metadata__ is not text; {AGAIN}.")
