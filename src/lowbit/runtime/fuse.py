"""A packed network as one chain of kernel calls: what lies between two layers of bits is done by the first of them.

    conv(x) + shortcut -> RPReLU -> sign of the next layer      one call: returns y, the next layer's bits, or both

`fuse(net, x)` follows the calls of a network (torch.fx), gives every 1-bit convolution the addition, the RPReLU, PReLU
or ReLU that alone follow it, and the thresholds of the convolution after that; a clamp to [-1, 1] before a sign changes
nothing and is passed by. The steps and their order are those of the modules, so the results are the same bit for bit.
The answer is a network for inference; save the packed network it came from.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lowbit.errors import KernelError
from lowbit.runtime.binary_layers import PackedBinaryConv2d
from lowbit.runtime.fold import Tracer, is_rprelu

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class FusedBinaryConv2d(nn.Module):
    """(x or its bits, residual) -> y; with `next_high` the next layer's bits as well, or (want_y=False) alone."""

    def __init__(self, layer: PackedBinaryConv2d):
        super().__init__()
        self.layer, self.want_y = layer, True
        self.next_high: Tensor | None
        self.register_buffer("next_high", None)

    def forward(self, x: Tensor, residual: "Tensor | None" = None) -> Any:
        if self.next_high is None:
            return self.layer(x, residual)
        y, bits = self.layer.with_bits(x, self.next_high, residual, self.want_y)
        return (y, bits) if self.want_y else bits


def fuse(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network of packed layers `net` in eval mode, fused; x: an example input, on which both must agree.

    Modules are copied where they change; `net` stays as it is. On the CPU only.
    Raises KernelError for a network in training mode, one whose calls torch.fx cannot follow, or without 1-bit
    convolutions, and where the outputs differ.
    """
    if net.training:
        raise KernelError("a network in training mode cannot be fused: call net.eval() first.")
    try:
        graph = Tracer().trace(net)
    except Exception as e:  # whatever the network's own Python does with a proxy
        raise KernelError(
            f"torch.fx cannot follow this network ({e}): run it unfused, or take branches out of forward."
        ) from e
    fused = fx.GraphModule(net, graph, "Fused")
    with torch.no_grad():
        ShapeProp(fused).propagate(x)  # shapes, for additions
    _drop_identities(fused)
    found = list(_binary(fused))
    if not found:
        raise KernelError("there is no 1-bit convolution in this network: pack one with 1-bit weights and inputs.")
    for i, node in enumerate(found):
        _Chain(fused, node).replace(f"fused{i}")
    for node in list(fused.graph.nodes):
        _pass_bits(fused, node)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    fused.recompile()
    fused.delete_all_unused_submodules()
    _check(net, fused, x)
    return fused


def _check(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted, got = net(x), fused(x)
    if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-5):
        raise KernelError(
            "the fused network gives other numbers than the one it came from: run it unfused, and report it."
        )


def _called(gm: fx.GraphModule, node: Any) -> "nn.Module | None":
    return gm.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _binary(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if isinstance(_called(gm, n), PackedBinaryConv2d) and len(n.args) == 1]


def _drop_identities(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if isinstance(_called(gm, node), (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


class _Chain:
    """A 1-bit convolution and what alone follows it: an addition, then an activation."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node):
        self.gm, self.conv, self.last = gm, node, node
        self.residual: fx.Node | None = None
        self.prelu: Tensor | None = None
        layer: Any = _called(gm, node)
        self.layer: PackedBinaryConv2d = layer
        while layer.extras().get("prelu") is None and self.prelu is None and len(self.last.users) == 1:
            user = next(iter(self.last.users))
            if self.residual is None and (other := _added(user, self.last)) is not None:
                self.residual = other
            elif (activation := _called(gm, user)) is None or (prelu := _prelu(activation, layer.out_channels)) is None:
                break
            else:
                self.prelu = prelu
            self.last = user

    def replace(self, name: str) -> None:
        layer = copy.deepcopy(self.layer)
        if self.prelu is not None:
            layer._buffers["prelu"] = self.prelu
        self.gm.add_submodule(name, FusedBinaryConv2d(layer))
        with self.gm.graph.inserting_after(self.last):
            args = (self.conv.args[0],) if self.residual is None else (self.conv.args[0], self.residual)
            new = self.gm.graph.call_module(name, args)
        new.meta = self.last.meta
        self.last.replace_all_uses_with(new)
        self.gm.graph.eliminate_dead_code()


def _added(node: fx.Node, value: fx.Node) -> "fx.Node | None":
    """What is added to `value`, if the node is an addition of two tensors of one shape."""
    if node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    other = b if a is value else a
    same = isinstance(other, fx.Node) and other is not value and _shape(other) == _shape(value)
    return other if same else None  # type: ignore[return-value]


def _shape(node: fx.Node) -> Any:
    meta: Any = node.meta.get("tensor_meta")
    return (meta.shape, meta.dtype) if hasattr(meta, "shape") else None


def _prelu(module: nn.Module, channels: int) -> "Tensor | None":
    """(3, N): shift, slope and offset of an RPReLU, PReLU or ReLU; None for anything else."""
    zero = torch.zeros(channels)
    if is_rprelu(module):
        before, slope, after = (p.detach().float() for p in (module.before, module.slope, module.after))  # type: ignore[operator, union-attr]
        return torch.stack([-before, slope, after])
    if isinstance(module, nn.PReLU):
        return torch.stack([zero, module.weight.detach().float().expand(channels), zero])
    return torch.stack([zero, zero, zero]) if isinstance(module, nn.ReLU) else None


def _pass_bits(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let a fused convolution make the bits of the convolutions that read it, if they agree on the thresholds."""
    made = _called(gm, node)
    if not isinstance(made, FusedBinaryConv2d):
        return
    readers = [(user, node) for user in node.users] + [(u, h) for h in _clamps(gm, node) for u in h.users]
    takers = [u for u, value in readers if _takes_bits(gm, u, value, clamped=value is not node)]
    if not takers:
        return
    high = _called(gm, takers[0]).layer.high  # type: ignore[union-attr]
    takers = [u for u in takers if torch.equal(_called(gm, u).layer.high, high)]  # type: ignore[union-attr, arg-type]
    made.next_high = high.clone()  # type: ignore[operator, union-attr]
    with gm.graph.inserting_after(node):
        bits = gm.graph.call_function(operator.getitem, (node, 1))
        y = gm.graph.call_function(operator.getitem, (node, 0))
    node.replace_all_uses_with(y, lambda user: user not in (bits, y))
    for user in takers:
        user.args = (bits, *user.args[1:])
    gm.graph.eliminate_dead_code()
    if not y.users:
        made.want_y = False
        bits.replace_all_uses_with(node)
        gm.graph.erase_node(bits)


def _clamps(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Hardtanh of the node."""
    found = [(user, _called(gm, user)) for user in node.users]
    return [u for u, m in found if isinstance(m, nn.Hardtanh) and (m.min_val, m.max_val) == (-1.0, 1.0)]


def _takes_bits(gm: fx.GraphModule, user: fx.Node, value: fx.Node, clamped: bool) -> bool:
    reader = _called(gm, user)
    if not isinstance(reader, FusedBinaryConv2d) or user.args[0] is not value:
        return False
    layer = reader.layer
    plain = layer.groups == 1 and layer.inputs in ("sign", "unit")
    return plain and (not clamped or bool(((layer.high > -1) & (layer.high <= 1)).all()))
