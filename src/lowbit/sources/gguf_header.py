"""The header of a GGUF file: metadata and the table of tensors, with every number checked against the file.

    "GGUF" | version u32 | tensor count u64 | metadata count u64 | metadata | tensor table | padding | tensor bytes

A string is a u64 length and UTF-8 bytes; an array is an element type u32, a count u64 and the elements; a tensor entry
is name, dims u32, dims * u64 (fastest first), type u32, offset u64 from the start of the tensor bytes. Little endian.

The tokenizer's arrays are counted, not kept: only transformers' tokenizer loader needs them, and reads the file itself.
Source: the GGUF specification (ggml project, docs/gguf.md), versions 2 and 3.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.errors import ModelError

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
F32 = 0
MAX_DIMS = 4  # ggml's own limit
AGAIN = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. shape: slowest dimension first, as torch has it; row_bytes: of one innermost row."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int  # absolute place in the file
    n_bytes: int
    row_bytes: int


@dataclass
class Header:
    """metadata: all but the tokenizer's arrays; counts: length of every array; raw: each entry as stored."""

    path: Path
    version: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Reads little-endian values and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self.file, self.size, self.path = file, size, path

    def take(self, n: int) -> bytes:
        data = self.file.read(n) if 0 <= n <= self.size else b""
        if len(data) != n:
            raise ModelError(f"{self.path}: the file ends inside its own header ({self.size} bytes); {AGAIN}.")
        return data

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, keep: bool = True, depth: int = 0) -> tuple[Any, int]:
        """-> (value or None when not kept, array length or -1)"""
        if kind in SCALARS:
            return self.number(SCALARS[kind]), -1
        if kind == STRING:
            return self.string(), -1
        if kind == ARRAY and depth < 2:
            return self._array(keep, depth)
        raise ModelError(f"{self.path}: the header has a value of unknown type {kind}; {AGAIN}.")

    def _array(self, keep: bool, depth: int) -> tuple[Any, int]:
        kind, count = self.number("<I"), self.number("<Q")
        width = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8  # a string or an array takes 8 bytes at least
        if count * width > self.size:
            raise ModelError(
                f"{self.path}: the header declares an array of {count} values, more than the file holds; {AGAIN}."
            )
        if kind in SCALARS:
            data = self.take(count * width)
            return (list(struct.unpack(f"<{count}{SCALARS[kind][1]}", data)) if keep else None), count
        values = []
        for _ in range(count):
            v, _n = self.value(kind, keep, depth + 1)
            if keep:
                values.append(v)
        return (values if keep else None), count


def read_header(path: Path) -> Header:
    """Parse and check. Raises ModelError for a file that is not GGUF, is cut off, or contradicts itself."""
    size = path.stat().st_size
    with open(path, "rb", buffering=1 << 20) as file:
        cursor = _Cursor(file, size, path)
        header = Header(path)
        header.version, n_tensors, n_entries = _preamble(cursor)
        for _ in range(n_entries):
            _read_entry(cursor, header)
        rows = [_read_tensor_row(cursor) for _ in range(n_tensors)]
        data_start = _aligned(file.tell(), _alignment(header))
    for name, dims, ggml_type, offset in rows:
        if name in header.tensors:
            raise ModelError(f"{path}: two tensors are called {name!r}; {AGAIN}.")
        header.tensors[name] = _checked(path, size, name, dims, ggml_type, data_start + offset)
    return header


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4) if cursor.size >= 4 else b""
    if magic == MAGIC and cursor.size < 24:
        raise ModelError(f"{cursor.path} ends after {cursor.size} bytes; {AGAIN}.")
    if magic != MAGIC:
        raise ModelError(
            f"{cursor.path} is not a GGUF file (it does not begin with 'GGUF'); give a .gguf file or a model folder."
        )
    version = cursor.number("<I")
    if version not in (2, 3):
        odd = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise ModelError(
            f"{cursor.path}: {odd} GGUF cannot be read, versions 2 and 3 (little-endian) can; convert it again."
        )
    n_tensors, n_entries = cursor.number("<Q"), cursor.number("<Q")
    if n_tensors * 24 > cursor.size or n_entries * 13 > cursor.size:
        raise ModelError(f"{cursor.path}: the header declares more entries than the file has room for; {AGAIN}.")
    return version, n_tensors, n_entries


def _read_entry(cursor: _Cursor, header: Header) -> None:
    begin = cursor.file.tell()
    key, kind = cursor.string(), cursor.number("<I")
    value, count = cursor.value(kind, keep=not key.startswith("tokenizer."))
    end = cursor.file.tell()
    if count >= 0:
        header.counts[key] = count
    if value is None:
        return
    header.metadata[key] = value
    cursor.file.seek(begin)
    header.raw[key] = cursor.take(end - begin)


def _read_tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.string(), cursor.number("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ModelError(
            f"{cursor.path}: tensor {name!r} declares {n_dims} dimensions, 1 to {MAX_DIMS} are possible; {AGAIN}."
        )
    dims = tuple(cursor.number("<Q") for _ in range(n_dims))
    return name, dims[::-1], cursor.number("<I"), cursor.number("<Q")


def _alignment(header: Header) -> int:
    align = header.metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align <= 0 or align & (align - 1):
        raise ModelError(f"{header.path}: alignment {align} is not a power of two; {AGAIN}.")
    return align


def _aligned(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


def _checked(path: Path, size: int, name: str, shape: tuple[int, ...], ggml_type: int, start: int) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (ValueError, KeyError):
        raise ModelError(
            f"{path}: tensor {name!r} has the unknown type {ggml_type}; try `pip install -U gguf`."
        ) from None
    if min(shape) < 1 or shape[-1] % block:
        raise ModelError(f"{path}: tensor {name!r} of shape {shape} does not divide into blocks of {block}; {AGAIN}.")
    row_bytes = shape[-1] // block * block_bytes
    n_bytes = row_bytes
    for n in shape[:-1]:
        n_bytes *= n
    if start + n_bytes > size:
        raise ModelError(
            f"{path}: tensor {name!r} ends at byte {start + n_bytes}, but the file has {size}: it is cut off; {AGAIN}."
        )
    return TensorInfo(name, shape, ggml_type, start, n_bytes, row_bytes)


def config_stub(header: Header) -> bytes:
    """A GGUF of a few kilobytes with this file's metadata and tensor names, but no vocabulary and one-element tensors.

    transformers derives a model's configuration from metadata and tensor names only, but its reader first walks all of
    the hundred thousand vocabulary entries; handing it this instead saves seconds and a hundred megabytes.
    """
    entries = list(header.raw.values())
    if "tokenizer.ggml.tokens" in header.counts:
        one_token = struct.pack("<IIQQ", ARRAY, STRING, 1, 1) + b"?"
        entries.append(_packed_string("tokenizer.ggml.tokens") + one_token)
    align = _alignment(header)
    step = _aligned(4, align)
    rows = [_packed_string(name) + struct.pack("<IQIQ", 1, 1, F32, i * step) for i, name in enumerate(header.tensors)]
    head = MAGIC + struct.pack("<IQQ", header.version, len(rows), len(entries)) + b"".join(entries) + b"".join(rows)
    return head.ljust(_aligned(len(head), align), b"\0") + bytes(step * len(rows))


def _packed_string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
