"""The probe: what every layer would lose in every option, from one pass forward and one back over a few windows.

    y_t ~ p(. | x; W)  sampled from the float model,    g = d(-log p(y)) / d(layer output)
    loss(layer, option) = 1/(2T) sum_t sum_j (g_tj * dW_j x_t)^2  ~  1/(2T) sum_j f_j/S dW_j H_s dW_j^T
    H_s = sum_t s_t x_t x_t^T,   s_t = sum_j g_tj^2,   f_j = sum_t g_tj^2,   S = sum_tj g_tj^2

This is the Fisher form of the KL between the float model's predictions and those with this layer alone rounded, in nats
a token: labels drawn from the model make it the Gauss-Newton second order of that KL. dW comes from the real solver,
run on a sample of the layer's rows (rows are independent given the inputs) with the inputs of other windows: a solver
looks better than it is on the windows it has seen. Output errors of different rows and tokens are taken as
uncorrelated, and g_tj^2 as a product of a token's and a row's share (derived). The output head's KL is measured
outright.

    trace      Tr(H_s)/(out*in) |dW|^2 / (2T): the same Fisher matrix, averaged over all directions, as HAWQ-V2 has it
               (Dong 2019, arXiv:1911.03852; labels drawn from the model stand for Hutchinson's estimate)

One block's weights are in memory at a time, beside what stands outside the blocks and the hidden states at all block
borders (at most 4 * tokens * width * blocks bytes). Cost: about three passes over the windows, and the solvers on the
samples.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.allocate import storage_bytes
from lowbit.errors import ModelError, ShapeError
from lowbit.evaluate._model import logits_of, token_nll
from lowbit.formats import Format
from lowbit.pipeline.blocks import _replaced_forwards, all_inputs, layer_matrix, linear_layers, run_block
from lowbit.pipeline.checkpoint import Store
from lowbit.pipeline.embeddings import quantize_rows
from lowbit.pipeline.memory import release_memory
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.solvers import Solution, find
from lowbit.statistics import GramAccumulator, LayerStatistics

ROWS = 48  # of each layer's rows, how many the solvers are tried on
HEAD_TOKENS = 768  # tokens the head's options are measured on
FLOAT = Recipe(method="rtn", format="float", embeddings=16)  # the walk's recipe while nothing is rounded


@dataclass(frozen=True)
class Option:
    """What a layer may become: a solver and a format. like: its loss is that option's times `factor`, not probed.

    average: bits of its codes, for methods that mix widths within a layer

    >>> Option.of("scalebits:2.25 uint4-g64").average
    2.25
    """

    method: str
    format: str
    like: str = ""
    factor: float = 1.0
    average: "float | None" = None

    @property
    def label(self) -> str:
        return f"{self.method}{'' if self.average is None else f':{self.average:g}'} {self.format}"

    @classmethod
    def of(cls, label: str) -> "Option":
        """The option of a label; what it is `like` is not in there."""
        how, _, fmt = label.rpartition(" ")
        method, _, average = how.partition(":")
        return cls(method, fmt, average=float(average) if average else None)

    @property
    def options(self) -> dict[str, Any]:
        """What it changes of the method's options."""
        return {} if self.average is None else {"average": self.average}


class Prober:
    """One probe of the model a walk is over (a walk with the recipe FLOAT).

    windows: (n, context) token ids the losses are taken on; fit: those the solvers see, others if possible;
    held: ids for the float model's own loss
    options: tried on layers; embeddings: format strings tried on the embedding and the head
    sensitivity: "fisher", or "trace" for layers (see the module's text)
    """

    def __init__(
        self,
        walk: Walk,
        windows: Tensor,
        fit: Tensor,
        held: Tensor,
        options: Sequence[Option],
        embeddings: Sequence[str],
        seed: int = 0,
        sensitivity: str = "fisher",
    ) -> None:
        self.walk, self.windows, self.fit, self.held = walk, windows, fit, held
        self.options, self.embeddings, self.sensitivity = options, embeddings, sensitivity
        self.generator = torch.Generator().manual_seed(seed)
        self.tuples = False

    def run(self, store: Store) -> dict[str, Any]:
        """{"layers": {name: {"shape", "loss": {label: nats}}}, "ends": {...}, "float_nll", "plain_bytes", "seconds"}.

        Finished parts are kept in the store; a run that goes on does what is missing. Raises ModelError for a model
        without logits.
        """
        walk, began = self.walk, time.perf_counter()
        names = [f"probe-{i:04d}" for i in range(len(walk.blocks))]
        if not all(store.has(n) for n in [*names, "probe-ends"]):
            self._probe(store, names)
        ends = store.entries("probe-ends")
        layers = {k: v for n in names for k, v in store.entries(n)["layers"].items()}
        return {**ends, "layers": layers, "seconds": ends["seconds"] or time.perf_counter() - began}

    def _probe(self, store: Store, names: list[str]) -> None:
        began, walk = time.perf_counter(), self.walk
        outside = [n for n in walk.names if not walk._in_blocks(n)]
        read = walk._read(outside)
        walk.windows = torch.cat([self.windows, self.fit, self.held])
        with torch.no_grad():
            hidden = walk._first_hidden()
            borders = self._forward(hidden)
            nll = [self._nll(ids, h) for ids, h in zip(self.held, hidden[-len(self.held) :])]
        gradients = self._tail_gradients(hidden[: len(self.windows)])
        head = self._head_losses()
        self._backward(borders, gradients, store, names)
        ends = self._ends(read, head, gradients)
        kept = {n: t.numel() * t.element_size() for n, t in read.items()}
        entries = {"ends": ends, "outside_bytes": kept, "float_nll": nll, "seconds": time.perf_counter() - began}
        store.put("probe-ends", {"none": torch.zeros(1)}, entries)
        walk._forget(outside)
        release_memory()

    # -- forward

    def _forward(self, hidden: list[Tensor]) -> list[list[Tensor]]:
        """Run all windows through all blocks; advances `hidden`; returns what enters each block, held windows left out.

        The solvers' windows are kept in bfloat16: their sums of products do not need more.
        """
        borders, n, m = [], len(self.windows), len(self.windows) + len(self.fit)
        for i, block in enumerate(self.walk.blocks):
            borders.append([h.clone() for h in hidden[:n]] + [h.bfloat16() for h in hidden[n:m]])
            with _Loaded(self.walk, i):
                for k in range(len(hidden)):
                    hidden[k] = run_block(block, hidden[k], *self.walk.calls[i])
                if i == 0:
                    args, kwargs = self.walk.calls[0]
                    self.tuples = isinstance(block(borders[0][0], *args, **kwargs), tuple)
            self.walk._say("probe", i, part="forward")
        return borders

    def _logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits (tokens, vocabulary) when its last block gives `hidden`."""
        given: Any = (hidden,) if self.tuples else hidden
        with _replaced_forwards(self.walk.blocks, lambda *a, **k: given):
            return logits_of(self.walk.model, ids[None])[0]

    def _nll(self, ids: Tensor, hidden: Tensor) -> float:
        return float(token_nll(self._logits(ids, hidden)[:-1], ids[1:]).mean())

    def _tail_gradients(self, hidden: list[Tensor]) -> list[Tensor]:
        """d(-log p(sampled labels), summed over tokens) / d(output of the last block), a window each.

        Keeps some inputs of the output head for `_head_losses`.
        """
        found, seen = [], []
        handle = self._output_head().register_forward_pre_hook(
            lambda _, x: seen.append(x[0].detach().reshape(-1, x[0].shape[-1]))
        )
        try:
            for ids, h in zip(self.windows, hidden):
                with torch.enable_grad():
                    leaf = h.detach().requires_grad_()
                    log_p = self._logits(ids, leaf).log_softmax(-1)
                    with torch.no_grad():
                        y = torch.multinomial(log_p.exp().cpu(), 1, generator=self.generator).to(log_p.device)
                    loss = -log_p.gather(1, y).sum()
                    found.append(torch.autograd.grad(loss, leaf)[0])
        finally:
            handle.remove()
        inputs = torch.cat(seen)
        self.head_inputs = inputs[:: max(1, len(inputs) // HEAD_TOKENS)]
        return found

    def _output_head(self) -> nn.Module:
        head = getattr(self.walk.model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ModelError(
                "the model has no output head, so its predictions cannot be probed: give --method instead."
            )
        return head

    @torch.no_grad()
    def _head_losses(self) -> dict[str, float]:
        """KL(p || p with the head in this format), mean over a sample of tokens."""
        w = layer_matrix(self._output_head())
        reference = [(x @ w.T).log_softmax(-1) for x in self.head_inputs.split(128)]
        found = {}
        for text in self.embeddings:
            w_hat = w.clone()  # rounded in slices: the codes of the whole would take several times its memory
            quantize_rows(w_hat, Format.parse(text), keep=True)
            total = 0.0
            for x, log_p in zip(self.head_inputs.split(128), reference):
                log_q = (x @ w_hat.T).log_softmax(-1)
                total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            found[text] = max(total / len(self.head_inputs), 0.0)
        return found

    # -- backward

    def _backward(self, borders: list[list[Tensor]], gradients: list[Tensor], store: Store, names: list[str]) -> None:
        """From the last block to the first; gradients become those of what enters the first block."""
        for i in range(len(self.walk.blocks) - 1, -1, -1):
            with _Loaded(self.walk, i):
                sums = _Sums(self.walk.blocks[i])
                for k, h in enumerate(borders[i][: len(gradients)]):
                    gradients[k] = sums.back(h, gradients[k], self.walk.calls[i])
                for h in borders[i][len(gradients) :] or borders[i]:
                    sums.gather(h.float(), self.walk.calls[i])
                if not store.has(names[i]):
                    layers = {f"{self.walk.prefix}.{i}.{n}": row for n, row in self._layers(sums).items()}
                    store.put(names[i], {"none": torch.zeros(1)}, {"layers": layers})
            borders[i] = []
            self.walk._say("probe", i, part="backward")

    @torch.no_grad()
    def _layers(self, sums: "_Sums") -> dict[str, Any]:
        """Losses of every layer of a block in every option."""
        found: dict[str, Any] = {n: {"shape": list(sums.matrix(n).shape), "loss": {}, "bytes": {}} for n in sums.names}
        for group, statistics in sums.groups():
            rows = {n: _spread(len(sums.matrix(n)), ROWS) for n in group}
            w = {n: sums.matrix(n)[rows[n]] for n in group}
            for option in self.options:
                try:
                    solutions = {} if option.like else _tried(w, statistics, option)
                except ShapeError:
                    continue
                for n, part in solutions.items():
                    found[n]["loss"][option.label] = sums.loss(n, part.w_hat() - w[n], rows[n], self.sensitivity)
                    if part.exceptions or option.average is not None:
                        more = 1.0 if option.average is None else 1.003  # few tiles leave some of an average unused
                        found[n]["bytes"][option.label] = math.ceil(more * _scaled_bytes(part, found[n]["shape"][0]))
        for row in found.values():
            for o in self.options:
                if o.like and o.like in row["loss"]:
                    row["loss"][o.label] = row["loss"][o.like] * o.factor
                if o.like and o.like in row["bytes"]:
                    row["bytes"][o.label] = row["bytes"][o.like] + _wider(o, row["shape"])
        return found

    @torch.no_grad()
    def _ends(self, read: dict[str, Tensor], head: dict[str, float], gradients: list[Tensor]) -> dict[str, Any]:
        """Losses of embedding and head in their formats; one entry where they are tied."""
        walk = self.walk
        name, alone = walk.embedding(), walk.head()
        found: dict[str, Any] = {}
        if alone is not None:
            shape = list(layer_matrix(walk.model.get_submodule(alone)).shape)
            found[alone] = {"shape": shape, "loss": head}
        if name is None:
            return found
        w = layer_matrix(walk.model.get_submodule(name))
        losses = dict.fromkeys(self.embeddings, 0.0) if alone is not None else dict(head)
        tokens = sum(len(ids) for ids in self.windows)
        for text in self.embeddings:
            used, place = self.windows.unique(return_inverse=True)
            d = quantize_rows(w[used], Format.parse(text)).dequantize() - w[used]
            moved = sum(float((g[0] * d[p]).square().sum()) for g, p in zip(gradients, place))
            losses[text] += moved / (2 * tokens)
        return found | {name: {"shape": list(w.shape), "loss": losses}}


class _Loaded:
    """One block's weights in memory for a while, without gradients."""

    def __init__(self, walk: Walk, i: int) -> None:
        self.walk, self.i = walk, i

    def __enter__(self) -> None:
        self.names = [n for n in self.walk.names if n.startswith(f"{self.walk.prefix}.{self.i}.")]
        self.walk._read(self.names)
        self.walk.blocks[self.i].requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        self.walk._forget(self.names)
        release_memory()


class _Sums:
    """What the backward pass gathers of one block's linear layers."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.grams: dict[str, GramAccumulator] = {}
        self.leader: dict[str, str] = {}
        self.weighted: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.tokens = 0

    @property
    def names(self) -> list[str]:
        return list(self.weighted)

    def matrix(self, name: str) -> Tensor:
        return layer_matrix(self.block.get_submodule(name))

    def back(self, hidden: Tensor, gradient: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
        """One window: forward with hooks, backward, sums; returns the gradient of what entered."""
        seen: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str) -> Callable:
            return lambda module, x, y: seen.append((name, x[0], y))

        handles = [m.register_forward_hook(keep(n)) for n, m in linear_layers(self.block).items()]
        try:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                out = run_block(self.block, leaf, *call)
                found = torch.autograd.grad(out, [leaf, *(y for _, _, y in seen)], gradient, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for name, x, _ in seen:  # layers with the very same input share statistics, kept under the first one's name
            self.leader.setdefault(name, next(n for n, other, _ in seen if other is x))
        for (name, x, _), g in zip(seen, found[1:]):
            if g is not None:
                self._add(name, x.detach().flatten(0, -2), g.flatten(0, -2))
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return found[0]

    @torch.no_grad()
    def gather(self, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> None:
        """The solvers' statistics of one window."""
        for name, x in all_inputs(self.block, list(dict.fromkeys(self.leader.values())), hidden, *call)[0].items():
            self.grams.setdefault(name, GramAccumulator(x.shape[-1])).add(x)

    def _add(self, name: str, x: Tensor, g: Tensor) -> None:
        square = g.square()
        share = square.sum(1)
        if name not in self.weighted:
            self.weighted[name] = torch.zeros(x.shape[1], x.shape[1])
            self.rows[name] = torch.zeros(g.shape[1])
        self.weighted[name].addmm_((x * share[:, None]).T, x)
        self.rows[name] += square.sum(0)

    def groups(self) -> list[tuple[list[str], LayerStatistics]]:
        """Layers that share an input, with its statistics."""
        leaders = dict.fromkeys(self.leader[n] for n in self.names)
        return [([n for n in self.names if self.leader[n] == first], self.grams[first].finish()) for first in leaders]

    def loss(self, name: str, d: Tensor, rows: Tensor, sensitivity: str = "fisher") -> float:
        """Predicted KL in nats a token when the rows' errors are d (rows, in) and the other rows' are alike."""
        if sensitivity == "trace":
            each_weight = float(d.square().mean(dtype=torch.float64))
            return float(self.weighted[name].trace()) * each_weight / (2 * self.tokens)
        f = self.rows[name].double()
        each = ((d @ self.weighted[name]) * d).sum(1, dtype=torch.float64)
        sampled, total = float(f[rows].sum()), float(f.sum())
        if sampled <= 0:
            return 0.0
        return float((f[rows] * each).sum()) / sampled / (2 * self.tokens) if total > 0 else 0.0


def _tried(w: dict[str, Tensor], statistics: LayerStatistics, option: Option) -> dict[str, Solution]:
    """Rows of layers that share their input, solved stacked where the method can."""
    spec, fmt = find(option.method), Format.parse(option.format)
    options = spec.options | option.options
    if spec.alone:
        return {n: spec.solve(part, statistics, fmt, **options) for n, part in w.items()}
    whole, start, found = spec.solve(torch.cat(list(w.values())), statistics, fmt, **options), 0, {}
    for n, part in w.items():
        found[n] = whole.rows(start, start + len(part))
        start += len(part)
    return found


def _wider(o: Option, shape: list[int]) -> int:
    """Bytes that an option's codes and tables take more than those of the option whose loss it borrows."""
    new, old = Format.parse(o.format), Format.parse(o.like.rpartition(" ")[2])
    second_table = 2 * (2**new.levels.bits - 2**old.levels.bits)  # that of the exceptions
    return storage_bytes(tuple(shape), new) - storage_bytes(tuple(shape), old) + second_table


def _scaled_bytes(sample: Solution, out: int) -> int:
    """Bytes of a layer of `out` rows from some of its rows: tables that rows share once, all else in proportion; a
    hundredth more for masks, whose size depends on the weights.
    """
    total = 0.0
    for key, t in sample.quantized().tensors().items():
        size = t.numel() * t.element_size()
        shared = t.ndim == 1 and key.endswith("table")
        total += size if shared else size * out / len(sample.codes) * (1.01 if "mask" in key else 1.0)
    return math.ceil(total)


def _spread(n: int, count: int) -> Tensor:
    """About `count` row numbers, evenly over n."""
    return torch.linspace(0, n - 1, min(n, count)).round().long().unique()
