"""Attach, train, pack: a network of your own whose weights become fewer bits while it learns.

    lowbit.prepare(net, "ternary")            weights are rounded in the forward pass; train with your own loop
    net = lowbit.pack(net)                    packed layers; the float weights are gone
    lowbit.bits_per_weight(net); print(lowbit.summary(net))

The first convolution and the last linear layer keep their precision (they hold few weights and cost most accuracy), as
do biases and normalizations. Packing changes no value: the packed network computes what the trained one did, up to the
order of float sums.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lowbit.errors import RecipeError, ShapeError
from lowbit.estimators import Estimator
from lowbit.formats import Format, QuantizedTensor
from lowbit.runtime import swap
from lowbit.weights import Quantize

KINDS = ("linear", "conv2d")


def prepare(
    net: nn.Module,
    fmt: "Format | str",
    estimator: "str | Estimator" = "identity",
    skip: Iterable[str] = (),
    keep_ends: bool = True,
) -> nn.Module:
    """Put quantize(format, estimator) on the weight of every linear layer and 2-d convolution; returns the same net.

    fmt:       one format for all, e.g. "ternary", "int4-channel", "uint3-g64"
    skip:      names or patterns of layers to leave alone, e.g. "head*"
    keep_ends: leave the first convolution and the last linear layer in float

    Raises RecipeError if nothing is left to quantize or the net is prepared already, ShapeError (naming the layer)
    where groups do not divide.
    """
    fmt = fmt if isinstance(fmt, Format) else Format.parse(fmt)
    if any(True for _ in weight_functions(net)):
        raise RecipeError(
            "this network is prepared already: train it, or lowbit.pack it. Prepare a copy to try another format."
        )
    chosen = list(_chosen(net, list(skip), keep_ends))
    if not chosen:
        raise RecipeError(
            "there is no layer to quantize: only plain nn.Linear and nn.Conv2d are, without the first convolution "
            "and the last linear layer. Give keep_ends=False, or skip less."
        )
    for name, module in chosen:
        _check_blocks(name, module, fmt)
    for _, module in chosen:
        parametrize.register_parametrization(module, "weight", Quantize(fmt, estimator))
    return net


def step(net: nn.Module) -> int:
    """Move the schedules of all weight functions on by one optimizer step; returns how many had one.

    The estimators that exist so far have none: calling it costs nothing and keeps a training loop ready for those that
    will.
    """
    functions: list[Any] = [f for _, _, f in weight_functions(net) if hasattr(f, "step")]
    for f in functions:
        f.step()
    return len(functions)


def pack(net: nn.Module, activations: str = "float") -> nn.Module:
    """Replace every prepared layer by its packed form, in place; returns the net (a new module if `net` itself is one
    layer).

    activations: "float" (exact) or "int8". Raises RecipeError if nothing is prepared.
    """
    prepared = list(weight_functions(net))
    if not prepared:
        raise RecipeError('nothing to pack: call lowbit.prepare(net, "ternary") first, then train.')
    for name, module, function in prepared:
        qt = function.quantized(_input_of(module))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        kind = swap.kind_of(module)
        assert kind is not None
        conv = swap.conv_options(module) if kind == "conv2d" else None
        packed = swap.pack_layer(module, qt, kind, activations, conv)
        if not name:
            return packed
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, packed)
    return net


def weight_functions(net: nn.Module) -> Iterator[tuple[str, nn.Module, Quantize]]:
    """(name, layer, its quantizer) of every prepared layer."""
    for name, module in list(net.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            last = module.parametrizations["weight"][-1]  # type: ignore[index]
            if isinstance(last, Quantize):
                yield name, module, last


@dataclass(frozen=True)
class Summary:
    """What a network costs. rows: one a tensor or compressed layer: name, shape, format, bits_per_weight, bytes.

    bits_per_weight is over the compressed layers (None without any), bits_per_weight_file over everything.
    """

    rows: tuple[dict[str, Any], ...]
    bits_per_weight: "float | None"
    bits_per_weight_file: float
    bytes: int
    weights: int

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'shape':>18} {'format':>18} {'bits':>7} {'bytes':>10}"]
        for r in self.rows:
            shape = "x".join(map(str, r["shape"]))
            lines.append(
                f"{r['name']:<40} {shape:>18} {r['format']:>18} {r['bits_per_weight']:>7.3f} {r['bytes']:>10,}"
            )
        inner = (
            "no compressed layer"
            if self.bits_per_weight is None
            else f"{self.bits_per_weight:.3f} bits per weight in compressed layers"
        )
        lines.append(
            f"{inner}, {self.bits_per_weight_file:.3f} over all {self.weights:,} weights, {self.bytes:,} bytes"
        )
        return "\n".join(lines)


def summary(net: nn.Module) -> Summary:
    """Sizes of a float, prepared or packed network, counted from what a file would hold."""
    compressed = dict(_quantized(net))
    rows = [_row(name, qt.shape, str(qt.format), qt.nbytes) for name, qt in compressed.items()]
    inner_bytes, inner = sum(r["bytes"] for r in rows), sum(prod(r["shape"]) for r in rows)
    for name, t in net.state_dict().items():
        if not _belongs_to(name, compressed):
            rows.append(_row(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel() * t.element_size()))
    n_bytes, n = sum(r["bytes"] for r in rows), sum(prod(r["shape"]) for r in rows)
    return Summary(tuple(rows), 8 * inner_bytes / inner if inner else None, 8 * n_bytes / max(n, 1), n_bytes, n)


def bits_per_weight(net: nn.Module) -> float:
    """Over the compressed layers, scales and padding included; over all weights where no layer is compressed."""
    s = summary(net)
    return s.bits_per_weight_file if s.bits_per_weight is None else s.bits_per_weight


def _chosen(net: nn.Module, skip: list[str], keep_ends: bool) -> Iterator[tuple[str, nn.Module]]:
    layers = [(n, m, swap.kind_of(m)) for n, m in net.named_modules()]
    convs, linears = ([n for n, _, k in layers if k == kind] for kind in ("conv2d", "linear"))
    ends = {*convs[:1], *linears[-1:]} if keep_ends else set()
    for name, module, kind in layers:
        if kind in KINDS and name not in ends and not any(fnmatchcase(name, pattern) for pattern in skip):
            yield name, module


def _check_blocks(name: str, module: Any, fmt: Format) -> None:
    try:
        fmt.blocks.size(module.weight.shape[0], prod(module.weight.shape[1:]))
    except ShapeError as e:
        raise ShapeError(f"{name}: {e}") from None


def _input_of(module: Any) -> Any:
    """The weight as it reaches the last weight function."""
    w = module.parametrizations.weight.original.detach()
    for function in list(module.parametrizations.weight)[:-1]:
        w = function(w)
    return w.detach()


def _quantized(net: nn.Module) -> Iterator[tuple[str, QuantizedTensor]]:
    yield from ((name, f.quantized(_input_of(m))) for name, m, f in weight_functions(net))
    yield from ((name, m.quantized()) for name, m in swap.packed_modules(net))


def _belongs_to(tensor: str, compressed: dict[str, QuantizedTensor]) -> bool:
    """True for the stored tensors of a packed layer and the float original of a prepared one."""
    for name, qt in compressed.items():
        prefix = f"{name}." if name else ""
        if (
            tensor in {f"{prefix}{key}" for key in qt.tensors()}
            or tensor == f"{prefix}parametrizations.weight.original"
        ):
            return True
    return False


def _row(name: str, shape: tuple[int, ...], fmt: str, n_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "shape": shape,
        "format": fmt,
        "bits_per_weight": 8 * n_bytes / max(prod(shape), 1),
        "bytes": n_bytes,
    }
