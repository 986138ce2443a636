"""2-D convolution of int8 images with weights of at most 8 bits: the packed weight, the bare call, the self-check.

    q = clip(round_to_even(x / scale), low, high)                            one scale for an image, |q| <= 127
    y = (q * levels) * scale * scale_w + bias (+ residual),  max(y, 0)       and, for a next layer, y on its own grid

Weights have one scale a row. Sums of products are exact integers in segments of 32 columns, (ky, kx, channel) in order;
all rows give the same floats bit for bit. Before its first use a row is compared with the scalar row, and that with the
formula. The functions here are bare: float32, on the CPU.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import KernelError
from lowbit.formats import Blocks, Format, Grid, QuantizedTensor, levels
from lowbit.runtime import kernels, ops
from lowbit.runtime.binary_kernels import Geometry, _dot, _need

OP = "conv_int8"
MAX_COLUMNS = 1 << 16  # of one sum


class IntGrid(NamedTuple):
    """The int8 levels of an input: x ~ q * scale, low <= q <= high. scale 0: 1/127 of an image's largest |x|."""

    scale: float = 0.0
    low: int = -127
    high: int = 127

    def fits(self) -> bool:
        return self.scale >= 0 and -127 <= self.low <= self.high <= 127


def fits(qt: QuantizedTensor) -> bool:
    """May the weight (N, C/groups, kh, kw) be convolved so? One table, one scale a row, no zero, no exceptions."""
    if len(qt.parts) > 1 or len(qt.shape) != 4 or not 0 < qt.matrix_shape[1] <= MAX_COLUMNS or not qt.shape[0]:
        return False
    fmt = qt.format
    return fmt.zero == "none" and bool(fmt.levels.values) and fmt.blocks.size(*qt.matrix_shape)[1] == qt.matrix_shape[1]


class ConvWeight(NamedTuple):
    """A weight as the kernels take it.

    packed: the kernel layout of each group, columns (ky, kx, channel); of a depthwise convolution instead taps
    (kh * kw, C) int8 and their scale (C,). size: N, C, groups, kh, kw
    """

    packed: list[Tensor]
    taps: "Tensor | None"
    scale: "Tensor | None"
    size: tuple[int, int, int, int, int]


def weight(qt: QuantizedTensor, groups: int = 1, gain: "Tensor | None" = None) -> ConvWeight:
    """gain: (N,) multiplies the weight's scale. Raises KernelError for a weight that does not fit."""
    _need(fits(qt) and qt.shape[0] % groups == 0, f"a weight {qt.shape} in {qt.format} has no int8 convolution")
    n, per, kh, kw = qt.shape
    scale = qt.grid().scale.reshape(-1).float()
    scale = scale.repeat_interleave(n // len(scale))
    scale = scale if gain is None else scale * gain.float()
    return ConvWeight(*_packed(qt, scale, groups), (n, per * groups, groups, kh, kw))


class Plan:
    """A convolution whose constant tensors have been checked. Raises KernelError where sizes contradict each other."""

    def __init__(
        self,
        w: ConvWeight,
        geometry: Geometry,
        bias: "Tensor | None" = None,
        grid: "IntGrid | None" = None,
        isa: "str | None" = None,
    ) -> None:
        _need(geometry.pad == 0, "outside the image lies 0")
        self.n, self.channels, groups, *kernel = w.size
        self.kernel, self.geometry, self.grid = (kernel[0], kernel[1]), geometry, grid or IntGrid()
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}  # of images seen -> of the output
        top, _, left, _ = geometry.padding
        numbers = (groups, self.channels, *self.kernel, *geometry.stride, top, left, *geometry.dilation)
        bias = None if bias is None else bias.detach().float().contiguous()
        self._plan = kernels._call(
            kernels._extension().ConvPlan, numbers, [t.numpy() for t in w.packed], w.taps, w.scale, bias,
            tuple(self.grid), isa or checked_isa(),
        )  # fmt: skip

    def run(
        self,
        x: Tensor,
        residual: "Tensor | None" = None,
        relu: bool = False,
        next_grid: "IntGrid | None" = None,
        want_y: bool = True,
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """(y (B, N, H', W') float32 in channels_last memory, q (B, H', W', N) int8 on the next grid).

        x: (B, C, H, W) floats, or int8 (B, H, W, C) on this layer's grid. y is None unless wanted, q unless next_grid
        is given. Raises KernelError, or ShapeError where the kernel does not fit the image.
        """
        if x.dtype is torch.float32:
            b, c, h, wide = x.shape
            batch_stride, strides_c, strides_h, strides_w = x.stride()
            if (h > 1 and wide > 1 and strides_h != wide * strides_w) or (strides_c == 0 and c > 1 and x.numel()):
                return self.run(x.contiguous(), residual, relu, next_grid, want_y)
            strides = (batch_stride, strides_w if wide > 1 else strides_h, max(strides_c, 1))
        else:
            b, h, wide, c = x.shape
            _need(
                x.dtype is torch.int8 and x.is_contiguous(), f"x is {x.dtype} {tuple(x.shape)}, no floats and no int8"
            )
            strides = (0, 0, 0)
        _need(c == self.channels and x.device.type == "cpu", f"x has {c} channels, needed {self.channels} on the CPU")
        if (size := self._sizes.get((h, wide))) is None:
            size = self._sizes[h, wide] = self.geometry.out_size(h, wide, self.kernel)
        oh, ow = size
        y = torch.empty((b, oh, ow, self.n), dtype=torch.float32, device="cpu") if want_y else None
        q = None if next_grid is None else torch.empty((b, oh, ow, self.n), dtype=torch.int8, device="cpu")
        if residual is not None:
            shape = (b, self.n, oh, ow)
            _need(tuple(residual.shape) == shape and residual.dtype is torch.float32,
                  f"residual is {residual.dtype} {tuple(residual.shape)}, y is float32 {shape}")  # fmt: skip
            residual = residual.permute(0, 2, 3, 1).contiguous()
        try:
            self._plan.run(
                x.data_ptr(), (b, h, wide, oh, ow), strides, 0 if residual is None else residual.data_ptr(), relu,
                0 if y is None else y.data_ptr(), 0 if q is None else q.data_ptr(), next_grid or self.grid,
                torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as e:
            raise KernelError(f"kernel refused its arguments: {e}") from e
        return None if y is None else y.permute(0, 3, 1, 2), q


class Conv:
    """A weight with the plan of the row that runs, made anew when LOWBIT_ISA changes."""

    def __init__(self, w: ConvWeight, geometry: Geometry) -> None:
        self.w, self.geometry = w, geometry
        self._force: str | None = None
        self._plan: Plan | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), any float dtype -> (B, N, H', W') in x's dtype; one int8 scale for an image."""
        plain = type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())
        if torch.compiler.is_compiling() or not plain:
            g = self.geometry
            numbers = [*self.w.size, *g.stride, *g.padding, *g.dilation]
            return torch.ops.lowbit.conv_int8(x, self.w.packed, self.w.taps, self.w.scale, numbers)
        if self._plan is None or self._force != kernels._forced():
            self._plan, self._force = Plan(self.w, self.geometry), kernels._forced()
        y, _ = self._plan.run(x.detach().float())
        assert y is not None
        return y.to(x.dtype)


def _conv_int8(
    x: Tensor, packed: list[Tensor], taps: "Tensor | None", scale: "Tensor | None", numbers: list[int]
) -> Tensor:
    w = ConvWeight(packed, taps, scale, (numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]))
    y, _ = Plan(w, _geometry(numbers)).run(x.float())
    assert y is not None
    return y.to(x.dtype)


def _geometry(n: list[int]) -> Geometry:
    return Geometry((n[5], n[6]), (n[7], n[8], n[9], n[10]), (n[11], n[12]))


def _fake(x: Tensor, packed: Any, taps: Any, scale: Any, numbers: list[int]) -> Tensor:
    oh, ow = _geometry(numbers).out_size(x.shape[2], x.shape[3], (numbers[3], numbers[4]))
    return x.new_empty(x.shape[0], oh, ow, numbers[0]).permute(0, 3, 1, 2)


_SCHEMA = "(Tensor x, Tensor[] packed, Tensor? taps, Tensor? scale, int[] numbers) -> Tensor"
torch.library.define("lowbit::conv_int8", _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("lowbit::conv_int8", "cpu", _conv_int8)
torch.library.register_fake("lowbit::conv_int8", _fake)
torch.library.register_autograd("lowbit::conv_int8", ops._no_backward)


def _packed(qt: QuantizedTensor, scale: Tensor, groups: int) -> tuple[list[Tensor], "Tensor | None", "Tensor | None"]:
    """The first three of `ConvWeight`."""
    n, per, kh, kw = qt.shape
    codes = qt.part_codes().reshape(n, per, kh * kw).transpose(1, 2).reshape(n, -1)
    bits, table = qt.format.levels.bits, qt.format.levels.table()[None].float()
    of = ops.int8_levels(table)
    if per == 1 and n == groups and not bool(of.base.any()):
        return [], of.levels[0][codes.long()].T.contiguous(), (scale * of.step[0]).contiguous()
    full = torch.cat([table, table[:, -1:].expand(-1, 2**bits - table.shape[1])], 1).contiguous()
    none, columns, rows = torch.empty(0, 0), codes.shape[1], n // groups
    packed = []
    for at in (slice(i, i + rows) for i in range(0, n, rows)):
        of_group = (kernels.pack_rows(codes[at], bits), full, scale[at, None].contiguous(), none, bits, columns)
        packed.append(ops.pack_int8(*of_group))
    return packed, None, None


# ---------------------------------------------------------------- the table and the self-check


def rows() -> list[dict[str, Any]]:
    """As `kernels.rows`, for this operation."""
    active, out = checked_row(), []
    for op, isa, supported in kernels._extension().conv_table():
        check = ("ok" if _agrees(isa) else "failed") if supported else "not supported"
        out.append({"op": op, "format": "table16", "isa": isa, "active": isa == active, "selfcheck": check})
    return out


def checked_row() -> str:
    """Name of the row that runs under LOWBIT_ISA."""
    kernels._pick(kernels._forced())  # refuses a name that is unknown
    return str(kernels._extension().conv_pick(kernels._forced()))


def checked_isa() -> str:
    """Name of the active row, checked at first use. Raises KernelError where it disagrees with the scalar row."""
    return _checked(kernels._forced())


@cache
def _checked(force: str) -> str:
    kernels._checked_isa(force)  # the products inside
    isa = checked_row()
    if not _agrees(isa):
        other = "Report it, please." if isa == "scalar" else "Set LOWBIT_ISA=scalar to go on without it."
        raise KernelError(f"kernel row {OP}/{isa} computes wrong results on this machine and is refused. {other}")
    return isa


# (batch, C, H, W, N, kh, kw, groups, stride, padding, dilation, levels, scale)
_SHAPES = (
    (2, 5, 6, 7, 19, 3, 2, 1, (1, 2), (1, 1, 1, 0), (1, 1), "int4", 0.0),
    (1, 12, 3, 9, 6, 2, 3, 2, (2, 1), (2, 1, 3, 2), (2, 1), "int3", 0.05),
    (1, 70, 5, 4, 70, 3, 3, 70, (1, 1), (1, 1, 1, 1), (1, 1), "ternary", 0.0),
    (1, 3, 9, 9, 4, 3, 3, 1, (1, 1), (1, 1, 1, 1), (1, 2), "nf4", 0.02),
)


class _Problem(NamedTuple):
    x: Tensor
    qt: QuantizedTensor
    geometry: Geometry
    groups: int
    grid: IntGrid
    bias: Tensor
    residual: Tensor


@cache
def _problem(shape: int) -> _Problem:
    b, c, h, w, n, kh, kw, groups, stride, padding, dilation, name, scale = _SHAPES[shape]
    random = np.random.default_rng(shape)
    fmt = Format(levels(name), Blocks(1, -1), scale_dtype="fp32")
    codes = random.integers(0, len(fmt.levels.values), (n, c // groups * kh * kw), dtype=np.uint8)
    by = torch.from_numpy(random.random((n, 1), dtype=np.float32))
    qt = QuantizedTensor.from_codes(torch.from_numpy(codes), Grid(by), fmt, (n, c // groups, kh, kw))
    geometry = Geometry(stride, padding, dilation)
    x, bias = (torch.from_numpy(random.standard_normal(s, dtype=np.float32)) for s in ((b, c, h, w), (n,)))
    oh, ow = geometry.out_size(h, w, (kh, kw))
    residual = torch.from_numpy(random.standard_normal((b, n, oh, ow), dtype=np.float32))
    return _Problem(x, qt, geometry, groups, IntGrid(scale), bias, residual)


_NEXT = IntGrid(0.11, 0, 15)


def _run(p: _Problem, isa: str) -> tuple[np.ndarray, np.ndarray]:
    plan = Plan(weight(p.qt, p.groups), p.geometry, p.bias, p.grid, isa)
    y, q = plan.run(p.x, p.residual, True, _NEXT)
    assert y is not None and q is not None
    return y.numpy(), q.numpy()


def _formula(p: _Problem) -> np.ndarray:
    """y, without the scalar row, sums in float64."""
    x = p.x.numpy()
    most = np.abs(x).reshape(len(x), -1).max(1) / np.float32(127)
    scale = np.full_like(most, p.grid.scale) if p.grid.scale else most
    q = np.clip(np.rint(x / scale[:, None, None, None]), p.grid.low, p.grid.high)
    table = ops.int8_levels(p.qt.format.levels.table()[None].float())
    whole = table.levels.numpy()[0][p.qt.part_codes().numpy()].reshape(p.qt.shape)
    step, base = float(table.step), float(table.base)
    w_hat = (whole * step + base) * p.qt.grid().scale.numpy().reshape(-1, 1, 1, 1).astype(np.float64)
    dot = _dot_float(q, w_hat, p.geometry, p.groups)
    y = dot * scale.reshape(-1, 1, 1, 1) + p.bias.numpy().reshape(-1, 1, 1) + p.residual.numpy()
    return np.maximum(y, 0)


def _dot_float(q: np.ndarray, w: np.ndarray, g: Geometry, groups: int) -> np.ndarray:
    """The convolution in float64: w in 2^40ths, as `_dot` takes integers."""
    return _dot(q.astype(np.int64), np.rint(w * 2.0**40).astype(np.int64), g, groups) / 2.0**40


@cache
def _agrees(isa: str) -> bool:
    """Does a row give what the scalar row gives, and the scalar row what the formula says?"""
    for shape in range(len(_SHAPES)):
        p = _problem(shape)
        y, q = _run(p, isa)
        if isa == "scalar":
            good = (np.abs(y - _formula(p)) <= 1e-5 * np.abs(y).max() + 1e-6).all()
            grid = np.clip(np.rint(y / np.float32(_NEXT.scale)), _NEXT.low, _NEXT.high)
            if not good or not np.array_equal(np.moveaxis(grid, 1, -1), q):
                return False
        elif not all(np.array_equal(a, b) for a, b in zip((y, q), _run(p, "scalar"))):
            return False
    return True
