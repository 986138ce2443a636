"""Packed products beside torch's: GEMV and GEMM of any shape, every format, resident in the caches or from memory.

rotating    buffers larger together than the last-level cache, used in turn: what a model's layers see
resident    one buffer again and again: what the instructions can do
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.bench import rivals
from lowbit.bench.machine import Machine, cache_bytes, measure_machine
from lowbit.bench.timing import medians, threads
from lowbit.errors import RecipeError
from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.runtime import PackedLinear, kernels

FORMATS = ("ternary", "uint2", "uint3", "uint4", "pot4", "nf4", "int8")
BUFFERS = ("rotating", "resident")
ACTIVATIONS = ("int8", "float")
MOST = 128  # buffers of one kind
OPS = {"int8": "linear_int8", "float": "linear_float"}


class Shape(NamedTuple):
    """m tokens, k inputs, n outputs."""

    m: int
    k: int
    n: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """ "1x2048x2048" is MxKxN. Raises RecipeError."""
        words = text.lower().split("x")
        if len(words) != 3 or not all(w.isdigit() and int(w) > 0 for w in words):
            raise RecipeError(f"{text!r} is not a shape. Write tokens x inputs x outputs, for example 1x2048x2048.")
        return cls(*map(int, words))


SHAPES = (Shape(1, 2048, 2048), Shape(1, 4096, 4096), Shape(512, 2048, 2048))


def bench_kernels(
    shapes: Sequence[Shape] = SHAPES,
    formats: Sequence[str] = FORMATS,
    thread_counts: Sequence[int] = (1,),
    group: int = 128,
    buffers: Sequence[str] = BUFFERS,
    activations: Sequence[str] = ACTIVATIONS,
    seconds: float = 0.3,
    progress: "Callable[[int, int, str], None] | None" = None,
) -> dict[str, Any]:
    """{"machine": [Machine a thread count], "rows": [...]}; a row's keys are listed in docs/json.md.

    seconds: spent on each figure. Raises FormatError or ShapeError for a format that does not fit.
    """
    fits = {name: Format.parse(f"{name}-g{group}" if group > 0 else f"{name}-channel") for name in formats}
    machines = [measure_machine(count) for count in thread_counts]
    rows: list[dict[str, Any]] = []
    todo = [(s, m, b) for s in shapes for m in machines for b in buffers]
    for i, (shape, machine, kind) in enumerate(todo):
        if progress is not None:
            progress(i, len(todo), f"{'x'.join(map(str, shape))}, {machine.threads} threads, {kind}")
        with threads(machine.threads):
            rows += _one_shape(shape, machine, kind, fits, group, activations, seconds)
    return {"machine": [m.as_dict() for m in machines], "rows": rows}


def _one_shape(
    shape: Shape, machine: Machine, kind: str, formats: dict[str, Format], group: int, activations: Sequence[str],
    seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    torch.manual_seed(0)
    x, w = torch.randn(shape.m, shape.k), torch.randn(shape.n, shape.k) / shape.k**0.5
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    for name, dtype in (("torch", torch.float32), ("bf16", torch.bfloat16)):
        ws = [w.to(dtype).clone() for _ in range(_copies(w.nbytes * dtype.itemsize // 4, kind))]
        calls[name] = rivals.torch_calls([x.to(dtype)] * len(ws), ws)
    layers: dict[tuple[str, str], list[PackedLinear]] = {}
    for name, fmt in formats.items():
        qt = quantize(w, fmt)
        for how in activations:
            layers[name, how] = _layers(qt, how, kind)
            calls[f"{name} {how}"] = _calls(layers[name, how], x)
        bits = fmt.levels.bits
        copies = _copies(shape.n * shape.k * bits // 8, kind)
        if f"ort{bits}" not in calls and (ort := rivals.onnxruntime_calls(x, w, bits, group, copies, machine.threads)):
            calls[f"ort{bits}"] = ort
    with torch.no_grad():
        ms = medians(calls, seconds)
    return [
        _row(shape, machine, kind, str(formats[name]), how, layers[name, how][0], ms[f"{name} {how}"], ms)
        for name, how in layers
    ]


def _calls(layers: Sequence[PackedLinear], x: Tensor) -> list[Callable[[], object]]:
    return [partial(layer, x) for layer in layers]


def _copies(n_bytes: int, kind: str) -> int:
    """How many buffers of n_bytes are twice the last-level cache; MOST of small ones."""
    return 1 if kind == "resident" else min(max(2, -(-2 * cache_bytes() // max(n_bytes, 1))), MOST)


def _layers(qt: QuantizedTensor, activations: str, kind: str) -> list[PackedLinear]:
    """The same layer in as many places as it takes."""
    first = PackedLinear.from_quantized(qt, activations=activations)
    first.prepare()
    out = [first]
    for _ in range(_copies(read_bytes(first), kind) - 1):
        copy = QuantizedTensor.from_tensors(qt.meta(), {k: t.clone() for k, t in qt.tensors().items()})
        out.append(PackedLinear.from_quantized(copy, activations=activations))
        out[-1].prepare()
    return out


def read_bytes(layer: PackedLinear) -> int:
    """Bytes of the arguments that the layer's kernel reads."""
    prepared = layer.prepare()
    return sum(t.nbytes for t in _tensors(prepared.int8 if layer.activations == "int8" else prepared.weight))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []


def _row(
    shape: Shape, machine: Machine, kind: str, fmt: str, activations: str, layer: PackedLinear, ms: float,
    all_ms: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    m, k, n = shape
    bits = Format.parse(fmt).levels.bits
    n_bytes = read_bytes(layer) + 4 * m * (k + n)
    gmacs, gbytes = m * n * k / ms / 1e6, n_bytes / ms / 1e6
    ort = all_ms.get(f"ort{bits}")
    op = OPS[activations]
    return {
        "op": op, "format": fmt, "bits": layer.quantized().bits_per_weight, "activations": activations,
        "isa": kernels.isa_of(op), "threads": machine.threads, "m": m, "k": k, "n": n, "buffers": kind, "ms": ms,
        "torch_ms": all_ms["torch"], "speedup": all_ms["torch"] / ms,
        "bf16_ms": all_ms["bf16"], "bf16_speedup": all_ms["bf16"] / ms,
        "onnxruntime_ms": ort, "onnxruntime_speedup": ort and ort / ms,
        "gmacs_per_second": gmacs, "bytes": n_bytes, "gbytes_per_second": gbytes,
        "fraction_of_copy": gbytes / machine.copy_gbytes_per_second,
        "fraction_of_peak": gmacs / machine.int8_gmacs_per_second,
    }  # fmt: skip
