"""A packed network as one chain of kernel calls: what lies between two low-bit layers is done by the first of them.

    1-bit:  conv(x) + shortcut -> RPReLU -> sign of the next layer
    k-bit:  conv(q) -> batch-norm + shortcut -> ReLU -> the next layer's integer grid

Each line is one call that returns y, what the next layer reads, or both. `fuse(net, x)` follows the calls of a network
(torch.fx) and gives every convolution of bits, and every packed one with inputs on an integer grid or in int8, what
alone follows it, and the thresholds or the grid of the convolution after that. A clamp to [-1, 1] before a sign changes
nothing and is passed by. Between layers of bits the steps are those of the modules, and so are the results, bit for
bit; elsewhere a norm's steps are rounded in another order. The answer is for inference; save the network it came from.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from lowbit.errors import KernelError
from lowbit.runtime import binary_kernels, conv_kernels, swap
from lowbit.runtime.binary_kernels import Geometry
from lowbit.runtime.binary_layers import PackedBinaryConv2d
from lowbit.runtime.conv_kernels import IntGrid
from lowbit.runtime.conv_layer import PackedConv2d
from lowbit.runtime.fold import Tracer, is_rprelu

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (F.relu, torch.relu, "relu", "relu_")


class FusedBinaryConv2d(nn.Module):
    """(x or its bits, residual) -> y; with `next_high` the next layer's bits as well, or (want_y=False) alone."""

    def __init__(self, layer: PackedBinaryConv2d):
        super().__init__()
        self.layer, self.want_y = layer, True
        self.next_high: Tensor | None
        self.register_buffer("next_high", None)
        self._plan: binary_kernels.Plan | None = None

    def forward(self, x: Tensor, residual: "Tensor | None" = None) -> Any:
        if self._plan is None:  # the layer's own call looks whether its tensors have changed, which takes as long as
            self._plan = self.layer.prepare().plan  # the product of 64 channels of 8 x 8
        y, bits = self._plan.run(x, residual, self._buffers["next_high"], self.want_y)
        return y if bits is None else (y, bits) if self.want_y else bits

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}

    def passes_to(self, other: Any, clamped: bool) -> bool:
        """Can the other layer read what this one would make for it? Then this one makes it."""
        if not isinstance(other, FusedBinaryConv2d):
            return False
        layer, high = other.layer, other.layer.high
        plain = layer.groups == 1 and layer.inputs in ("sign", "unit")
        fits = plain and (not clamped or bool(((high > -1) & (high <= 1)).all()))
        if fits and self.next_high is None:
            self.next_high = high.clone()
        return fits and torch.equal(self.next_high, high)  # type: ignore[arg-type]


class FusedConv2d(nn.Module):
    """(x or its int8 levels, residual) -> y; with `next_grid` the next layer's levels as well, or alone."""

    def __init__(
        self, layer: PackedConv2d, grid: IntGrid, gain: "Tensor | None", bias: "Tensor | None", relu: bool
    ) -> None:
        super().__init__()
        self.layer, self.grid, self.relu, self.want_y = layer, grid, relu, True
        self.register_buffer("gain", gain)
        self.register_buffer("bias", bias)
        self.next_grid: IntGrid | None = None
        self._plan: conv_kernels.Plan | None = None

    def plan(self) -> conv_kernels.Plan:
        """Made at first use."""
        if self._plan is None:
            layer, (left, right, top, bottom) = self.layer, self.layer._pads()
            geometry = Geometry(layer.stride, (top, bottom, left, right), layer.dilation)
            w = conv_kernels.weight(layer.quantized(), layer.groups, self._buffers["gain"])
            self._plan = conv_kernels.Plan(w, geometry, self._buffers["bias"], self.grid)
        return self._plan

    def forward(self, x: Tensor, residual: "Tensor | None" = None) -> Any:
        y, q = self.plan().run(x, residual, self.relu, self.next_grid, self.want_y)
        return y if q is None else (y, q) if self.want_y else q

    def passes_to(self, other: Any, clamped: bool) -> bool:
        """As `FusedBinaryConv2d.passes_to`."""
        if not isinstance(other, FusedConv2d) or clamped or other.grid.scale == 0:
            return False
        self.next_grid = self.next_grid or other.grid
        return self.next_grid == other.grid

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}


FUSED = (FusedBinaryConv2d, FusedConv2d)


def fuse(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network of packed layers `net` in eval mode, fused; x: an example input, on which both must agree.

    Modules are copied where they change; `net` stays as it is. On the CPU only.
    Raises KernelError for a network in training mode, one whose calls torch.fx cannot follow, or without low-bit
    convolutions that can be fused, and where the outputs of a network of bits differ.
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
    found = [node for node in fused.graph.nodes if _fusible(_called(fused, node)) and len(node.args) == 1]
    if not found:
        raise KernelError(
            "there is no convolution to fuse: pack a network with 1-bit weights and inputs, with inputs on an integer "
            'grid, or with activations="int8".'
        )
    for i, node in enumerate(found):
        _Chain(fused, node).replace(f"fused{i}")
    for node in list(fused.graph.nodes):
        _pass_on(fused, node)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    fused.recompile()
    fused.delete_all_unused_submodules()
    _check(net, fused, x)
    return fused


def _check(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted, got = net(x), fused(x)
    rounded = any(isinstance(m, FusedConv2d) for m in fused.modules())  # a level more or less may change much after it
    if got.shape != wanted.shape or not (rounded or torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)):
        raise KernelError(
            "the fused network gives other numbers than the one it came from: run it unfused, and report it."
        )


def _called(gm: fx.GraphModule, node: Any) -> "nn.Module | None":
    return gm.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _drop_identities(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if isinstance(_called(gm, node), (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _fusible(module: "nn.Module | None") -> bool:
    return isinstance(module, PackedBinaryConv2d) or (isinstance(module, PackedConv2d) and _grid(module) is not None)


def _grid(layer: PackedConv2d) -> "IntGrid | None":
    """The int8 levels of the layer's input, if it has some."""
    function: Any = layer._modules.get(swap.INPUT_FUNCTION)
    told = None if function is None else function.int_grid()
    grid = IntGrid(*told) if told is not None else IntGrid()
    known = told is not None or (function is None and layer.activations == "int8")
    good = known and grid.fits() and layer.padding_mode == "zeros" and conv_kernels.fits(layer.quantized())
    return grid if good else None


class _Chain:
    """A low-bit convolution and what alone follows it: a batch-norm, an addition, an activation."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node):
        self.gm, self.conv, self.last = gm, node, node
        self.norm: Any = None
        self.residual: fx.Node | None = None
        self.prelu: Tensor | None = None
        self.relu = False
        layer: Any = _called(gm, node)
        self.layer, self.bits = layer, isinstance(layer, PackedBinaryConv2d)
        done = self.bits and layer.extras().get("prelu") is not None
        while not done and len(self.last.users) == 1:
            user = next(iter(self.last.users))
            done = not self._take(user)
            if not done:
                self.last = user
            done = done or self.relu or self.prelu is not None

    def _take(self, user: fx.Node) -> bool:
        """Can the layer do this as well?"""
        module = _called(self.gm, user)
        if self.residual is None and (other := _added(user, self.last)) is not None:
            self.residual = other
        elif not self.bits and self.residual is None and self.norm is None and _is_norm(module, self.layer):
            self.norm = module
        elif isinstance(module, nn.ReLU) or user.target in RELUS:
            self.relu = True
        elif self.bits and module is not None and (prelu := _prelu(module, self.layer.out_channels)) is not None:
            self.prelu = prelu
        else:
            return False
        return True

    def replace(self, name: str) -> None:
        self.gm.add_submodule(name, self._fused_bits() if self.bits else self._fused_levels())
        with self.gm.graph.inserting_after(self.last):
            args = (self.conv.args[0],) if self.residual is None else (self.conv.args[0], self.residual)
            new = self.gm.graph.call_module(name, args)
        new.meta = self.last.meta
        self.last.replace_all_uses_with(new)
        self.gm.graph.eliminate_dead_code()

    def _fused_bits(self) -> nn.Module:
        layer = copy.deepcopy(self.layer)
        if self.relu or self.prelu is not None:
            layer._buffers["prelu"] = torch.zeros(3, layer.out_channels) if self.prelu is None else self.prelu
        return FusedBinaryConv2d(layer)

    def _fused_levels(self) -> nn.Module:
        layer, grid = copy.deepcopy(self.layer), _grid(self.layer)
        layer._modules.pop(swap.INPUT_FUNCTION, None)
        layer._forward_pre_hooks.clear()
        bias = None if layer.bias is None else layer.bias.detach().double()
        gain = None
        if self.norm is not None:
            gain = torch.rsqrt(self.norm.running_var.double() + self.norm.eps)
            gain = gain if self.norm.weight is None else gain * self.norm.weight.detach().double()
            bias = ((0 if bias is None else bias) - self.norm.running_mean.double()) * gain
            bias = bias if self.norm.bias is None else bias + self.norm.bias.detach().double()
        assert grid is not None
        gain, bias = (None if t is None else t.float() for t in (gain, bias))
        return FusedConv2d(layer, grid, gain, bias, self.relu)


def _is_norm(module: "nn.Module | None", layer: Any) -> bool:
    known = isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    return known and module.num_features == layer.out_channels  # type: ignore[union-attr]


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
    """(3, N): shift, slope and offset of an RPReLU or PReLU; None for anything else."""
    zero = torch.zeros(channels)
    if is_rprelu(module):
        before, slope, after = (p.detach().float() for p in (module.before, module.slope, module.after))  # type: ignore[operator, union-attr]
        return torch.stack([-before, slope, after])
    if isinstance(module, nn.PReLU):
        return torch.stack([zero, module.weight.detach().float().expand(channels), zero])
    return None


def _pass_on(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let a fused convolution make the bits or levels of the convolutions that read it, if they agree on them."""
    made: Any = _called(gm, node)
    if not isinstance(made, FUSED):
        return
    readers = [(user, node) for user in node.users] + [(u, h) for h in _clamps(gm, node) for u in h.users]
    inputs = [(u, v is not node) for u, v in readers if isinstance(_called(gm, u), FUSED) and u.args[0] is v]
    takers = [u for u, clamped in inputs if made.passes_to(_called(gm, u), clamped)]
    if not takers:
        return
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
