"""Models in a folder: config.json and model.safetensors, one file or shards listed in model.safetensors.index.json.

    length u64 | JSON {name: {dtype, shape, data_offsets: [begin, end]}} | tensor bytes

Read here rather than through the safetensors package because its tensors share a memory map of the file: every page
touched would count as resident memory, and writing the file elsewhere would change the weights.
Source: the safetensors format description (huggingface/safetensors README).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError
from lowbit.sources.base import ModelSource, read_into

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # the format's own limit
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OLD_WORDS = ((".gamma", ".weight"), (".beta", ".bias"))  # norms of early BERT checkpoints
AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Entry:
    path: Path
    start: int  # absolute place in the file
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsSource(ModelSource):
    kind = "safetensors"

    def __init__(self, path: Path, name: str | None = None, kind: str = "safetensors"):
        self.kind = kind
        self._shards = weight_files(path)
        self._table: dict[str, Entry] = {}
        for shard in self._shards:
            self._table.update(read_header(shard))
        super().__init__(path, name or path.resolve().name)

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(self.path), trust_remote_code=False)
        except Exception as e:  # a damaged config fails in as many ways as there are keys
            first = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise ModelError(
                f"{self.path / 'config.json'} cannot be used: {first}; {AGAIN}, or `pip install -U transformers`."
            ) from e
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{self.path} is quantized already (config.json has quantization_config); "
                "give the float model it came from."
            )
        return config

    def _find(self, model: nn.Module, names: list[str]) -> dict[str, Entry]:
        stored = dict(self._table)
        for old, new in OLD_WORDS:
            stored |= {n.removesuffix(old) + new: e for n, e in stored.items() if n.endswith(old)}
        prefix = getattr(model, "base_model_prefix", "") + "."
        found = {}
        for name in names:  # checkpoints of the bare model lack the head's prefix, and the reverse
            for word in (name, name.removeprefix(prefix), prefix + name):
                if word in stored:
                    found[name] = stored[word]
                    break
        return found

    def _stored_count(self) -> int:
        return len(self._table)

    def _unread(self) -> list[str]:
        read = {(e.path, e.start) for e in self._entries.values()}
        return [name for name, e in self._table.items() if (e.path, e.start) not in read]

    def _stored_shape(self, entry: Entry) -> tuple[int, ...]:
        return entry.shape

    def _dtype(self, entry: Entry) -> torch.dtype:
        return entry.dtype

    def _read(self, entry: Entry) -> Tensor:
        out = torch.empty(entry.shape, dtype=entry.dtype)
        read_into(entry.path, entry.start, out)
        return out

    def _files(self) -> list[Path]:
        return [self.path / "config.json", *self._shards]

    def load_tokenizer(self) -> Any:
        """The folder's tokenizer. Raises ModelError when it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.path), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as e:
            first = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise ModelError(
                f"{self.path} has no tokenizer that loads ({first}); copy the model's tokenizer files into it."
            ) from e


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted. Raises ModelError when there are none, or a shard is missing."""
    if (folder / INDEX).is_file():
        shards = sorted({folder / name for name in _index_names(folder / INDEX)})
    else:
        shards = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    absent = [p for p in shards if not p.is_file()]
    if absent:
        raise ModelError(f"{folder}: {absent[0].name} is listed in {INDEX} but not there; download the folder again.")
    if not shards:
        raise ModelError(
            f"{folder} has no .safetensors and no .gguf file; give a folder with config.json and model.safetensors."
        )
    return shards


def _index_names(path: Path) -> list[str]:
    try:
        names = list(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{path} is not a safetensors index ({e}); {AGAIN}.") from e
    if not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ModelError(f"{path} names files outside its folder; {AGAIN}.")
    return names


def read_header(path: Path) -> dict[str, Entry]:
    """Table of one file, every number checked against the file's size. Raises ModelError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > min(MAX_HEADER, size - 8):
            raise ModelError(
                f"{path} is not a whole safetensors file (its header does not fit its {size} bytes); {AGAIN}."
            )
        text = file.read(n)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        return {name: _entry(path, size, 8 + n, name, row) for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: the safetensors header is damaged ({type(e).__name__}: {e}); {AGAIN}.") from e


def _entry(path: Path, size: int, data_start: int, name: str, row: dict[str, Any]) -> Entry:
    begin, end = (int(v) for v in row["data_offsets"])
    if row["dtype"] not in DTYPES:
        raise ModelError(
            f"{path}: {name} is stored as {row['dtype']}, which lowbit does not read; save it as F16, BF16 or F32."
        )
    dtype, shape = DTYPES[row["dtype"]], tuple(int(v) for v in row["shape"])
    if min(shape, default=1) < 0 or not 0 <= begin <= end or end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ModelError(f"{path}: {name} declares shape {list(shape)} but {end - begin} bytes; {AGAIN}.")
    if data_start + end > size:
        raise ModelError(
            f"{path}: {name} ends at byte {data_start + end}, but the file has {size}: it is cut off; {AGAIN}."
        )
    return Entry(path, data_start + begin, dtype, shape)
