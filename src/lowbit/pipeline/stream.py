"""The walk: embeddings, then block after block (read, statistics, solve, pack, forget), then the output head.

Only one block's float weights, the hidden states of all windows (twice for methods that also follow the float model's)
and one solver's work are in memory at a time. Every
finished piece goes to a store, so that a killed run goes on from the last finished block and ends with the same bytes.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError, ModelError, RecipeError, ShapeError
from lowbit.evaluate import resident_memory_bytes
from lowbit.formats import Format, QuantizedTensor
from lowbit.pipeline.blocks import (
    all_inputs,
    block_calls,
    find_blocks,
    input_groups,
    layer_matrix,
    layer_type,
    linear_layers,
    run_block,
    run_block_with,
)
from lowbit.pipeline.checkpoint import Entries, Store
from lowbit.pipeline.describe import layer_entry, layer_errors, layer_tensors
from lowbit.pipeline.embeddings import quantize_rows
from lowbit.pipeline.fold import find_producer, fold
from lowbit.pipeline.forwards import SequentialForwards
from lowbit.pipeline.gradients import gather_gradients
from lowbit.pipeline.memory import Plan, Sizes, make_plan, release_memory
from lowbit.pipeline.reorder import Partners, arrange
from lowbit.recipe import Recipe
from lowbit.solvers import Solution
from lowbit.sources import ModelSource, check_finite, drop, set_tensor
from lowbit.statistics import GramAccumulator, LayerStatistics

Progress = Callable[[dict[str, Any]], None]
Started = dict[str, tuple[Solution, LayerStatistics]]  # layer name in its block -> start for tuning, its statistics
Solved = dict[str, tuple[Entries, QuantizedTensor]]  # full layer name -> (entry of the manifest, quantized tensor)


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
        self.producers: dict[tuple[str, ...], str | None] = {}
        self.entering: list[Tensor] = []
        self.partners: Partners | None = None  # whose hidden channels can be reordered together
        self.own: dict[str, LayerStatistics] = {}  # of layers of this block that have statistics of their own
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
            solved = self._solve_all(i, block, hidden, recompute)
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

    def _solve_all(self, i: int, block: nn.Module, hidden: list[Tensor], recompute: bool) -> Solved:
        """All layers of a block; advances the hidden states in place."""
        if self.windows is None:
            return self._solve_group(i, block, list(linear_layers(block)), None)
        groups = input_groups(block, hidden[0], *self.calls[i])
        if self.recipe.solver.reorders:
            self.partners = arrange(block, hidden[0], self.calls[i], self.partners)
        unused = [n for n in linear_layers(block) if n not in {m for g in groups for m in g}]
        self._check_unused(i, unused)
        if self.recipe.solver.smooth is not None:
            return self._solve_smoothed(i, block, groups, hidden)
        solved: Solved = {}
        started: Started = {}
        streams = self._streams(i, block, hidden, recompute)
        gradients = self.store.scratch.take(f"gradients-{i}") if self.recipe.gram != "inputs" else {}
        for group in groups:
            width = layer_matrix(block.get_submodule(group[0])).shape[1]
            last = group is groups[-1]  # the float model's passes need not wait for its solution
            inputs = zip(*(s.inputs(group[0], last and s is not streams[0]) for s in streams), strict=True)
            found = {n: gradients[n] for n in group if n in gradients}
            statistics, self.own = _accumulate(inputs, width, self.recipe.gram, found)
            if self.recipe.solver.tune is None:
                solved |= self._solve_group(i, block, group, statistics)
            else:
                started |= {n: (s, statistics) for n, s in self._solutions(i, block, group, statistics).items()}
                _put_in_place(block, {n: started[n][0] for n in group if n in started})
        if started:
            solved = self._tuned(i, started, streams, hidden)
        else:
            hidden[:] = [h for s in streams for h in s.outputs()]
        return solved | self._solve_group(i, block, unused, None)

    def _tuned(self, i: int, started: Started, streams: list[SequentialForwards], hidden: list[Tensor]) -> Solved:
        """Solutions of a whole block, bettered on its outputs, whose target are the float copy's.

        Advances the hidden states in place.
        """
        own, floats = streams
        block, targets = own.block.requires_grad_(False), floats.outputs()
        w = {n: layer_matrix(floats.block.get_submodule(n)).detach() for n in started}

        def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return run_block_with(block, weights, x, *self.calls[i])

        tune, options = self.recipe.solver.tune, self.recipe.solver_options
        assert tune is not None
        starts = {n: (s, w[n]) for n, (s, _) in started.items()}
        found = tune(starts, forward, hidden[: len(targets)], targets, seed=self.recipe.seed + i, **options)
        own.restart()
        solved: Solved = {}
        for name, (start, statistics) in started.items():
            layer = block.get_submodule(name)
            layer_matrix(layer).copy_(w[name])
            solved[f"{self.prefix}.{i}.{name}"] = self._finish(i, name, layer, found.get(name, start), statistics)
        hidden[:] = [*own.outputs(), *targets]
        return solved

    @property
    def streams(self) -> int:
        """How many sets of hidden states are carried: the own one, and the float model's where that is the aim."""
        return 2 if self.recipe.solver_options.get("drift") or self.recipe.solver.tune else 1

    def _streams(self, i: int, block: nn.Module, hidden: list[Tensor], recompute: bool) -> list[SequentialForwards]:
        """Passes through the block that is being solved and, to follow the float model, through a float copy of it."""
        n = len(hidden) // self.streams
        own = SequentialForwards(block, hidden[:n], self.calls[i], recompute)
        if self.streams == 1:
            return [own]
        return [own, SequentialForwards(copy.deepcopy(block), hidden[n:], self.calls[i], recompute)]

    def _check_unused(self, i: int, names: list[str]) -> None:
        """Layers without inputs have no statistics: only a method without data can round them."""
        for name in names:
            full = f"{self.prefix}.{i}.{name}"
            spec, _ = self.recipe.solver_for(full)
            if spec.needs_data and self.recipe.format_for(full) is not None:
                raise RecipeError(
                    f"the model does not use {full} on the calibration text, so {spec.name} cannot round it. "
                    f'Leave it as it is: layers: [{{match: "*.{name}", format: float}}] in a recipe.'
                )

    def _solve_smoothed(self, i: int, block: nn.Module, groups: list[list[str]], hidden: list[Tensor]) -> Solved:
        """AWQ's order: all groups see the float block.

        Statistics of all groups, fold all scalings, then solve, then one pass with the rounded weights.
        """
        statistics = self._float_statistics(block, [g[0] for g in groups], hidden, self.calls[i])
        smooth = self.recipe.solver.smooth
        assert smooth is not None
        for group in groups:
            fmt = self.recipe.format_for(f"{self.prefix}.{i}.{group[0]}")
            key = tuple(group)
            if key not in self.producers:
                self.producers[key] = find_producer(block, group, hidden[0], *self.calls[i])
            producer = self.producers[key]
            if producer is None or fmt is None:
                continue
            t = smooth([layer_matrix(block.get_submodule(n)) for n in group], statistics[group[0]], fmt)
            fold(block, producer, group, t)
            statistics[group[0]] = statistics[group[0]].rescaled(t)
        solved: Solved = {}
        for group in groups:
            solved |= self._solve_group(i, block, group, statistics[group[0]])
        for k in range(len(hidden)):
            hidden[k] = run_block(block, hidden[k], *self.calls[i])
        return solved

    def _float_statistics(
        self, block: nn.Module, leaders: list[str], hidden: list[Tensor], call: tuple[tuple, dict[str, Any]]
    ) -> dict[str, LayerStatistics]:
        sums = {n: GramAccumulator(layer_matrix(block.get_submodule(n)).shape[1]) for n in leaders}
        for h in hidden:
            for name, x in all_inputs(block, leaders, h, *call)[0].items():
                sums[name].add(x)
        return {n: s.finish() for n, s in sums.items()}

    def _solve_group(self, i: int, block: nn.Module, group: list[str], statistics: "LayerStatistics | None") -> Solved:
        """Solve layers that share an input, describe them and put the rounded weights in place."""
        return {
            f"{self.prefix}.{i}.{name}": self._finish(i, name, block.get_submodule(name), solution, statistics)
            for name, solution in self._solutions(i, block, group, statistics).items()
        }

    def _solutions(
        self, i: int, block: nn.Module, group: list[str], statistics: "LayerStatistics | None"
    ) -> dict[str, Solution]:
        """Solve layers that share an input, stacked where their formats allow."""
        solutions: dict[str, Solution] = {}
        for names, fmt in self._stacks(i, group, statistics is not None):
            layers = [block.get_submodule(n) for n in names]
            w = torch.cat([layer_matrix(m) for m in layers]).contiguous()
            own = self.own.get(names[0], statistics)
            spec, options = self.recipe.solver_for(f"{self.prefix}.{i}.{names[0]}")
            solution = spec.solve(w, own, fmt, **options)
            start = 0
            for name, layer in zip(names, layers):
                rows = layer_matrix(layer).shape[0]
                solutions[name] = solution if len(layers) == 1 else solution.rows(start, start + rows)
                start += rows
        return solutions

    def _stacks(self, i: int, group: list[str], shared: bool) -> "list[tuple[list[str], Format]]":
        """Layers to solve together: same input, method and format, scales that do not reach over rows."""
        stacks: dict[Any, tuple[list[str], Format]] = {}
        for name in group:
            full = f"{self.prefix}.{i}.{name}"
            fmt = self.recipe.format_for(full)
            if fmt is not None:
                alone = not shared or fmt.blocks.rows != 1 or fmt.scale_dtype in ("double", "q3x16")
                alone = alone or name in self.own or self.recipe.solver_for(full)[0].alone
                key = name if alone else (fmt, self.recipe.solver_for(full)[0].name)
                stacks.setdefault(key, ([], fmt))[0].append(name)
        return list(stacks.values())

    def _finish(
        self, i: int, name: str, layer: nn.Module, solution: Solution, statistics: "LayerStatistics | None"
    ) -> tuple[Entries, QuantizedTensor]:
        """Describe one solved layer and give it its rounded weight."""
        full = f"{self.prefix}.{i}.{name}"
        w, kind = layer_matrix(layer), layer_type(layer)
        q = solution.quantized()
        w_hat = q.dequantize()
        entry = layer_entry(kind or "linear", q, getattr(layer, "bias", None) is not None)
        entry |= layer_errors(w, w_hat, solution.format, statistics) | {"notes": solution.notes}
        layer_matrix(layer).copy_(w_hat)
        self._say("layer", i, name=full, error=entry["error"], format=str(q.format), bits_per_weight=q.bits_per_weight)
        return entry, q

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


def _accumulate(
    inputs: Any, size: int, kind: str, gradients: dict[str, Tensor]
) -> tuple[LayerStatistics, dict[str, LayerStatistics]]:
    """Statistics of the inputs that some layers share, and those of each layer that has its own (see `gradients`).

    inputs: tuples of x and, to follow the float model, its x
    """
    gram = GramAccumulator(size)
    guided = {n: GramAccumulator(size) for n in gradients} if kind == "guided" else {}
    for k, xs in enumerate(inputs):
        gram.add(*xs)
        for name, own in guided.items():
            root = gradients[name][k].sqrt()[None, :, None]
            own.add(*(x * root for x in xs))
    shared = gram.finish()
    if kind == "oac":  # of the float model's inputs and outputs: there is no drift from them
        return shared, {n: replace(shared, gram=h, drift=None) for n, h in gradients.items()}
    if kind == "fisher":
        return shared, {n: replace(shared, fisher=f) for n, f in gradients.items()}
    return shared, {n: own.finish() for n, own in guided.items()}


def _put_in_place(block: nn.Module, solutions: dict[str, Solution]) -> None:
    for name, solution in solutions.items():
        layer_matrix(block.get_submodule(name)).copy_(solution.w_hat())


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
