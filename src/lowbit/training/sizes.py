"""What a float, prepared or packed network costs, counted from what a file would hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from lowbit.formats import QuantizedTensor
from lowbit.runtime import swap
from lowbit.training.attach import STEP, latent_of, weight_functions


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


def _quantized(net: nn.Module) -> Iterator[tuple[str, QuantizedTensor]]:
    yield from ((name, f.quantized(latent_of(m))) for name, m, f in weight_functions(net))
    yield from ((name, m.quantized()) for name, m in swap.packed_modules(net))


def _belongs_to(tensor: str, compressed: dict[str, QuantizedTensor]) -> bool:
    """True for the stored tensors of a packed layer and for what a prepared one holds in their place."""
    if tensor == STEP:
        return True
    for name, qt in compressed.items():
        prefix = f"{name}." if name else ""
        if tensor in {f"{prefix}{key}" for key in qt.tensors()} or tensor.startswith(
            f"{prefix}parametrizations.weight."
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
