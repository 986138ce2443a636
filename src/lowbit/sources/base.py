"""What every model source offers, whatever the file format: transformers' names and shapes, one tensor at a time.

A format (gguf.py, safetensors.py) answers two questions, `_find` and `_read`; the rest is here.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError, near_names
from lowbit.sources import skeleton

CHUNK = 1 << 22  # bytes or elements per step when streaming
COMPUTED = (
    ".inv_freq",
    ".position_ids",
    ".attn.bias",
    ".attn.masked_bias",
    "rope_freqs.weight",
)  # saved, but never read


class ModelSource:
    """A float model on disk. Reads one tensor at a time into memory of its own; nothing is mapped.

    kind:    "gguf", "safetensors" or "hub"
    config:  the transformers configuration
    tied:    alias -> owner, for names that share one weight (lm_head.weight -> model.embed_tokens.weight)
    """

    kind = ""

    def __init__(self, path: Path, name: str | None = None):
        self.path = path
        self.name = name or path.stem
        self.config: Any = self._load_config()
        model = self._first_skeleton()
        if not self.config.architectures:
            self.config.architectures = [type(model).__name__]
        self.tied: dict[str, str] = skeleton.tied_names(model)
        self._shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        self._entries = self._match(model)

    # -- what a format provides

    def _load_config(self) -> Any:
        raise NotImplementedError

    def _find(self, model: nn.Module, names: list[str]) -> dict[str, Any]:
        """State-dict name -> whatever `_read` needs, for those of `names` that the files hold."""
        raise NotImplementedError

    def _stored_count(self) -> int:
        raise NotImplementedError

    def _unread(self) -> list[str]:
        """Stored names that no weight is made of, as the files call them."""
        raise NotImplementedError

    def _stored_shape(self, entry: Any) -> tuple[int, ...]:
        raise NotImplementedError

    def _dtype(self, entry: Any) -> torch.dtype:
        raise NotImplementedError

    def _read(self, entry: Any) -> Tensor:
        raise NotImplementedError

    def _files(self) -> list[Path]:
        """The files whose bytes make the model, in a fixed order."""
        raise NotImplementedError

    def load_tokenizer(self) -> Any:
        raise NotImplementedError

    # -- what callers use

    def keys(self) -> list[str]:
        """Names this source can give, in state-dict order; of names that share a weight only the owner."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        """Can `get` give it? Aliases of tied weights count."""
        return self.tied.get(name, name) in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._known(name)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype `get` returns."""
        return self._dtype(self._entries[self._known(name)])

    def get(self, name: str) -> Tensor:
        """One tensor in transformers' layout, in freshly allocated memory. Peak: about one such tensor.

        safetensors keep the dtype of the file; GGUF is dequantised to float32. A tied alias gives its owner's weight.
        Raises ModelError for a name the source lacks or a file that changed meanwhile.
        """
        name = self._known(name)
        tensor = self._read(self._entries[name])
        if tuple(tensor.shape) != self._shapes[name]:
            raise ModelError(self._shape_message(name, tuple(tensor.shape)))
        return tensor

    @cached_property
    def numel(self) -> int:
        """Weights (and stored buffers), a tied weight counted once."""
        return sum(torch.Size(self._shapes[n]).numel() for n in self._entries)

    @cached_property
    def nbytes_float(self) -> int:
        """Bytes of all tensors as `get` returns them, a tied weight counted once."""
        return sum(torch.Size(self._shapes[n]).numel() * self._dtype(e).itemsize for n, e in self._entries.items())

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over sizes and all bytes of the model's files, whatever the files are called."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self._files():
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            with open(path, "rb", buffering=0) as file:
                while block := file.read(CHUNK):
                    digest.update(block)
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.name}: {type(self.config).__name__.removesuffix('Config')}, {self.numel / 1e6:.1f} M weights, "
            f"{self.nbytes_float / 1e6:.0f} MB as float, read from {self.kind}"
        )

    def unused_note(self) -> str:
        """A line about stored weights that the model does not use; empty where there are none.

        Numbers that models compute for themselves (masks, positions, rotary frequencies) and second copies of shared
        weights are not meant.
        """
        names = [n for n in self._unread() if n not in self.tied and not n.endswith(COMPUTED)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"the file holds {names[0]}{more}, which the model does not use: left out" if names else ""

    def rounded_note(self) -> str:
        """A line about weights that are read with fewer digits than the file has; empty where there are none."""
        n = sum(self.dtype(name) == torch.float64 for name in self._entries)
        return f"{n} of {len(self)} tensors are float64 and are read as float32" if n else ""

    def new_skeleton(self, auto: Any = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The architecture in eval mode without weight memory; `fill(model, source)` brings the weights."""
        return skeleton.new_skeleton(self.config, auto, dtype)

    # -- inside

    def _first_skeleton(self) -> nn.Module:
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        if layers > self._stored_count():  # before building: a damaged number would build for hours
            raise ModelError(
                f"{self.path} declares {layers} layers but holds {self._stored_count()} tensors; check that config and "
                "weights belong together."
            )
        try:
            return self.new_skeleton()
        except ModelError:
            raise
        except Exception as e:
            first = (str(e).strip().splitlines() or [""])[0]
            raise ModelError(
                f"{self.path}: transformers cannot build this configuration ({type(e).__name__}: {first}); "
                "download the model again, or try `pip install -U transformers`."
            ) from e

    def _known(self, name: str) -> str:
        name = self.tied.get(name, name)
        if name not in self._entries:
            raise ModelError(f"{self.path} has no tensor {name!r}. {near_names(name, self.keys()[:400])}")
        return name

    def _match(self, model: nn.Module) -> dict[str, Any]:
        aliases = list(self.tied)
        found = self._find(model, list(self._shapes))
        for alias in aliases:  # a file may have kept either name of a shared weight
            entry = found.pop(alias, None)
            if entry is not None:
                found.setdefault(self.tied[alias], entry)
        self._check(model, found)
        return {name: found[name] for name in self._shapes if name in found}

    def _check(self, model: nn.Module, found: dict[str, Any]) -> None:
        missing = [n for n, _ in model.named_parameters() if n not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"{self.path} has no weights for {missing[0]}{more}, which {type(model).__name__} needs; check that "
                "config.json (`architectures`) and the weight files belong together."
            )
        own = dict(model.named_parameters())
        for name, entry in found.items():
            if name in own and not self._dtype(entry).is_floating_point:
                raise ModelError(
                    f"{self.path}: {name} is stored as whole numbers ({self._dtype(entry)}), so the model is quantized "
                    "already; give the float model it came from."
                )
            if (given := self._stored_shape(entry)) != self._shapes[name]:
                raise ModelError(self._shape_message(name, given))

    def _shape_message(self, name: str, given: tuple[int, ...]) -> str:
        return (
            f"{self.path}: {name} has shape {list(given)}, but the configuration needs {list(self._shapes[name])}; "
            "check that config and weights belong together."
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ModelError naming the tensor if any value is NaN or infinite. Cost: one pass, a few megabytes."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    bad = sum(int((~part.isfinite()).sum()) for part in flat.split(CHUNK))
    if bad:
        raise ModelError(
            f"{name}: {bad} of {flat.numel()} values are NaN or infinite, so nothing compressed from it could work; "
            "download or convert the model again."
        )


def read_into(path: Path, start: int, out: Tensor) -> None:
    """Fill a contiguous tensor with the file's bytes from `start`, without a copy in between."""
    view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < len(view):
            n = file.readinto(view[done:])
            if not n:
                raise ModelError(
                    f"{path}: the file ends at byte {start + done}, {len(view) - done} too early; "
                    "it was cut off or changed while in use. Download or copy it again."
                )
            done += n
