"""One block of the walk: statistics of its layers' inputs, a solution for each layer, the rounded weights in place.

Layers that share an input share its statistics and are solved stacked where their formats allow. Each group of layers
sees the inputs that the rounded layers before it make; two orders differ from that: AWQ's (all groups see the float
block) and a tuned block's (all layers bettered together afterwards).
"""

import copy
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError
from lowbit.formats import Format, QuantizedTensor
from lowbit.pipeline.blocks import (
    all_inputs,
    input_groups,
    layer_matrix,
    layer_type,
    linear_layers,
    run_block,
    run_block_with,
)
from lowbit.pipeline.checkpoint import Entries
from lowbit.pipeline.describe import layer_entry, layer_errors
from lowbit.pipeline.fold import find_producer, fold
from lowbit.pipeline.forwards import SequentialForwards
from lowbit.pipeline.reorder import Partners, arrange
from lowbit.solvers import Solution
from lowbit.statistics import GramAccumulator, LayerStatistics

if TYPE_CHECKING:
    from lowbit.pipeline.stream import Walk

Started = dict[str, tuple[Solution, LayerStatistics]]  # layer name in its block -> start for tuning, its statistics
Solved = dict[str, tuple[Entries, QuantizedTensor]]  # full layer name -> (entry of the manifest, quantized tensor)


class BlockSolver:
    """Solves the blocks of a walk, one after the other; what it finds out about one block serves the next."""

    def __init__(self, walk: "Walk") -> None:
        self.walk: Walk = weakref.proxy(walk)  # no circle: a walk's memory goes with its last user
        self.producers: dict[tuple[str, ...], str | None] = {}
        self.partners: Partners | None = None  # whose hidden channels can be reordered together
        self.own: dict[str, LayerStatistics] = {}  # of layers of this block that have statistics of their own

    def solve(self, i: int, block: nn.Module, hidden: list[Tensor], recompute: bool) -> Solved:
        """All layers of a block; advances the hidden states in place."""
        if self.walk.windows is None:
            return self._solve_group(i, block, list(linear_layers(block)), None)
        groups = input_groups(block, hidden[0], *self.walk.calls[i])
        if self.walk.recipe.solver.reorders:
            self.partners = arrange(block, hidden[0], self.walk.calls[i], self.partners)
        unused = [n for n in linear_layers(block) if n not in {m for g in groups for m in g}]
        self._check_unused(i, unused)
        if self.walk.recipe.solver.smooth is not None:
            return self._solve_smoothed(i, block, groups, hidden)
        solved: Solved = {}
        started: Started = {}
        streams = self._streams(i, block, hidden, recompute)
        gradients = self.walk.store.scratch.take(f"gradients-{i}") if self.walk.recipe.gram != "inputs" else {}
        for group in groups:
            width = layer_matrix(block.get_submodule(group[0])).shape[1]
            last = group is groups[-1]  # the float model's passes need not wait for its solution
            inputs = zip(*(s.inputs(group[0], last and s is not streams[0]) for s in streams), strict=True)
            found = {n: gradients[n] for n in group if n in gradients}
            statistics, self.own = _accumulate(inputs, width, self.walk.recipe.gram, found)
            if self.walk.recipe.solver.tune is None:
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
            return run_block_with(block, weights, x, *self.walk.calls[i])

        tune, options = self.walk.recipe.solver.tune, self.walk.recipe.solver_options
        assert tune is not None
        starts = {n: (s, w[n]) for n, (s, _) in started.items()}
        found = tune(starts, forward, hidden[: len(targets)], targets, seed=self.walk.recipe.seed + i, **options)
        own.restart()
        solved: Solved = {}
        for name, (start, statistics) in started.items():
            layer = block.get_submodule(name)
            layer_matrix(layer).copy_(w[name])
            solved[f"{self.walk.prefix}.{i}.{name}"] = self._finish(i, name, layer, found.get(name, start), statistics)
        hidden[:] = [*own.outputs(), *targets]
        return solved

    def _streams(self, i: int, block: nn.Module, hidden: list[Tensor], recompute: bool) -> list[SequentialForwards]:
        """Passes through the block that is being solved and, to follow the float model, through a float copy of it."""
        n = len(hidden) // self.walk.streams
        own = SequentialForwards(block, hidden[:n], self.walk.calls[i], recompute)
        if self.walk.streams == 1:
            return [own]
        return [own, SequentialForwards(copy.deepcopy(block), hidden[n:], self.walk.calls[i], recompute)]

    def _check_unused(self, i: int, names: list[str]) -> None:
        """Layers without inputs have no statistics: only a method without data can round them."""
        for name in names:
            full = f"{self.walk.prefix}.{i}.{name}"
            spec, _ = self.walk.recipe.solver_for(full)
            if spec.needs_data and self.walk.recipe.format_for(full) is not None:
                raise RecipeError(
                    f"the model does not use {full} on the calibration text, so {spec.name} cannot round it. "
                    f'Leave it as it is: layers: [{{match: "*.{name}", format: float}}] in a recipe.'
                )

    def _solve_smoothed(self, i: int, block: nn.Module, groups: list[list[str]], hidden: list[Tensor]) -> Solved:
        """AWQ's order: all groups see the float block.

        Statistics of all groups, fold all scalings, then solve, then one pass with the rounded weights.
        """
        statistics = self._float_statistics(block, [g[0] for g in groups], hidden, self.walk.calls[i])
        smooth = self.walk.recipe.solver.smooth
        assert smooth is not None
        for group in groups:
            fmt = self.walk.recipe.format_for(f"{self.walk.prefix}.{i}.{group[0]}")
            key = tuple(group)
            if key not in self.producers:
                self.producers[key] = find_producer(block, group, hidden[0], *self.walk.calls[i])
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
            hidden[k] = run_block(block, hidden[k], *self.walk.calls[i])
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
            f"{self.walk.prefix}.{i}.{name}": self._finish(i, name, block.get_submodule(name), solution, statistics)
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
            spec, options = self.walk.recipe.solver_for(f"{self.walk.prefix}.{i}.{names[0]}")
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
            full = f"{self.walk.prefix}.{i}.{name}"
            fmt = self.walk.recipe.format_for(full)
            if fmt is not None:
                alone = not shared or fmt.blocks.rows != 1 or fmt.scale_dtype in ("double", "q3x16")
                alone = alone or name in self.own or self.walk.recipe.solver_for(full)[0].alone
                key = name if alone else (fmt, self.walk.recipe.solver_for(full)[0].name)
                stacks.setdefault(key, ([], fmt))[0].append(name)
        return list(stacks.values())

    def _finish(
        self, i: int, name: str, layer: nn.Module, solution: Solution, statistics: "LayerStatistics | None"
    ) -> tuple[Entries, QuantizedTensor]:
        """Describe one solved layer and give it its rounded weight."""
        full = f"{self.walk.prefix}.{i}.{name}"
        w, kind = layer_matrix(layer), layer_type(layer)
        q = solution.quantized()
        w_hat = q.dequantize()
        entry = layer_entry(kind or "linear", q, getattr(layer, "bias", None) is not None)
        entry |= layer_errors(w, w_hat, solution.format, statistics) | {"notes": solution.notes}
        layer_matrix(layer).copy_(w_hat)
        self.walk._say(
            "layer", i, name=full, error=entry["error"], format=str(q.format), bits_per_weight=q.bits_per_weight
        )
        return entry, q


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
