"""The walk: embeddings, then block after block (read, statistics, solve, pack, forget), then the output head.

Only one block's float weights, the hidden states of all windows (twice for methods that also follow the float model's)
and one solver's work are in memory at a time. Every finished piece goes to a store, so that a killed run goes on from
the last finished block and ends with the same bytes. How one block is solved stands in `pipeline.solve`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError, ModelError, RecipeError, ShapeError
from lowbit.evaluate import resident_memory_bytes
from lowbit.formats import Format, QuantizedTensor
from lowbit.pipeline.blocks import block_calls, find_blocks, layer_matrix, layer_type, linear_layers
from lowbit.pipeline.checkpoint import Entries, Store
from lowbit.pipeline.describe import layer_entry, layer_tensors
from lowbit.pipeline.embeddings import quantize_rows
from lowbit.pipeline.gradients import gather_gradients
from lowbit.pipeline.memory import Plan, Sizes, make_plan, release_memory
from lowbit.pipeline.solve import BlockSolver
from lowbit.recipe import Recipe
from lowbit.sources import ModelSource, check_finite, drop, set_tensor

Progress = Callable[[dict[str, Any]], None]


@dataclass
class Walk:
    """One compression.

    windows: (n, context) token ids, or None for methods that need no data (errors are then of the weights)
    """

    source: ModelSource
    recipe: Recipe
    store: Store
    windows: "Tensor | None"
    progress: Progress = lambda event: None
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.source.new_skeleton()
        config: Any = getattr(self.model, "config", None)
        if config is not None:
            config.use_cache = False
        self.prefix, self.blocks = find_blocks(self.model)
        self.names = self.source.keys()
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.entering: list[Tensor] = []
        self.solver = BlockSolver(self)
        self.check_shapes()

    # -- before anything runs

    def check_shapes(self) -> None:
        """Every layer's format must fit its shape, every rule match a layer; said before any work is done."""
        names = []
        for i, block in enumerate(self.blocks):
            for name, layer in linear_layers(block).items():
                full = f"{self.prefix}.{i}.{name}"
                names.append(full)
                fmt = self.recipe.format_for(full)
                if fmt is not None:
                    _fits(full, fmt, tuple(layer_matrix(layer).shape))
        for rule in self.recipe.layers:
            if not any(fnmatchcase(n, rule.match) for n in names):
                raise RecipeError(f"no layer matches {rule.match!r}. Layers are called e.g. {names[-1]}.")

    def plan(self, start_bytes: int, ceiling: "int | None" = None) -> Plan:
        """The estimate of memory and time. Raises MemoryPlanError when it exceeds the ceiling."""
        shapes = [tuple(layer_matrix(m).shape) for m in linear_layers(self.blocks[0]).values()]
        by_input: dict[int, int] = {}
        for out, in_ in shapes:
            by_input[in_] = by_input.get(in_, 0) + out * in_
        embedding, head = self.embedding(), self.head()
        sizes = Sizes(
            start_bytes=start_bytes,
            outside=sum(p.numel() for n, p in self.model.named_parameters() if not self._in_blocks(n)),
            head=0 if head is None else layer_matrix(self.model.get_submodule(head)).numel(),
            block=sum(p.numel() for p in self.blocks[0].parameters()),
            width=0 if embedding is None else layer_matrix(self.model.get_submodule(embedding)).shape[1],
            widest_input=max(in_ for _, in_ in shapes),
            widest_group=max(by_input.values()),
            tokens=0 if self.windows is None else self.windows.numel(),
            streams=self.streams,
            blocks=len(self.blocks),
            gram=sum(in_**2 for _, in_ in shapes),
        )
        return make_plan(sizes, ceiling, 1 if self.windows is None else len(self.windows))

    # -- the run

    @torch.no_grad()
    def run(self, recompute: bool = False) -> list[str]:
        """Do what the store does not hold yet. Returns the names of all pieces, in order."""
        start, hidden = self._where_to_go_on()
        if start:
            self.progress({"event": "resume", "block": start, "blocks": len(self.blocks)})
        hidden = self._opening(hidden, need_hidden=start < len(self.blocks))
        if self.recipe.gram != "inputs" and start < len(self.blocks):
            gather_gradients(self, self.entering, self.recipe.gram)
        self.entering = []  # each block replaces its hidden states; these would stay beside them
        release_memory()
        began = time.perf_counter()
        for i in range(start, len(self.blocks)):
            hidden = self._block(i, hidden, recompute)
            release_memory()
            per_block = (time.perf_counter() - began) / (i + 1 - start)
            self._say("block", i, eta_seconds=per_block * (len(self.blocks) - i - 1))
        self._closing()
        return ["opening", *(f"block-{i:04d}" for i in range(len(self.blocks))), "closing"]

    def _where_to_go_on(self) -> tuple[int, list[Tensor]]:
        """The first block to do and the hidden states that enter it ([] where they must be computed anew).

        Hidden states that lie beyond a missing block are of no use: then everything is done again.
        """
        done = next((i for i in range(len(self.blocks)) if not self.store.has(f"block-{i:04d}")), len(self.blocks))
        if self.windows is None:
            return done, []
        start, hidden = self.store.newest_hidden() or (0, [])
        return (start, hidden) if start <= done and len(hidden) == self.streams * len(self.windows) else (0, [])

    def _opening(self, hidden: list[Tensor], need_hidden: bool) -> list[Tensor]:
        """Everything outside the blocks but an untied head.

        Quantizes the embedding, keeps the rest, and runs up to the first block.
        """
        calibrate = self.windows is not None and need_hidden
        if self.store.has("opening") and not calibrate:
            return hidden
        embedding = self.embedding()
        names = [n for n in self.names if not self._in_blocks(n) and not self._of_head(n)]
        plain, tensors, entries = self._read(names), {}, {}
        followed = self._first_hidden() if calibrate and not hidden and self.streams == 2 else []
        if embedding is not None and (packed := self._pack_embedding(embedding, calibrate)):
            plain.pop(f"{embedding}.weight")
            tensors, entries = layer_tensors(embedding, packed), {embedding: layer_entry("embedding", packed, False)}
        if not self.store.has("opening"):
            self.store.put("opening", {**tensors, **plain}, {"layers": entries, "plain": list(plain)})
        if calibrate:
            self.entering = self._first_hidden()
            first = self.entering + followed
            if not hidden:
                hidden = first
                self.store.put_hidden(0, hidden)
        self._forget(names)
        return hidden

    def _pack_embedding(self, name: str, keep: bool) -> "QuantizedTensor | None":
        w = layer_matrix(self.model.get_submodule(name))
        fmt = self.recipe.embedding_format(w.shape[1])
        return None if fmt is None else quantize_rows(w, fmt, keep=keep)

    def _first_hidden(self) -> list[Tensor]:
        """Hidden states entering the first block, one (1, tokens, width) tensor a window.

        Remembers how each block is called.
        """
        assert self.windows is not None
        hidden = []
        for ids in self.windows:
            calls = block_calls(self.model, self.blocks, {"input_ids": ids[None]})
            hidden.append(calls[0][0][0].clone())
            if not self.calls:
                self.calls = [(args[1:], kwargs) for args, kwargs in calls]
        return hidden

    def _block(self, i: int, hidden: list[Tensor], recompute: bool) -> list[Tensor]:
        """Read, solve and store one block; returns the hidden states that enter the next."""
        block, began = self.blocks[i], time.perf_counter()
        names = [n for n in self.names if n.startswith(f"{self.prefix}.{i}.")]
        plain = self._read(names)
        with _naming(f"block {i}"):
            solved = self.solver.solve(i, block, hidden, recompute)
        tensors: dict[str, Tensor] = {}
        layers: Entries = {}
        for name, (entry, q) in solved.items():
            plain.pop(f"{name}.weight", None)
            tensors |= layer_tensors(name, q)
            layers[name] = entry
        for name in self._changed(plain):
            plain[name] = self.model.get_parameter(name).detach().to(plain[name].dtype)
        entries = {"layers": layers, "plain": list(plain), "seconds": time.perf_counter() - began}
        self.store.put(f"block-{i:04d}", {**tensors, **plain}, entries)
        if self.windows is not None:
            self.store.put_hidden(i + 1, hidden)
        self._forget(names)
        return hidden

    def read_block(self, i: int) -> list[str]:
        """Bring a block's weights into the model; returns their names."""
        names = [n for n in self.names if n.startswith(f"{self.prefix}.{i}.")]
        self._read(names)
        return names

    @property
    def streams(self) -> int:
        """How many sets of hidden states are carried: the own one, and the float model's where that is the aim."""
        return 2 if self.recipe.solver_options.get("drift") or self.recipe.solver.tune else 1

    def _closing(self) -> None:
        """An output head with weights of its own."""
        if self.store.has("closing"):
            return
        head = self.head()
        names = [n for n in self.names if self._of_head(n)]
        plain, tensors, entries = self._read(names), {}, {}
        if head is not None:
            module = self.model.get_submodule(head)
            fmt = self.recipe.embedding_format(layer_matrix(module).shape[1])
            if fmt is not None:
                q = quantize_rows(layer_matrix(module), fmt)
                plain.pop(f"{head}.weight")
                tensors, entries = layer_tensors(head, q), {head: layer_entry("linear", q, f"{head}.bias" in plain)}
        self.store.put("closing", {**tensors, **plain}, {"layers": entries, "plain": list(plain)})
        self._forget(names)

    # -- small things

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Bring tensors into the model as float32; returns them as the source has them."""
        read = {}
        aliases: dict[str, list[str]] = {}
        for alias, owner in self.source.tied.items():
            aliases.setdefault(owner, []).append(alias)
        for name in names:
            tensor = self.source.get(name)
            check_finite(name, tensor)
            read[name] = tensor
            value = tensor.float() if tensor.is_floating_point() else tensor
            for place in (name, *aliases.get(name, [])):
                set_tensor(self.model, place, value)
        return read

    def _changed(self, plain: dict[str, Tensor]) -> list[str]:
        """Plain tensors that folding has changed. Float32 ones share the model's memory: they are up to date."""
        own = dict(self.model.named_parameters())
        return [n for n, t in plain.items() if n in own and not torch.equal(own[n].detach(), t.to(own[n].dtype))]

    def _forget(self, names: list[str]) -> None:
        """Take the memory of a piece's weights away from the model."""
        own = dict(self.model.named_parameters())
        drop(self.model, [n for n in names if n in own])

    def _in_blocks(self, name: str) -> bool:
        return name.startswith(f"{self.prefix}.")

    def embedding(self) -> "str | None":
        """The module that ids go into, where there is one."""
        return _module_name(self.model, getattr(self.model, "get_input_embeddings", lambda: None)())

    def head(self) -> "str | None":
        """The output head if it has weights of its own."""
        name = _module_name(self.model, getattr(self.model, "get_output_embeddings", lambda: None)())
        if name is None or f"{name}.weight" in self.source.tied:
            return None
        return name if layer_type(self.model.get_submodule(name)) == "linear" else None

    def _of_head(self, name: str) -> bool:
        head = self.head()
        return head is not None and name.startswith(f"{head}.")

    def _say(self, event: str, i: int, **more: Any) -> None:
        memory = {"rss_bytes": resident_memory_bytes()}
        self.progress({"event": event, "block": i, "blocks": len(self.blocks), **memory, **more})


def _module_name(model: nn.Module, wanted: Any) -> "str | None":
    return next((n for n, m in model.named_modules() if m is wanted), None) if wanted is not None else None


def _fits(name: str, fmt: Format, shape: tuple[int, ...]) -> None:
    try:
        fmt.blocks.size(*shape)
    except ShapeError as e:
        raise ShapeError(f"{name}: {e}") from None


class _naming:
    """Add the place to errors that come from inside."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, LowbitError) and not isinstance(error, ModelError):
            raise type(error)(f"{self.place}: {error}") from error
