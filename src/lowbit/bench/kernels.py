"""Packed products beside torch's: GEMV and GEMM of any shape, every format, resident in the caches or from memory.

rotating    buffers larger together than the last-level cache, used in turn: what a model's layers see
resident    one buffer again and again: what the instructions can do

Beside level sets there are "LEVELS+P%", with exceptions at the P percent largest of each row (gap-coded, one scale a
row), and "signs", 1-bit weights times the signs of the inputs.
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
from lowbit.formats import Format, QuantizedTensor, quantize, split_quantize
from lowbit.runtime import PackedLinear, binary_kernels, kernels
from lowbit.runtime.binary_layers import PackedBinaryLinear

FORMATS = ("ternary", "uint2", "uint2+5%", "uint3", "uint4", "pot4", "nf4", "int8")
SIGNS = "signs"
BUFFERS = ("rotating", "resident")
ACTIVATIONS = ("int8", "float")
MOST = 128  # buffers of one kind
DERIVED = ("weight", "int8", "sparse", "sparse_int8")  # what a layer's calls read
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
SIGN_SHAPES = (Shape(2048, 2048, 2048),)


class Packing(NamedTuple):
    """A format, and the share of a row's weights that are exceptions to it."""

    fmt: Format
    share: float = 0.0

    @classmethod
    def parse(cls, text: str, group: int) -> "Packing":
        """ "uint2" or "uint2+5%". Raises FormatError, RecipeError."""
        levels, plus, share = text.partition("+")
        fmt = Format.parse(f"{levels}-g{group}" if group > 0 else f"{levels}-channel")
        number = share.rstrip("%").replace(".", "", 1)
        if plus and not (number.isdigit() and 0 < float(share.rstrip("%")) < 50):
            raise RecipeError(f"{text!r} is no format with exceptions. Write for example uint2+5%.")
        return cls(fmt, float(share.rstrip("%")) / 100 if plus else 0.0)

    def __str__(self) -> str:
        return f"{self.fmt}+{100 * self.share:g}%" if self.share else str(self.fmt)

    def quantize(self, w: Tensor) -> QuantizedTensor:
        if not self.share:
            return quantize(w, self.fmt)
        count = max(1, round(self.share * w.shape[1]))
        mask = torch.zeros_like(w, dtype=torch.bool).scatter_(1, w.abs().topk(count, 1).indices, True)
        rest = Format.parse(f"{str(self.fmt).partition('-')[0]}-channel")
        return split_quantize(w, mask, self.fmt, rest, codec="gap")


def bench_kernels(
    shapes: Sequence[Shape] = SHAPES,
    formats: Sequence[str] = FORMATS,
    sign_shapes: Sequence[Shape] = (),
    thread_counts: Sequence[int] = (1,),
    group: int = 128,
    buffers: Sequence[str] = BUFFERS,
    activations: Sequence[str] = ACTIVATIONS,
    seconds: float = 0.3,
    progress: "Callable[[int, int, str], None] | None" = None,
) -> dict[str, Any]:
    """{"machine": [Machine a thread count], "rows": [...]}; a row's keys are listed in docs/json.md.

    sign_shapes: products of signs. seconds: spent on each figure. Raises FormatError, ShapeError or RecipeError for a
    format that does not fit.
    """
    fits = {name: Packing.parse(name, group) for name in formats}
    machines = [measure_machine(count) for count in thread_counts]
    rows: list[dict[str, Any]] = []
    todo = [(s, m, b) for s in shapes for m in machines for b in buffers]
    todo += [(s, m, SIGNS) for s in sign_shapes for m in machines]
    for i, (shape, machine, kind) in enumerate(todo):
        if progress is not None:
            progress(i, len(todo), f"{'x'.join(map(str, shape))}, {machine.threads} threads, {kind}")
        with threads(machine.threads):
            if kind == SIGNS:
                rows.append(_signs(shape, machine, seconds))
            else:
                rows += _one_shape(shape, machine, kind, fits, group, activations, seconds)
    return {"machine": [m.as_dict() for m in machines], "rows": rows}


def _one_shape(
    shape: Shape, machine: Machine, kind: str, formats: dict[str, Packing], group: int, activations: Sequence[str],
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
        qt = fmt.quantize(w)
        for how in activations:
            layers[name, how] = _layers(qt, how, kind, shape.m)
            calls[f"{name} {how}"] = _calls(layers[name, how], x)
        bits = fmt.fmt.levels.bits
        copies = _copies(shape.n * shape.k * bits // 8, kind)
        if f"ort{bits}" not in calls and (ort := rivals.onnxruntime_calls(x, w, bits, group, copies, machine.threads)):
            calls[f"ort{bits}"] = ort
    with torch.no_grad():
        ms = medians(calls, seconds)
    return [
        _row(shape, machine, kind, formats[name], how, layers[name, how][0], ms[f"{name} {how}"], ms)
        | {"times_dense": _times_dense(name, how, ms)}
        for name, how in layers
    ]


def _times_dense(name: str, how: str, ms: dict[str, float]) -> "float | None":
    """Time with exceptions over the time without, where both were asked for."""
    dense = ms.get(f"{name.partition('+')[0]} {how}")
    return ms[f"{name} {how}"] / dense if dense and "+" in name else None


def _signs(shape: Shape, machine: Machine, seconds: float) -> dict[str, Any]:
    """Floats in and out, turning them into bits included, beside torch's product in fp32."""
    torch.manual_seed(0)
    x, w = torch.randn(shape.m, shape.k), torch.randn(shape.n, shape.k)
    layer = PackedBinaryLinear.from_float(torch.where(w < 0, -1.0, 1.0))
    calls = {"torch": rivals.torch_calls([x], [w]), "bf16": rivals.torch_calls([x.bfloat16()], [w.bfloat16()])}
    with torch.no_grad():
        ms = medians({**calls, SIGNS: [partial(layer, x)]}, seconds)
    n_bytes = shape.n * shape.k // 8 + 4 * shape.m * (shape.k + shape.n)
    row = _figures(shape, machine, ms[SIGNS], ms, n_bytes, None)
    return {
        "op": "binary_linear", "format": SIGNS, "bits": 1.0, "activations": "sign",
        "isa": binary_kernels.checked_isa(), "threads": machine.threads, "buffers": "resident", **row,
        "fraction_of_peak": None, "times_dense": None,
    }  # fmt: skip


def _calls(layers: Sequence[PackedLinear], x: Tensor) -> list[Callable[[], object]]:
    return [partial(layer, x) for layer in layers]


def _copies(n_bytes: int, kind: str) -> int:
    """How many buffers of n_bytes are twice the last-level cache; MOST of small ones."""
    return 1 if kind == "resident" else min(max(2, -(-2 * cache_bytes() // max(n_bytes, 1))), MOST)


def _layers(qt: QuantizedTensor, activations: str, kind: str, tokens: int) -> list[PackedLinear]:
    """The same layer in as many places as it takes."""
    first = PackedLinear.from_quantized(qt, activations=activations)
    kept, out = first.prepare(), [first]
    for _ in range(_copies(read_bytes(first, tokens), kind) - 1):
        copy = QuantizedTensor.from_tensors(qt.meta(), {k: t.clone() for k, t in qt.tensors().items()})
        out.append(PackedLinear.from_quantized(copy, activations=activations))
        source = tuple(out[-1]._buffers[key] for key in out[-1]._packed)
        out[-1]._prepared = kept._replace(source=source, **{key: _cloned(getattr(kept, key)) for key in DERIVED})
    return out


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, tuple):
        return value
    return getattr(type(value), "_make", tuple)(map(_cloned, value))


def read_bytes(layer: PackedLinear, tokens: int) -> int:
    """Bytes of the arguments that the layer's kernel reads for so many tokens."""
    prepared = layer.prepare()
    int8 = layer.activations == "int8"
    weight, added = (prepared.int8, prepared.sparse_int8) if int8 else (prepared.weight, prepared.sparse)
    return sum(t.nbytes for t in _tensors(weight)) + (added.read_bytes(tokens) if added is not None else 0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []


def _row(
    shape: Shape, machine: Machine, kind: str, fmt: Packing, activations: str, layer: PackedLinear, ms: float,
    all_ms: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    n_bytes = read_bytes(layer, shape.m) + 4 * shape.m * (shape.k + shape.n)
    op = OPS[activations]
    return {
        "op": op, "format": str(fmt), "bits": layer.quantized().bits_per_weight, "activations": activations,
        "isa": kernels.isa_of(op), "threads": machine.threads, "buffers": kind,
        **_figures(shape, machine, ms, all_ms, n_bytes, all_ms.get(f"ort{fmt.fmt.levels.bits}")),
    }  # fmt: skip


def _figures(
    shape: Shape, machine: Machine, ms: float, all_ms: dict[str, float], n_bytes: int, ort: "float | None"
) -> dict[str, Any]:
    m, k, n = shape
    gmacs, gbytes = m * n * k / ms / 1e6, n_bytes / ms / 1e6
    return {
        "m": m, "k": k, "n": n, "ms": ms, "torch_ms": all_ms["torch"], "speedup": all_ms["torch"] / ms,
        "bf16_ms": all_ms["bf16"], "bf16_speedup": all_ms["bf16"] / ms,
        "onnxruntime_ms": ort, "onnxruntime_speedup": ort and ort / ms,
        "gmacs_per_second": gmacs, "bytes": n_bytes, "gbytes_per_second": gbytes,
        "fraction_of_copy": gbytes / machine.copy_gbytes_per_second,
        "fraction_of_peak": gmacs / machine.int8_gmacs_per_second,
    }  # fmt: skip
