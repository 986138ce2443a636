"""Layers whose weights and inputs are both bits: PackedBinaryLinear, PackedBinaryConv2d.

    a = the input's levels: 1 where x >= threshold, else -1 (inputs="sign") or 0 ("unit"); ternary: -1 where x <= low
    y = (a * w) * (scale * gain) + bias (+ residual), and where given  prelu(y - shift, slope) + offset

The weight is a quantized tensor of 1-bit or ternary levels with one scale a row. Everything after the product (a folded
batch-norm, the scale of {0, 1} inputs, a residual, RPReLU) is done while the sums are in registers. Outside the image
lies level 0, as in training with zero padding, or -1 or +1 (pad).

    layer = PackedBinaryConv2d.from_float(w, inputs="sign", threshold=t, padding=1).fold(batch_norm)
    y = layer(x, residual=x)
    y, bits = layer.with_bits(x, next_layer.high)      what the next layer would make of y, for its own call

On devices other than the CPU the same formula runs on decoded weights.
"""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import FormatError, KernelError, ShapeError
from lowbit.formats import Blocks, Format, Grid, QuantizedTensor, levels
from lowbit.runtime import binary_depthwise, binary_ops, kernels
from lowbit.runtime import binary_kernels as bk
from lowbit.runtime.conv_layer import pair
from lowbit.runtime.packed import Packed, empty_bias

EXTRAS = ("high", "low", "gain", "prelu")  # tensors beside those of the weight


class PreparedBits(NamedTuple):
    """Derived from the buffers `source` for the kernel row `isa`: the operators' tensors and numbers."""

    source: tuple[Any, ...]
    isa: str
    plan: bk.Plan
    scale: Tensor
    sizes: list[int]
    numbers: list[int]
    depthwise: "binary_depthwise.Depthwise | None" = None  # what runs instead of the plan, from floats to floats


class _PackedBinary(Packed):
    """Both layers: a linear layer is a convolution of 1 x 1 images."""

    groups = 1
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __init__(
        self,
        meta: dict[str, Any],
        channels: int,
        inputs: str,
        pad: int,
        extras: "dict[str, tuple[int, ...]] | None",
        device: Any,
    ):
        super().__init__(meta, device)
        bk.kind_of(inputs, False)
        if pad not in (-1, 0, 1) or (pad and inputs != "sign"):
            raise FormatError(f"pad={pad} is no level of inputs={inputs!r}. Use 0, or -1 or 1 for signs.")
        self.inputs, self.pad = inputs, pad
        self.folded: tuple[str, ...] = ()  # names of the modules whose work this layer does as well
        self._sources = (*self._packed, *EXTRAS)
        shapes = {"high": (channels,)} if extras is None else extras
        for key in EXTRAS:
            shape = shapes.get(key)
            self.register_buffer(key, None if shape is None else torch.empty(shape, device=device))
        self.high: Tensor
        if self._buffers["high"] is None:  # thresholds that are all 0 are not stored
            self.register_buffer("high", torch.zeros(channels, device=_real(device)), persistent=False)
        self._bits: PreparedBits | None = None

    def _set_extras(self, extras: "dict[str, Tensor | None]") -> None:
        for key, t in extras.items():
            self._buffers[key] = None if t is None else t.detach().float().contiguous()
        persistent = bool(self.high.any()) or self._buffers["low"] is not None
        self.register_buffer("high", self.high, persistent)

    def fill(self, qt: QuantizedTensor) -> None:
        """Take the tensors of a quantized tensor of the same meta."""
        self._buffers.update(qt.tensors())
        self._forget()

    def fold(self, norm: nn.Module) -> Any:
        """Take over a batch-norm that follows, into gain and bias (of its running statistics); returns this layer.

        Raises FormatError for a norm without running statistics, or where an RPReLU already follows.
        """
        mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        if mean is None or var is None or self._buffers["prelu"] is not None:
            raise FormatError(f"{type(norm).__name__} cannot be folded here: it needs running statistics and to follow "
                              "the product directly.")  # fmt: skip
        norm_: Any = norm
        gain = torch.rsqrt(var.detach().double() + norm_.eps)
        gain = gain if norm_.weight is None else gain * norm_.weight.detach().double()
        bias = 0 if self.bias is None else self.bias.detach().double()
        bias = (bias - mean.detach().double()) * gain
        bias = bias if norm_.bias is None else bias + norm_.bias.detach().double()
        self._multiply(gain)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self._forget()
        return self

    def _multiply(self, factor: Tensor) -> None:
        """Row n times factor (N,): its size goes into the scale, kept as float32, and its sign into the levels."""
        table, scale = self._levels()
        gain = self._buffers["gain"]
        factor = factor if gain is None else factor * gain.double()
        flip = torch.where(factor < 0, -1.0, 1.0).reshape(-1, *[1] * (table.ndim - 1))
        qt = quantized_levels((table * flip).reshape(self.shape), (scale * factor.abs()).float())
        for key in self._packed:
            del self._buffers[key]
        self.meta = qt.meta()
        for key, t in qt.tensors().items():
            self.register_buffer(key, t)
        self._buffers["gain"] = None
        self._packed = tuple(qt.tensors())
        self._sources = (*self._packed, *EXTRAS)

    def extras(self) -> dict[str, Tensor]:
        """The stored tensors beside those of the weight and the bias."""
        kept = [key for key in EXTRAS if key not in self._non_persistent_buffers_set]
        return {key: t for key in kept if (t := self._buffers[key]) is not None}

    def describe(self) -> dict[str, Any]:
        """What a manifest says beside the weight's meta."""
        shapes = {key: list(t.shape) for key, t in self.extras().items()}
        return {"inputs": self.inputs, "pad": self.pad, "extras": shapes, "folded": list(self.folded)}

    def _levels(self) -> tuple[Tensor, Tensor]:
        """(levels (N, C/groups, kh, kw) int8, scale (N,) float32)."""
        qt = self.quantized()
        fmt, (out, in_) = qt.format, qt.matrix_shape
        if len(qt.parts) > 1 or fmt.levels.name not in ("binary", "ternary") or fmt.blocks.size(out, in_)[1] != in_:
            raise FormatError(f"{fmt} is no format of a binary layer: use binary-channel or ternary-channel.")
        values = torch.tensor(fmt.levels.values, dtype=torch.float32, device=qt.part_codes().device)
        table = values[qt.part_codes().long()].to(torch.int8).reshape(*self.shape, *[1] * (4 - len(self.shape)))
        rows = fmt.blocks.size(out, in_)[0]
        return table, qt.grid().scale.reshape(-1).float().repeat_interleave(rows)

    def _pads(self) -> list[int]:
        return [0, 0, 0, 0]  # left, right, top, bottom

    def _ready(self) -> PreparedBits:
        kept = self._bits
        if torch.compiler.is_compiling():
            if kept is None:
                raise KernelError(
                    "the packed layers are not prepared: call lowbit.runtime.prepare(model) before tracing."
                )
            return kept
        source = (*(self._buffers[key] for key in self._sources), self._parameters["bias"])
        isa = kernels._forced()
        if kept is None or kept.isa != isa or not all(map(is_, kept.source, source)):
            table, scale = self._levels()
            gain = self._buffers["gain"]
            w = bk.weight(table, self.inputs, self.groups, bk.checked_isa())
            left, right, top, bottom = self._pads()
            g = bk.Geometry(self.stride, (top, bottom, left, right), self.dilation, self.pad)
            scale = scale if gain is None else scale * gain
            bias = None if self.bias is None else self.bias.detach().float().contiguous()
            then = bk.Epilogue(scale, bias, None, self._buffers["prelu"])
            plan = bk.Plan(w, g, then, self._buffers["high"], self._buffers["low"])
            kept = self._bits = PreparedBits(source, isa, plan, scale, *binary_ops.arguments(w, g))
            if then.prelu is None and binary_depthwise.fits(self.groups, self.shape):
                kept = self._bits = kept._replace(depthwise=binary_depthwise.Depthwise(table, scale, bias, g))
        return kept

    def prepare(self) -> Any:
        return self._ready()

    def _kept(self) -> tuple[str, ...]:
        return self._sources

    def _forget(self) -> None:
        super()._forget()
        self._bits = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_bits": None}

    def _run(self, x: Tensor, residual: "Tensor | None", next_high: "Tensor | None", want_y: bool) -> Any:
        """x: (B, C, H, W) floats, or bits. Returns y, or (y, bits) with next_high."""
        ready = self._ready()
        if self.training and x.requires_grad and torch.is_grad_enabled():  # in eval mode y is simply a constant
            raise KernelError(binary_ops.NO_GRADIENT)
        if type(x) is Tensor and not torch.compiler.is_compiling():  # without the way through the dispatcher
            if ready.depthwise is not None and next_high is None and x.dtype is torch.float32:
                return ready.depthwise(self.input_levels(x), residual)
            y, bits = ready.plan.run(x, residual, next_high, want_y)
            return y if next_high is None else (y, bits)
        buffers, w = self._buffers, ready.plan.w
        args = (
            x, buffers["high"], buffers["low"], w.rows, w.fast, w.base, w.tap_sum, ready.scale, self.bias, residual,
            buffers["prelu"], next_high, ready.sizes, ready.numbers,
        )  # fmt: skip
        return binary_ops.binary_conv2d(*args) if next_high is None else binary_ops.binary_conv2d_bits(*args, want_y)

    def input_levels(self, x: Tensor) -> Tensor:
        """The levels the layer sees in x, channels in dimension 1, in x's dtype."""
        shape = (-1, *[1] * (x.ndim - 2))
        high, low = self._buffers["high"], self._buffers["low"]
        assert high is not None
        x = x.detach()  # what follows is no function with a gradient; compared in one pass
        up = torch.ge(x, high.reshape(shape), out=torch.empty_like(x))
        if self.inputs == "sign":
            return up.mul_(2).sub_(1)
        return up if low is None else up.sub_(torch.le(x, low.reshape(shape), out=torch.empty_like(x)))

    def reference(self, x: Tensor, residual: "Tensor | None" = None) -> Tensor:
        """The formula in torch, on decoded weights; on every device. y of (B, N, H', W')."""
        table, scale = self._levels()
        gain, prelu = self._buffers["gain"], self._buffers["prelu"]
        a = F.pad(self.input_levels(x.float()), self._pads(), value=float(self.pad))
        dot = F.conv2d(a, table.float(), None, self.stride, 0, self.dilation, self.groups)
        y = dot * (scale if gain is None else scale * gain).reshape(-1, 1, 1)
        y = y if self.bias is None else y + self.bias.float().reshape(-1, 1, 1)
        y = y if residual is None else y + residual
        if prelu is not None:
            shift, slope, offset = prelu.reshape(3, -1, 1, 1)
            y = y - shift
            y = torch.where(y > 0, y, y * slope) + offset
        return y

    def _sizes(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, inputs={self.inputs}" + (f", pad={self.pad}" if self.pad else "")


def quantized_levels(w: Tensor, scale: "Tensor | None" = None) -> QuantizedTensor:
    """A quantized tensor of weights that are levels already: w (N, ...) in {-1, 1} or {-1, 0, 1}, scale (N,) or None.

    Without a scale, a row of w may be its levels times any number. Raises FormatError for anything else.
    """
    flat = w.detach().float().reshape(len(w), -1)
    given = flat.abs().amax(1) if scale is None else torch.ones(len(w), device=w.device)
    given = torch.where(given > 0, given, 1.0)
    codes = flat / given[:, None]
    if not bool(((codes == 0) | (codes.abs() == 1)).all()):
        raise FormatError("these weights are not -1, 0 and 1 times one scale a row: quantize them first.")
    ternary = bool((codes == 0).any())
    fmt = Format(levels("ternary" if ternary else "binary"), Blocks(1, -1), scale_dtype="fp32")
    stored = given if scale is None else scale.detach().float()
    numbers = (codes + 1 if ternary else codes > 0).to(torch.uint8)
    return QuantizedTensor.from_codes(numbers, Grid(stored.reshape(-1, 1)), fmt, tuple(w.shape))


class PackedBinaryConv2d(_PackedBinary):
    """x (B, C, H, W), floats or the bits of a layer before, -> (B, N, H', W') float32 in channels_last memory."""

    def __init__(
        self,
        meta: dict[str, Any],
        bias: bool = False,
        stride: "int | tuple[int, int]" = 1,
        padding: "int | str | tuple[int, int]" = 0,
        dilation: "int | tuple[int, int]" = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        inputs: str = "sign",
        pad: int = 0,
        extras: "dict[str, tuple[int, ...]] | None" = None,
    ) -> None:
        """Empty, for a loader; pad is the level that lies outside the image, extras the shapes of further tensors."""
        shape = tuple(meta["shape"])
        if len(shape) != 4 or groups < 1 or shape[0] % groups or padding_mode != "zeros":
            raise ShapeError(
                f"a weight of shape {shape} with groups={groups} and padding_mode={padding_mode!r} is no binary "
                "convolution; padding is zeros (or the level `pad`)."
            )
        super().__init__(meta, shape[1] * groups, inputs, pad, extras, device)
        self.out_channels, self.in_channels, self.kernel_size = shape[0], shape[1] * groups, (shape[2], shape[3])
        self.stride, self.dilation, self.groups, self.padding_mode = pair(stride), pair(dilation), groups, "zeros"
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.register_parameter("bias", empty_bias(bias, self.out_channels, device, torch.float32))

    @classmethod
    def from_quantized(
        cls,
        qt: QuantizedTensor,
        bias: "Tensor | None" = None,
        *,
        inputs: str = "sign",
        threshold: "Tensor | float" = 0.0,
        low: "Tensor | None" = None,
        gain: "Tensor | None" = None,
        prelu: "Tensor | None" = None,
        pad: int = 0,
        **conv: Any,
    ) -> "PackedBinaryConv2d":
        """threshold (and low, for ternary inputs): a number or (C,); gain: (N,), multiplies the weight's scale;
        prelu: (3, N), shift, slope and offset; conv: stride, padding, dilation, groups as nn.Conv2d.
        """
        layer = cls(qt.meta(), device="meta", inputs=inputs, pad=pad, **conv)
        layer._fill(qt, None if bias is None else bias.float())
        layer._set_extras(_extras(layer.in_channels, layer.out_channels, inputs, threshold, low, gain, prelu))
        return layer

    @classmethod
    def from_float(
        cls, w: Tensor, scale: "Tensor | None" = None, bias: "Tensor | None" = None, **options: Any
    ) -> "PackedBinaryConv2d":
        """From levels (N, C/groups, kh, kw) in {-1, 1} or {-1, 0, 1}; options as `from_quantized`."""
        return cls.from_quantized(quantized_levels(w, scale), bias, **options)

    def _pads(self) -> list[int]:
        if isinstance(self.padding, str):
            totals = [d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size)]
            (top, left), (h, w) = (t // 2 for t in totals), totals
            return [left, w - left, top, h - top]
        return [self.padding[1], self.padding[1], self.padding[0], self.padding[0]]

    def forward(self, x: Tensor, residual: "Tensor | None" = None) -> Tensor:
        """residual: as y, added to it. Raises ShapeError where sizes do not fit."""
        if x.dtype != torch.int32:
            if x.ndim == 3:
                return self.forward(x[None], None if residual is None else residual[None])[0]
            if x.ndim != 4 or x.shape[1] != self.in_channels:
                raise ShapeError(
                    f"input is {tuple(x.shape)}, the layer needs (batch, {self.in_channels}, height, width)."
                )
            if x.device.type != "cpu":
                return self.reference(x, residual).to(x.dtype)
        y = self._run(_float32(x), None if residual is None else _float32(residual), None, True)
        return y if x.dtype in (torch.float32, torch.int32) else y.to(x.dtype)

    def with_bits(
        self, x: Tensor, next_high: Tensor, residual: "Tensor | None" = None, want_y: bool = True
    ) -> tuple["Tensor | None", Tensor]:
        """(y, bits): what a next layer without groups, with thresholds next_high (N,), makes of y. On the CPU only."""
        return self._run(_float32(x), residual, next_high, want_y)


class PackedBinaryLinear(_PackedBinary):
    """x (..., in_features) -> (..., out_features)."""

    def __init__(
        self,
        meta: dict[str, Any],
        bias: bool = False,
        device: Any = None,
        inputs: str = "sign",
        extras: "dict[str, tuple[int, ...]] | None" = None,
        pad: int = 0,
    ) -> None:
        """Empty, for a loader."""
        shape = tuple(meta["shape"])
        if len(shape) != 2:
            raise ShapeError(f"a linear layer's weight has two dimensions, not {shape}. Use PackedBinaryConv2d.")
        super().__init__(meta, shape[1], inputs, 0, extras, device)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", empty_bias(bias, self.out_features, device, torch.float32))

    @classmethod
    def from_quantized(
        cls,
        qt: QuantizedTensor,
        bias: "Tensor | None" = None,
        *,
        inputs: str = "sign",
        threshold: "Tensor | float" = 0.0,
        low: "Tensor | None" = None,
        gain: "Tensor | None" = None,
        prelu: "Tensor | None" = None,
    ) -> "PackedBinaryLinear":
        """As `PackedBinaryConv2d.from_quantized`."""
        layer = cls(qt.meta(), device="meta", inputs=inputs)
        layer._fill(qt, None if bias is None else bias.float())
        layer._set_extras(_extras(layer.in_features, layer.out_features, inputs, threshold, low, gain, prelu))
        return layer

    @classmethod
    def from_float(
        cls, w: Tensor, scale: "Tensor | None" = None, bias: "Tensor | None" = None, **options: Any
    ) -> "PackedBinaryLinear":
        """From levels (N, K) in {-1, 1} or {-1, 0, 1}."""
        return cls.from_quantized(quantized_levels(w, scale), bias, **options)

    def forward(self, x: Tensor, residual: "Tensor | None" = None) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"input has {x.shape[-1]} features, the layer needs {self.in_features}.")
        images = _float32(x).reshape(-1, self.in_features, 1, 1)
        added = None if residual is None else _float32(residual).reshape(-1, self.out_features, 1, 1)
        y = self._run(images, added, None, True) if x.device.type == "cpu" else self.reference(images, added)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)


def _real(device: Any) -> Any:
    """Where a tensor lies that is computed, not loaded."""
    return "cpu" if device is not None and torch.device(device).type == "meta" else device


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.int32) else x.float()


def _extras(
    c: int, n: int, inputs: str, threshold: Any, low: Any, gain: "Tensor | None", prelu: "Tensor | None"
) -> "dict[str, Tensor | None]":
    """Checked and shaped. Raises ShapeError, or FormatError where a second threshold is missing or superfluous."""
    if (inputs == "ternary") != (low is not None):
        raise FormatError("ternary inputs have two thresholds (threshold and low), the others one.")
    found = {
        "high": torch.as_tensor(threshold, dtype=torch.float32).expand(c),
        "low": None if low is None else torch.as_tensor(low, dtype=torch.float32).expand(c),
        "gain": gain,
        "prelu": prelu,
    }
    for key, size in (("high", (c,)), ("low", (c,)), ("gain", (n,)), ("prelu", (3, n))):
        t = found[key]
        if t is not None and tuple(t.shape) != size:
            raise ShapeError(f"{key} has shape {tuple(t.shape)}, needed {size}.")
    return found
