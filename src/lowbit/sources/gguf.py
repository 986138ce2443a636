"""Models in one GGUF file (llama.cpp), dequantised to float32 with transformers' names and layouts.

Three translations are needed: metadata -> configuration and layouts (both from transformers' own GGUF support), and
tensor names (from the gguf package's table). Layouts differ where llama.cpp reorders rows, e.g. for Llama's q and k: it
interleaves the two halves that rotate together,

    gguf row  h*d + 2*i + j   =   transformers row  h*d + j*d/2 + i       (head h of width d, j in {0, 1})
"""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import ModelError
from lowbit.sources.base import ModelSource, read_into
from lowbit.sources.gguf_header import Header, TensorInfo, config_stub, read_header

ROWS_ELEMENTS = 1 << 20  # weights dequantised per step


@dataclass(frozen=True)
class Entry:
    """The stored tensors one transformers tensor is made of (more than one only where experts are merged)."""

    name: str
    parts: tuple[TensorInfo, ...]


class GgufSource(ModelSource):
    kind = "gguf"

    def __init__(self, path: Path, name: str | None = None):
        self.header: Header = read_header(path)
        super().__init__(path, name)

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        with tempfile.TemporaryDirectory() as folder, _wrapped(self.path):
            Path(folder, "header.gguf").write_bytes(config_stub(self.header))
            config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf", trust_remote_code=False)
        if config.vocab_size == 1:  # the stub's vocabulary; the file's own counts
            config.vocab_size = self.header.counts["tokenizer.ggml.tokens"]
        config._name_or_path = self.name
        return config

    def _find(self, model: nn.Module, names: list[str]) -> dict[str, Entry]:
        self._processor = _processor(self.header.architecture, self.config)
        self._names = _gguf_names(self.header.architecture, self.config, model, self._processor, names)
        parts: dict[str, list[TensorInfo]] = {}
        for stored, name in self._names.items():
            if stored in self.header.tensors:
                parts.setdefault(name, []).append(self.header.tensors[stored])
        return {name: Entry(name, tuple(infos)) for name, infos in parts.items()}

    def _stored_count(self) -> int:
        return len(self.header.tensors)

    def _unread(self) -> list[str]:
        read = {info.name for entry in self._entries.values() for info in entry.parts}
        return [name for name in self.header.tensors if name not in read and self._names.get(name) not in self.tied]

    def _stored_shape(self, entry: Entry) -> tuple[int, ...]:
        infos, wanted = entry.parts, self._shapes[entry.name]
        same = sum(i.n_bytes // i.row_bytes * i.shape[-1] for i in infos) if len(infos) > 1 else 0
        if same == torch.Size(wanted).numel() or sorted(_squeezed(infos[0].shape)) == sorted(_squeezed(wanted)):
            return wanted  # transposed, merged or with a dimension of one: `get` checks the final shape
        return infos[0].shape

    def _dtype(self, entry: Entry) -> torch.dtype:
        return torch.float32

    def _read(self, entry: Entry) -> Tensor:
        merged: dict[str, Tensor] = {}
        for info in entry.parts:
            weights = dequantise(self.path, info)
            with np.errstate(all="ignore"):
                done = self._processor.process(
                    weights=weights.numpy(),
                    name=info.name,
                    tensor_key_mapping=self._names,
                    parsed_parameters={"tensors": merged},
                )
            if done.name is None:
                continue
            if done.weights.ctypes.data == weights.data_ptr() and done.weights.shape == weights.shape:
                return weights
            out = torch.empty(done.weights.shape, dtype=torch.float32)
            np.copyto(out.numpy(), done.weights)
            return out
        return next(iter(merged.values()))

    def _files(self) -> list[Path]:
        return [self.path]

    def load_tokenizer(self) -> Any:
        """The tokenizer in the file, with its chat template. Raises ModelError when there is none it can use."""
        from transformers import AutoTokenizer

        if "tokenizer.ggml.tokens" not in self.header.counts:
            raise ModelError(f"{self.path} holds no tokenizer; give one with --tokenizer FOLDER.")
        with _wrapped(self.path):
            return AutoTokenizer.from_pretrained(
                str(self.path.parent), gguf_file=self.path.name, trust_remote_code=False
            )


def dequantise(path: Path, info: TensorInfo) -> Tensor:
    """One stored tensor -> float32 of its shape, in row chunks so that little besides the result is in memory."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.ggml_type)
    out = torch.empty(info.shape, dtype=torch.float32)
    if kind == GGMLQuantizationType.F32:
        read_into(path, info.start, out)
        return out
    rows = out.view(-1, info.shape[-1]).numpy()
    step = max(1, ROWS_ELEMENTS // info.shape[-1])
    for r in range(0, len(rows), step):
        n = min(step, len(rows) - r)
        raw = torch.empty(n, info.row_bytes, dtype=torch.uint8)
        read_into(path, info.start + r * info.row_bytes, raw)
        with np.errstate(all="ignore"):  # damaged scales show as NaN or Inf, which `check_finite` names
            try:
                rows[r : r + n] = dequantize(raw.numpy(), kind)
            except NotImplementedError:
                raise ModelError(
                    f"{path}: tensor {info.name!r} is stored as {kind.name}, which the gguf package cannot decode; "
                    "use an F16, Q8_0 or Q4_0 file of the model, or try `pip install -U gguf`."
                ) from None
    return out


def _processor(architecture: str, config: Any) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def _gguf_names(architecture: str, config: Any, model: nn.Module, processor: Any, names: list[str]) -> dict[str, str]:
    """Stored name -> transformers name. Models converted without their head's prefix are found without it too."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    archs = [a for a, text in MODEL_ARCH_NAMES.items() if text == architecture]
    if not archs:
        raise ModelError(
            f"GGUF architecture {architecture!r} is unknown to the gguf package; try `pip install -U gguf`."
        )
    table = get_tensor_name_map(archs[0], config.num_hidden_layers)
    prefix = getattr(model, "base_model_prefix", "") + "."
    found: dict[str, str] = {}
    rename = getattr(processor, "preprocess_name", str)  # transformers before 4.52 has neither of the two hooks
    map_rest = getattr(processor, "perform_fallback_tensor_mapping", None)
    for name in names:
        tail = rename(name)
        base, _, suffix = tail.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = tail, ""
        stored = table.get_name(base) or table.get_name(base.removeprefix(prefix))
        dot = "." + suffix if suffix else ""
        if stored is not None:
            found.setdefault(stored + dot, name)
        elif map_rest is not None:
            map_rest(found, dot, "", tail)
    return found


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


@contextlib.contextmanager
def _wrapped(path: Path) -> Any:
    """Whatever transformers' GGUF reader raises becomes a sentence that names the file."""
    try:
        yield
    except Exception as e:  # damaged metadata fails in as many ways as there are keys
        first = (str(e).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{os.fspath(path)}: transformers cannot use this GGUF's metadata ({type(e).__name__}: {first}); "
            "try `pip install -U transformers gguf`, or give the model as a safetensors folder."
        ) from e
