"""Packed convolutions beside torch's float32: ResNet-18's four stages and a depthwise layer, floats in and floats out.

binary    1-bit weights, signs of the inputs (turning them into bits included)
int8      weights of at most 8 bits, inputs rounded to int8 with one scale an image (rounding included)
levels    the same between two layers of a network in low precision: int8 levels in, ReLU, int8 levels out
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.bench.machine import Machine, measure_machine
from lowbit.bench.timing import medians, threads
from lowbit.errors import RecipeError
from lowbit.formats import Format, quantize
from lowbit.runtime import PackedConv2d, binary_kernels, conv_kernels
from lowbit.runtime.binary_kernels import Geometry
from lowbit.runtime.binary_layers import PackedBinaryConv2d

FORMATS = ("binary", "ternary", "int4")
GRID = conv_kernels.IntGrid(0.1, 0, 15)


class ConvShape(NamedTuple):
    """c channels of h x w pixels, n outputs, a kernel of k x k at stride 1 with "same" padding."""

    c: int
    h: int
    w: int
    n: int
    k: int = 3
    groups: int = 1

    @classmethod
    def parse(cls, text: str) -> "ConvShape":
        """ "64x56x56x64" is CxHxWxN, with xK for another kernel than 3 and xG for groups. Raises RecipeError."""
        words = text.lower().split("x")
        good = 4 <= len(words) <= 6 and all(w.isdigit() and int(w) > 0 for w in words)
        shape = cls(*map(int, words)) if good else None
        if shape is None or shape.c % shape.groups or shape.n % shape.groups:
            raise RecipeError(
                f"{text!r} is not the shape of a convolution. Write channels x height x width x outputs (x kernel x "
                "groups), for example 64x56x56x64, or 256x28x28x256x3x256 for a depthwise one."
            )
        return shape

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (
    ConvShape(64, 56, 56, 64),
    ConvShape(128, 28, 28, 128),
    ConvShape(256, 14, 14, 256),
    ConvShape(512, 7, 7, 512),
    ConvShape(256, 28, 28, 256, 3, 256),
)


def bench_conv(
    shapes: Sequence[ConvShape] = SHAPES,
    formats: Sequence[str] = FORMATS,
    thread_counts: Sequence[int] = (1,),
    batch: int = 1,
    seconds: float = 0.3,
    progress: "Callable[[int, int, str], None] | None" = None,
) -> dict[str, Any]:
    """{"machine": [Machine a thread count], "rows": [...]}; a row's keys are listed in docs/json.md.

    formats: "binary", or a level set of at most 8 bits with one scale a row. seconds: spent on each figure.
    Raises FormatError for a format that is not known, RecipeError for one that has no such convolution.
    """
    machines = [measure_machine(count) for count in thread_counts]
    rows: list[dict[str, Any]] = []
    todo = [(s, m) for s in shapes for m in machines]
    for i, (shape, machine) in enumerate(todo):
        if progress is not None:
            progress(i, len(todo), f"{shape}, {machine.threads} threads")
        with threads(machine.threads):
            rows += _one_shape(shape, machine, formats, batch, seconds)
    return {"machine": [m.as_dict() for m in machines], "rows": rows}


def _one_shape(
    shape: ConvShape, machine: Machine, formats: Sequence[str], batch: int, seconds: float
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    c, h, w, n, k, groups = shape
    x, weight = torch.randn(batch, c, h, w), torch.randn(n, c // groups, k, k)
    calls: dict[str, list[Callable[[], object]]] = {
        "torch": [partial(F.conv2d, x, weight, None, 1, "same", 1, groups)],
    }
    kept: dict[tuple[str, str], tuple[str, str, float]] = {}
    for name in formats:
        for how, op, isa, bits, call in _ways(name, shape, x, weight):
            kept[name, how] = (op, isa, bits)
            calls[f"{name} {how}"] = [call]
    with torch.inference_mode():
        ms = medians(calls, seconds)
    return [_row(shape, batch, machine, name, how, *kept[name, how], ms) for name, how in kept]


def _ways(name: str, shape: ConvShape, x: Tensor, weight: Tensor) -> list[tuple[str, str, str, float, Any]]:
    """(how, operator, row, bits per weight, call) of one format."""
    options: dict[str, Any] = {"padding": "same", "groups": shape.groups}
    qt = quantize(weight, Format.parse(f"{name}-channel"))
    if name == "binary":
        bits = PackedBinaryConv2d.from_quantized(qt, **options)
        return [("sign", "binary_conv2d", binary_kernels.checked_isa(), qt.bits_per_weight, partial(bits, x))]
    if not conv_kernels.fits(qt):
        raise RecipeError(f"{name} has no int8 convolution: use binary, ternary, int2, int3, int4, pot4, nf4 or int8.")
    layer = PackedConv2d.from_quantized(qt, activations="int8", **options)
    left, right, top, bottom = layer._pads()
    geometry = Geometry(padding=(top, bottom, left, right))
    plan = conv_kernels.Plan(conv_kernels.weight(qt, shape.groups), geometry, torch.zeros(shape.n), GRID)
    q = torch.randint(0, 16, (len(x), shape.h, shape.w, shape.c), dtype=torch.int8)
    between = partial(plan.run, q, None, True, GRID, False)
    row = ("conv_int8", conv_kernels.checked_isa(), qt.bits_per_weight)
    return [("int8", *row, partial(layer, x)), ("levels", *row, between)]


def _row(
    shape: ConvShape, batch: int, machine: Machine, name: str, how: str, op: str, isa: str, bits: float,
    all_ms: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    ms = all_ms[f"{name} {how}"]
    m, k, n = batch * shape.h * shape.w, shape.c // shape.groups * shape.k**2, shape.n
    gmacs = m * k * n / ms / 1e6
    return {
        "op": op, "shape": str(shape), "batch": batch, "format": f"{name}-channel", "bits": bits, "activations": how,
        "isa": isa, "threads": machine.threads, "m": m, "k": k, "n": n, "ms": ms, "torch_ms": all_ms["torch"],
        "speedup": all_ms["torch"] / ms, "gmacs_per_second": gmacs,
        "fraction_of_peak": None if op == "binary_conv2d" else gmacs / machine.int8_gmacs_per_second,
    }  # fmt: skip
