"""Batch-norms into the layers of bits before them.

    v = (dot * scale - mean) * gamma / sqrt(var + eps) + beta  =  dot * scale' + bias'

so that what follows (a residual, RPReLU, the next layer's threshold) is one comparison or a few float steps on the
integer sum. A negative gamma turns the levels of its row, gamma = 0 leaves the bias alone. torch.fx tells which norm
follows which layer; networks that it cannot follow keep their norms, which are then modules of their own as before.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from lowbit.runtime import swap
from lowbit.runtime.packed import Packed


class Tracer(fx.Tracer):
    """Packed layers, and modules that a fused layer may take over, are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Packed) or is_rprelu(m) or super().is_leaf_module(m, module_qualified_name)


def is_rprelu(module: nn.Module) -> bool:
    """y = PReLU(x + before, slope) + after, each a parameter a channel."""
    return {"before", "slope", "after"} == set(dict(module.named_parameters(recurse=False)))


def trace(net: nn.Module) -> "fx.Graph | None":
    """The calls of the network, or None where they depend on values and cannot be told beforehand."""
    try:
        return Tracer().trace(net)
    except Exception:  # whatever a network's own Python does with a proxy
        return None


def fold_norms(net: nn.Module) -> list[str]:
    """Fold every batch-norm that alone follows a layer of bits, in place; returns the layers' names."""
    graph = trace(net) if any(isinstance(m, swap.BINARY_LAYERS) for m in net.modules()) else None
    pairs = [] if graph is None else list(_pairs(net, graph))
    for layer, norm in pairs:
        module: Any = net.get_submodule(layer)
        swap.set_folded(net, module.fold(net.get_submodule(norm)), [norm])
    return [layer for layer, _ in pairs]


def _pairs(net: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """(layer, norm): each module in one place of the network and called once."""
    names: dict[int, int] = {}
    for _, m in net.named_modules(remove_duplicate=False):
        names[id(m)] = names.get(id(m), 0) + 1
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(net.get_submodule(node.target), swap.BINARY_LAYERS):
            continue
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.op != "call_module":
            continue
        layer: Any
        norm: Any
        layer, norm = (net.get_submodule(n.target) for n in (node, user))
        once = all(calls.count(n.target) == 1 for n in (node, user)) and names[id(layer)] == names[id(norm)] == 1
        if (
            once
            and isinstance(norm, swap.NORMS)
            and norm.running_mean is not None
            and norm.num_features == layer.shape[0]
        ):
            yield node.target, user.target
