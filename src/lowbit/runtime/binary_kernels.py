"""Products of 1-bit and ternary weights with 1-bit or ternary inputs: bit planes, and the bare kernel calls.

    kind                 input        weight       dot
    sign_binary          {-1, 1}      {-1, 1}      n - 2 popcount(a ^ w)
    unit_binary          {0, 1}       {-1, 1}      2 popcount(a & w) - popcount(a)
    sign_ternary         {-1, 1}      {-1, 0, 1}   2 popcount(a ? w+ : w-) - popcount(w+ | w-)
    unit_ternary         {0, 1}       {-1, 0, 1}   popcount(a & w+) - popcount(a & w-)
    ternary_ternary      {-1, 0, 1}   {-1, 0, 1}   popcount(a+ w+ | a- w-) - popcount(a+ w- | a- w+)

A plane is 32-bit words, channel c at bit c % 32 of word c // 32, the rest zero. Dot products are exact integers, and so
is what every row of the kernel table makes of them: the float steps after them are the same everywhere, one rounding
each. Before its first use a row is compared with the scalar row, and that with the formula, on small convolutions.

The functions here are bare: float32, on the CPU. `binary_ops` wraps them as torch operators.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import KernelError, ShapeError
from lowbit.runtime import kernels

INPUTS = ("sign", "unit", "ternary")
KINDS = ("sign_binary", "unit_binary", "sign_ternary", "unit_ternary", "ternary_ternary")
OPS = ("binarize", "binary_linear", "binary_conv2d")
MAX_PRODUCTS = 1 << 30  # of one dot product: twice as many must fit int32


class BinaryWeight(NamedTuple):
    """A weight as the kernels take it.

    rows: (N, taps, planes, words) int32; fast: the same as the active row likes it, (bytes,) uint8, in `layout`
    base: (N,) int32, what every dot product has in common; tap_sum: (taps, N) int32, the sum of levels, for padding
    kind: index into KINDS; channels: of the whole input; kernel: (kh, kw)
    """

    rows: Tensor
    fast: Tensor
    base: Tensor
    tap_sum: Tensor
    layout: int
    kind: int
    channels: int
    groups: int
    kernel: tuple[int, int]


def weight(levels: Tensor, inputs: str = "sign", groups: int = 1, isa: "str | None" = None) -> BinaryWeight:
    """From levels (N, C/groups, kh, kw), or (N, C) for a linear layer, in {-1, 1} or {-1, 0, 1}, and the inputs' kind.

    Raises ShapeError where groups do not divide N or a sum has more than 2^30 products.
    """
    w = levels.reshape(*levels.shape, 1, 1) if levels.ndim == 2 else levels
    n, channels, kh, kw = w.shape
    if n % groups or channels * kh * kw > MAX_PRODUCTS or 0 in w.shape[1:]:
        raise ShapeError(f"a binary weight of shape {tuple(levels.shape)} with groups={groups} cannot be multiplied.")
    w = w.to(torch.int8).permute(0, 2, 3, 1).reshape(n, kh * kw, channels)
    kind = kind_of(inputs, bool((w == 0).any()))
    planes = [w > 0, w < 0] if "ternary" in KINDS[kind].split("_")[1:] else [w > 0]
    rows = bits(torch.stack(planes, 2))
    layout = _extension().binary_layout(kernels.active_isa() if isa is None else isa)
    fast = torch.empty(
        _extension().binary_size(rows.numpy(), channels, groups, kind, layout), dtype=torch.uint8, device="cpu"
    )
    _call(_extension().binary_prepack, rows, channels, groups, kind, layout, fast)
    counts = w.to(torch.int32)
    base = {"sign_binary": counts.new_full((n,), kh * kw * channels), "sign_ternary": -counts.abs().sum((1, 2))}
    tap_sum = counts.sum(2).T.to(torch.int32).contiguous()
    return BinaryWeight(
        rows,
        fast,
        base.get(KINDS[kind], counts.new_zeros(n)).to(torch.int32),
        tap_sum,
        layout,
        kind,
        channels * groups,
        groups,
        (int(kh), int(kw)),
    )


def kind_of(inputs: str, ternary: bool) -> int:
    """Index into KINDS; ternary inputs take every weight as ternary. Raises KernelError on an unknown kind of input."""
    if inputs not in INPUTS:
        raise KernelError(f"inputs={inputs!r} is unknown. Use one of {', '.join(INPUTS)}.")
    return KINDS.index(f"{inputs}_{'ternary' if ternary or inputs == 'ternary' else 'binary'}")


def bits(flags: Tensor) -> Tensor:
    """(..., C) bool -> (..., ceil(C/32)) int32: flag c at bit c % 32 of word c // 32."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 32)).contiguous().numpy()
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32).copy())


def binarize(x: Tensor, high: Tensor, low: "Tensor | None" = None, groups: int = 1, isa: "str | None" = None) -> Tensor:
    """x (B, C, H, W) -> bits (B, H, W, groups, planes, words) int32: x >= high; with low, a second plane x <= low.

    high, low: (C,). NaN gives bit 0.
    """
    pixels = _pixels(x)
    b, h, w, c = pixels.shape
    out = torch.empty(b, h, w, groups, 1 if low is None else 2, -(-c // groups // 32), dtype=torch.int32, device="cpu")
    _call(_extension().binarize, pixels, groups, high, low, out, kernels._threads(), isa or checked_isa())
    return out


class Geometry(NamedTuple):
    """stride, padding (top, bottom, left, right), dilation as a convolution has them; pad: the level outside."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    pad: int = 0

    def out_size(self, h: int, w: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Raises ShapeError where the kernel does not fit."""
        top, bottom, left, right = self.padding
        tall = (h + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1) // self.stride[0] + 1
        wide = (w + left + right - self.dilation[1] * (kernel[1] - 1) - 1) // self.stride[1] + 1
        if tall < 1 or wide < 1:
            raise ShapeError(f"a {h} x {w} image with its padding is smaller than the kernel {kernel} with dilation.")
        return tall, wide


class Epilogue(NamedTuple):
    """What follows the dot products, in this order, one float32 rounding a step.

    y = dot * scale + bias + residual;  y = prelu(y - shift, slope) + offset;  next_bits = y >= next_high

    scale, bias, next_high: (N,); residual: as y; prelu: (3, N), shift, slope and offset. What is None is left out.
    """

    scale: Tensor
    bias: "Tensor | None" = None
    residual: "Tensor | None" = None
    prelu: "Tensor | None" = None
    next_high: "Tensor | None" = None


class Plan:
    """A convolution whose constant tensors have been checked: `run` costs a few microseconds beside the product.

    high, low: (C,), what turns floats into bits; a plan without them takes bits only. The residual and next_high of
    `then` are given to `run` instead. Raises KernelError where sizes contradict each other.
    """

    def __init__(
        self,
        w: BinaryWeight,
        geometry: Geometry,
        then: Epilogue,
        high: "Tensor | None" = None,
        low: "Tensor | None" = None,
        isa: "str | None" = None,
    ) -> None:
        self.w, self.geometry, self.n = w, geometry, w.rows.shape[0]
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}  # of images seen -> of the output
        self._high: Tensor | None = None  # the last next_high, checked
        top, _, left, _ = geometry.padding
        numbers = (w.groups, *w.kernel, *geometry.stride, top, left, *geometry.dilation, geometry.pad)
        self._plan = _call(
            _extension().BinaryPlan, w.rows, w.fast, w.layout, w.kind, w.channels, numbers, w.base, w.tap_sum,
            then.scale, then.bias, then.prelu, high, low, isa or checked_isa(),
        )  # fmt: skip
        self.planes = 2 if KINDS[w.kind].startswith("ternary") else 1

    def run(
        self,
        x: Tensor,
        residual: "Tensor | None" = None,
        next_high: "Tensor | None" = None,
        want_y: bool = True,
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """(y (B, N, H', W') float32 in channels_last memory, bits for the next layer (B, H', W', 1, 1, words)).

        x: (B, C, H, W) floats, or what `binarize` or a layer before gave (int32). y is None unless wanted, the bits
        unless next_high is given. Raises KernelError, or ShapeError where the kernel does not fit the image.
        """
        w = self.w
        if x.dtype is torch.float32:
            b, c, h, wide = x.shape
            batch_stride, strides_c, strides_h, strides_w = x.stride()
            if (h > 1 and wide > 1 and strides_h != wide * strides_w) or (strides_c == 0 and c > 1 and x.numel()):
                return self.run(x.contiguous(), residual, next_high, want_y)
            _need(c == w.channels, f"x has {c} channels, needed {w.channels}")
            strides = (batch_stride, strides_w if wide > 1 else strides_h, max(strides_c, 1))
        else:
            b, h, wide, *rest = x.shape
            words = -(-w.channels // w.groups // 32)
            _need(x.dtype is torch.int32 and rest == [w.groups, self.planes, words] and x.is_contiguous(),
                  f"x is {x.dtype} {tuple(x.shape)}, no floats and no bits of this layer")  # fmt: skip
            strides = (0, 0, 0)
        _need(x.device.type == "cpu", f"x is on {x.device}")
        if (size := self._sizes.get((h, wide))) is None:
            size = self._sizes[h, wide] = self.geometry.out_size(h, wide, w.kernel)
        oh, ow = size
        y = torch.empty((b, oh, ow, self.n), dtype=torch.float32, device="cpu") if want_y else None
        bits_out = None
        if next_high is not None:
            if next_high is not self._high:
                _vector(next_high, self.n, "next_high")
                self._high = next_high
            bits_out = torch.empty((b, oh, ow, 1, 1, -(-self.n // 32)), dtype=torch.int32, device="cpu")
        if residual is not None:
            residual = self._as_y(residual, (b, self.n, oh, ow))
        try:
            self._plan.run(
                x.data_ptr(), (b, h, wide, oh, ow), strides, 0 if residual is None else residual.data_ptr(),
                0 if next_high is None else next_high.data_ptr(), 0 if y is None else y.data_ptr(),
                0 if bits_out is None else bits_out.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as e:
            raise KernelError(f"kernel refused its arguments: {e}") from e
        return None if y is None else y.permute(0, 3, 1, 2), bits_out

    def _as_y(self, residual: Tensor, shape: tuple[int, ...]) -> Tensor:
        """In y's memory order. Raises KernelError on another shape."""
        _need(tuple(residual.shape) == shape and residual.dtype is torch.float32 and residual.device.type == "cpu",
              f"residual is {residual.dtype} {tuple(residual.shape)}, y is float32 {shape}")  # fmt: skip
        return residual.permute(0, 2, 3, 1).contiguous()


def conv2d(
    x: Tensor,
    w: BinaryWeight,
    geometry: Geometry,
    then: Epilogue,
    high: "Tensor | None" = None,
    low: "Tensor | None" = None,
    want_y: bool = True,
    isa: "str | None" = None,
) -> tuple["Tensor | None", "Tensor | None"]:
    """A plan of one use."""
    return Plan(w, geometry, then, high, low, isa).run(x, then.residual, then.next_high, want_y)


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise KernelError(f"kernel refused its arguments: {otherwise}")


def _vector(t: Tensor, size: int, name: str) -> None:
    good = t.dtype is torch.float32 and t.shape == (size,) and t.is_contiguous() and t.device.type == "cpu"
    _need(good, f"{name} is {t.dtype} {tuple(t.shape)}, needed ({size},) float32, contiguous, on the CPU")


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view where the pixels of an image lie at one stride."""
    h, w = x.shape[2:]
    if h > 1 and w > 1 and x.stride(2) != w * x.stride(3):
        x = x.contiguous()
    return x.permute(0, 2, 3, 1)


def _extension() -> Any:
    return kernels._extension()


_call = kernels._call


# ---------------------------------------------------------------- the table and the self-check


def rows() -> list[dict[str, Any]]:
    """As `kernels.rows`, for the operations of this file."""
    active, out = checked_row(), []
    isas = [(isa, supported) for op, isa, supported in _extension().binary_table() if op == "binary_dot"]
    for op in OPS:
        for isa, supported in isas:
            for kind in KINDS:
                check = ("ok" if _agrees(op, kind, isa) else "failed") if supported else "not supported"
                out.append({"op": op, "format": kind, "isa": isa, "active": isa == active, "selfcheck": check})
    return out


def checked_row() -> str:
    """Name of the row that runs under LOWBIT_ISA."""
    kernels._pick(kernels._forced())  # refuses a name that is unknown
    return _extension().binary_pick(kernels._forced())


def checked_isa() -> str:
    """Name of the active row, checked at first use. Raises KernelError where it disagrees with the scalar row."""
    return _checked(kernels._forced())


@cache
def _checked(force: str) -> str:
    isa = checked_row()
    for op in OPS:
        for kind in KINDS:
            if not _agrees(op, kind, isa):
                other = "Report it, please." if isa == "scalar" else "Set LOWBIT_ISA=scalar to go on without it."
                raise KernelError(
                    f"kernel row {op}/{kind}/{isa} computes wrong results on this machine and is refused. {other}"
                )
    return isa


# (batch, C, H, W, N, kh, kw, groups, stride, padding, dilation, pad): odd everything, grouped, larger than the image
_SHAPES = (
    (2, 5, 4, 3, 7, 3, 2, 1, (1, 2), (1, 1, 1, 0), (1, 1), 0),
    (1, 66, 3, 9, 70, 2, 3, 2, (2, 1), (2, 1, 3, 2), (2, 1), 1),
    (3, 300, 1, 1, 33, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), -1),
    (1, 1, 1, 1, 1, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 1), 0),
)


class _Problem(NamedTuple):
    x: Tensor
    high: Tensor
    low: "Tensor | None"
    inputs: Tensor  # the levels that x stands for
    levels: Tensor
    geometry: Geometry
    then: Epilogue


@cache
def _problem(kind: str, shape: int) -> _Problem:
    b, c, h, w, n, kh, kw, groups, stride, padding, dilation, pad = _SHAPES[shape]
    random = np.random.default_rng(shape)
    inputs, weights = kind.split("_")
    levels = random.integers(-1, 2, (n // groups * groups, c // groups, kh, kw))
    levels = levels if weights == "ternary" else np.where(levels >= 0, 1, -1)
    x = torch.from_numpy(random.standard_normal((b, c, h, w), dtype=np.float32))
    high = torch.from_numpy(random.standard_normal(c, dtype=np.float32)) * 0.3 + 0.3
    low = high - 0.7 if inputs == "ternary" else None
    above = x >= high.reshape(-1, 1, 1)
    below = torch.zeros_like(above) if low is None else x <= low.reshape(-1, 1, 1)
    level = above.int() - (~above if inputs == "sign" else below).int()
    geometry = Geometry(stride, padding, dilation, pad if inputs == "sign" else 0)
    n = len(levels)
    scale, bias, next_high = (torch.from_numpy(random.standard_normal(n, dtype=np.float32)) for _ in range(3))
    oh, ow = geometry.out_size(h, w, (kh, kw))
    residual = torch.from_numpy(random.standard_normal((b, n, oh, ow), dtype=np.float32))
    prelu = torch.from_numpy(random.standard_normal((3, n), dtype=np.float32))
    then = Epilogue(scale, bias, residual, prelu, next_high if groups == 1 else None)
    return _Problem(x, high, low, level, torch.from_numpy(levels), geometry, then)


def _run(op: str, kind: str, p: _Problem, isa: str) -> np.ndarray:
    groups = p.x.shape[1] // p.levels.shape[1]
    if op == "binarize":
        return binarize(p.x, p.high, p.low, groups, isa).numpy().reshape(-1)
    levels, x, geometry, then = p.levels, p.x, p.geometry, p.then
    if op == "binary_linear":  # one position of the same numbers
        x, levels, geometry = x[:, :, :1, :1], levels[:, :, :1, :1], Geometry()
        then = then._replace(residual=None)
    w = weight(levels, kind.split("_")[0], groups, isa)
    y, next_bits = conv2d(x, w, geometry, then, p.high, p.low, True, isa)
    assert y is not None
    flat = y.contiguous().numpy().reshape(-1)
    return flat if next_bits is None else np.concatenate([flat.view(np.int32), next_bits.numpy().reshape(-1)])


def _formula(op: str, kind: str, p: _Problem) -> np.ndarray:
    """What the scalar row must give, without it and without torch's threads; the same float32 steps, in order."""
    groups = p.x.shape[1] // p.levels.shape[1]
    a, levels, g, then = p.inputs.numpy(), p.levels.numpy(), p.geometry, p.then
    if op == "binarize":
        planes = [a > 0] if p.low is None else [a > 0, a < 0]
        planes = [t.transpose(0, 2, 3, 1).reshape(len(a), *a.shape[2:], groups, 1, -1) for t in planes]
        return bits(torch.from_numpy(np.concatenate(planes, -2))).numpy().reshape(-1)
    if op == "binary_linear":
        a, levels, g, then = a[:, :, :1, :1], levels[:, :, :1, :1], Geometry(), then._replace(residual=None)
    y = _dot(a, levels, g, groups).astype(np.float32) * _over(then.scale) + _over(then.bias)
    y = y if then.residual is None else y + then.residual.numpy()
    assert then.prelu is not None
    y = y - _over(then.prelu[0])
    y = np.where(y > 0, y, y * _over(then.prelu[1])) + _over(then.prelu[2])
    if then.next_high is None:
        return y.reshape(-1)
    flags = np.moveaxis(y >= _over(then.next_high), 1, -1)
    return np.concatenate([y.reshape(-1).view(np.int32), bits(torch.from_numpy(flags)).numpy().reshape(-1)])


def _over(t: "Tensor | None") -> np.ndarray:
    assert t is not None
    return t.numpy().reshape(-1, 1, 1)


def _dot(a: np.ndarray, levels: np.ndarray, g: Geometry, groups: int) -> np.ndarray:
    """(B, N, H', W') int64: the convolution, tap by tap."""
    (n, c, kh, kw), (top, bottom, left, right) = levels.shape, g.padding
    oh, ow = g.out_size(a.shape[2], a.shape[3], (kh, kw))
    a = np.pad(a, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=g.pad)
    a, w = a.reshape(len(a), groups, c, *a.shape[2:]).astype(np.int64), levels.reshape(groups, -1, c, kh, kw)
    y = np.zeros((len(a), groups, n // groups, oh, ow), np.int64)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * g.dilation[0], i * g.dilation[0] + (oh - 1) * g.stride[0] + 1, g.stride[0])
            columns = slice(j * g.dilation[1], j * g.dilation[1] + (ow - 1) * g.stride[1] + 1, g.stride[1])
            y += np.einsum("bgcyx,gnc->bgnyx", a[..., rows, columns], w[..., i, j], optimize=False)
    return y.reshape(len(a), n, oh, ow)


@cache
def _agrees(op: str, kind: str, isa: str) -> bool:
    """Does a row give what the scalar row gives, and the scalar row what the formula says? Bit for bit."""
    for shape in range(len(_SHAPES)):
        p = _problem(kind, shape)
        want = _formula(op, kind, p) if isa == "scalar" else _run(op, kind, p, "scalar")
        if not np.array_equal(_run(op, kind, p, isa), want):
            return False
    return True
