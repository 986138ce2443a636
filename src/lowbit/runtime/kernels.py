"""The kernel table as Python sees it: which row runs, whether it agrees with the scalar row, and the bare calls.

    LOWBIT_ISA=scalar lowbit doctor        forces a row; unset, the best row this CPU can run is used

At first use every row that will run is compared with the scalar row on small problems (1 to 8 bits, odd shapes, ragged
groups, shared and per-row tables). Integers and decoded weights must be equal, float sums within
|y - y_scalar| <= (K/8 + 12) 2**-24 sum |x w_hat|. The scalar row is compared with the formula written out in torch.
A row that disagrees is refused, never replaced in silence.

The functions here are bare: float32, contiguous, on the CPU, two-dimensional. `ops` wraps them for any dtype and shape.
"""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import KernelError
from lowbit.formats import pack_bits
from lowbit.runtime.arena import empty_bytes

OPS = ("decode", "embedding", "linear_float", "quantize", "linear_int8")
FAMILIES = {"table16": (1, 2, 3, 4), "table256": (5, 6, 7, 8)}  # format family -> bits per code
ISAS = ("avx512", "avx2", "dotprod", "neon", "scalar")  # best first; dotprod: 64-bit ARM with SDOT
ABI = 2  # of the extension, as csrc/binding.cpp has it: raised whenever a signature or a layout changes
_TABLE_OF = {"embedding": "decode"}  # an embedding decodes the rows it is asked for


def rows() -> list[dict[str, Any]]:
    """Every kernel row: op, format family, isa, active (it is what runs), selfcheck ("ok", "failed", "not supported").

    Raises KernelError where the extension is missing or LOWBIT_ISA names no row of this CPU.
    """
    force, out = _pick(_forced()), []
    for op in OPS:
        active = _row_of(op, force)
        for name, isa, supported in _extension().table():
            if name == _TABLE_OF.get(op, op):
                for family in FAMILIES:
                    check = ("ok" if _agrees(op, family, isa) else "failed") if supported else "not supported"
                    out.append({"op": op, "format": family, "isa": isa, "active": isa == active, "selfcheck": check})
    from lowbit.runtime import binary_kernels, conv_kernels, sparse  # which are built on this file

    return out + sparse.rows() + binary_kernels.rows() + conv_kernels.rows()


def active_isa() -> str:
    """Name of the best rows that run, one of `ISAS`, checked at first use.

    An operation without a row of that name runs its next one.

    Raises KernelError as `rows`, and where a row fails its check.
    """
    return _checked_isa(_forced())


def linear_float(
    x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor, bits: int, isa: "str | None" = None
) -> Tensor:
    """y (M, N) = x (M, K) @ w_hat.T, w_hat = (table[code] - zero) * scale decoded a few rows at a time.

    codes: (N, ceil(K*bits/8)) uint8, each row a little-endian bit stream; table: (1 or N, 2**bits) float32;
    scale: (N, G) float32, G divides K; zero: (N, G) float32, or (0, 0) for none. isa: a row by name, else the active.
    Raises KernelError where the sizes contradict each other.
    """
    y = _new(x.shape[0], codes.shape[0])
    _call(_extension().linear_float, x, codes, table, scale, zero, bits, y, _threads(), isa or active_isa())
    return y


def linear_int8(
    x: Tensor, packed: Tensor, out_features: int, bias: "Tensor | None" = None, isa: "str | None" = None
) -> Tensor:
    """y (M, N) = x (M, K) @ w_hat.T + bias with x rounded to int8 per token and segment; packed: from `pack_int8`.

    A segment is 32 columns of a weight group (and its ragged tail), or 16 in small groups. bias: (N,) float32.
    Integer sums are exact; every row gives the scalar row's floats bit for bit.
    Raises KernelError where the sizes contradict each other.
    """
    y = _new(x.shape[0], out_features)
    _call(_extension().linear_int8, x, packed, bias, y, _threads(), isa or active_isa())
    return y


def pack_int8(
    codes: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, step: Tensor, bits: int, columns: int
) -> Tensor:
    """The kernel layout of (levels[code] - zero) * scale * step for `linear_int8`: 1-D uint8, native byte order.

    codes, scale, zero, bits as in `linear_float`; levels: (1 or N, 2**bits) int8; step: (1 or N,) float32.
    Codes keep their 1 to 4 bits; those of 5 to 8 bits, or with levels per row, become bytes. Scales and zeros are kept
    as float16 where that is exact.
    """
    args = (codes, levels, scale, zero, step, bits, columns)
    packed = empty_bytes(_call(_extension().packed_bytes, *args))
    _call(_extension().pack, *args, packed)
    return packed


def decode(
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    columns: int,
    rows: "Tensor | None" = None,
    isa: "str | None" = None,
) -> Tensor:
    """w_hat (N, columns), or its rows (int64, any order, repeats allowed). Raises IndexError on an unknown row."""
    out = _new(codes.shape[0] if rows is None else rows.shape[0], columns)
    _call(_extension().decode, codes, table, scale, zero, bits, rows, out, _threads(), isa or active_isa())
    return out


class Quantized(NamedTuple):
    """q (M, padded * length) int8, zeros in the padding; scale and sum of q (M, padded), float32 and int32.

    padded: the number of segments, made even.
    """

    q: Tensor
    scale: Tensor
    sum: Tensor


def quantize(x: Tensor, groups: int, isa: "str | None" = None) -> Quantized:
    """The activations `linear_int8` multiplies: q = round_to_even(x * 127/absmax) per token and segment, never -128."""
    _, length, padded, _ = _call(_extension().segments, groups, max(x.shape[1] // groups, 1))
    out = Quantized(
        _new(x.shape[0], padded * length, torch.int8),
        _new(x.shape[0], padded),
        _new(x.shape[0], padded, torch.int32),
    )
    _call(_extension().quantize, x, groups, *out, isa or active_isa())
    return out


def int8_peak(steps: int) -> int:
    """Multiply-adds done by `steps` turns of the widest int8 instructions on each of torch's threads; time it."""
    return int(_call(_extension().int8_peak, steps, _threads(), _forced()))


def isa_of(op: str) -> str:
    """Name of the row that runs one operation."""
    return str(_call(_extension().pick, _TABLE_OF.get(op, op), _forced()))


# ---------------------------------------------------------------- picking a row


@cache
def _extension() -> ModuleType:
    try:
        from lowbit import _kernels  # type: ignore[attr-defined]
    except ImportError as e:
        raise KernelError(
            f"the compiled kernels cannot be loaded ({e}). Reinstall lowbit: pip install --force-reinstall lowbit"
        ) from e
    if (found := getattr(_kernels, "ABI", 1)) != ABI:
        raise KernelError(
            f"the compiled kernels are of another version than the Python files (interface {found}, needed {ABI}). "
            "Rebuild them: make build in a checkout, else pip install --force-reinstall lowbit"
        )
    return _kernels


def _new(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")  # whatever the default dtype and device are


def _forced() -> str:
    return os.environ.get("LOWBIT_ISA", "").strip()


def _threads() -> int:
    return torch.get_num_threads()


def _call(fn: Callable, *args: Any) -> Any:
    try:  # as numpy arrays, which cost the extension a tenth of what tensors cost
        return fn(*(a.numpy() if isinstance(a, Tensor) else a for a in args))
    except ValueError as e:
        raise KernelError(f"kernel refused its arguments: {e}") from e
    except TypeError as e:  # a dtype, a rank, a stride: the extension converts nothing
        raise KernelError(f"kernel arguments must be contiguous CPU tensors of the documented types: {e}") from e


@cache
def _pick(force: str) -> str:
    """The best instruction set that any operation uses under LOWBIT_ISA=force."""
    try:
        picked = {_row_of(op, force) for op in OPS}
    except ValueError as e:
        raise KernelError(str(e)) from e
    return min(picked, key=ISAS.index)


def _row_of(op: str, force: str) -> str:
    return _extension().pick(_TABLE_OF.get(op, op), force)


@cache
def _checked_isa(force: str) -> str:
    isa = _pick(force)
    for op in OPS:
        row = _row_of(op, isa)
        for family in FAMILIES:
            if not _agrees(op, family, row):
                other = "Report it, please." if row == "scalar" else "Set LOWBIT_ISA=scalar to go on without it."
                raise KernelError(
                    f"kernel row {op}/{family}/{row} computes wrong results on this machine and is refused. {other}"
                )
    return isa


# ---------------------------------------------------------------- the self-check


# In numpy: torch's default dtype, device, modes and thread pool do not reach it.
class _Problem(NamedTuple):
    x: Tensor
    codes: Tensor
    table: Tensor
    levels: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    weight: np.ndarray  # w_hat by the formula, float32 (N, K)


# (M, N, K, G, per-row table, zero): single elements, ragged groups, more rows than a tile, a long group in
# segments, one and many tokens through several blocks of rows
_SHAPES = (
    (1, 1, 1, 1, False, False),
    (3, 5, 66, 3, True, True),
    (5, 27, 128, 2, False, True),
    (2, 9, 300, 1, True, False),
    (1, 70, 96, 3, False, True),
    (13, 37, 64, 2, False, False),
    (13, 27, 64, 1, False, False),
)


@cache
def _problem(bits: int, seed: int) -> _Problem:
    m, n, k, groups, per_row, has_zero = _SHAPES[seed]
    random = np.random.default_rng(seed)
    raw = random.integers(0, 2**bits, (n, k), dtype=np.uint8)
    levels = random.integers(-128, 128, (n if per_row else 1, 2**bits), dtype=np.int8)
    if n == 27:  # consecutive integers, the common case, have their own paths
        levels = np.arange(2**bits)[None].astype(np.int8) - np.int8(2 ** (bits - 1) - 1) - np.int8(1)
    scale, zero, x = (random.standard_normal(s, dtype=np.float32) for s in ((n, groups), (n, groups), (m, k)))
    x[0] = np.sign(x[0]) * 3  # every quantized activation at its extreme
    level = np.take_along_axis(np.broadcast_to(levels.astype(np.float32), (n, 2**bits)), raw.astype(np.int64), 1)
    level = level.reshape(n, groups, -1) - zero[..., None] * has_zero
    weight = (level * scale[..., None]).reshape(n, k)
    table, zero = levels.astype(np.float32), zero if has_zero else zero[:0, :0]
    x_, table_, levels_, scale_, zero_ = (torch.from_numpy(a) for a in (x, table, levels, scale, zero))
    return _Problem(x_, pack_rows(torch.from_numpy(raw), bits), table_, levels_, scale_, zero_, bits, weight)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(N, K) codes -> (N, ceil(K*bits/8)) uint8: the canonical bit stream, each row starting on a byte."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % 8))  # 8 codes fill whole bytes
    row_bytes = -(-k * bits // 8)
    return pack_bits(padded, bits).reshape(n, padded.shape[1] * bits // 8)[:, :row_bytes].contiguous()


def _run(op: str, p: _Problem, isa: str) -> np.ndarray:
    if op == "linear_float":
        return linear_float(p.x, p.codes, p.table, p.scale, p.zero, p.bits, isa).numpy()
    if op == "linear_int8":
        step = torch.from_numpy(np.ones(len(p.levels), np.float32))
        packed = pack_int8(p.codes, p.levels, p.scale, p.zero, step, p.bits, p.x.shape[1])
        return linear_int8(p.x, packed, len(p.codes), None, isa).numpy()
    if op == "quantize":
        return np.concatenate([t.numpy() for t in quantize(p.x, p.scale.shape[1], isa)], 1, dtype=np.float32)
    rows = torch.from_numpy(np.arange(len(p.codes))[::-1].copy()) if op == "embedding" else None
    return decode(p.codes, p.table, p.scale, p.zero, p.bits, p.x.shape[1], rows, isa).numpy()


def _formula(op: str, p: _Problem) -> np.ndarray:
    """What the scalar row must give, without it (sums in float64)."""
    if op in ("decode", "embedding"):
        return p.weight[::-1] if op == "embedding" else p.weight
    if op == "linear_float":
        return p.x.numpy().astype(np.float64) @ p.weight.astype(np.float64).T
    (m, k), groups = p.x.shape, p.scale.shape[1]
    count, length, padded, per_group = _extension().segments(groups, k // groups)
    x = np.zeros((m, groups, per_group * length), np.float32)
    x[..., : k // groups] = p.x.numpy().reshape(m, groups, -1)
    x = np.pad(x.reshape(m, count, length), ((0, 0), (0, padded - count), (0, 0)))
    most = np.abs(x).max(-1)
    q = np.rint(x * (np.float32(127) / np.maximum(most, np.float32(1e-30)))[..., None])
    if op == "quantize":
        return np.concatenate([q.reshape(m, -1), most / np.float32(127), q.sum(-1)], 1)
    x_hat = (q * (most / np.float32(127)).astype(np.float64)[..., None])[:, :count].reshape(m, groups, -1)
    return x_hat[..., : k // groups].reshape(m, k) @ p.weight.astype(np.float64).T


def _bound(op: str, p: _Problem, isa: str) -> "np.ndarray | float":
    """The largest difference that is allowed, per output."""
    if op in ("decode", "embedding", "quantize") or (op == "linear_int8" and isa != "scalar"):
        return 0.0
    size = np.abs(p.x.numpy()) @ np.abs(p.weight).T
    if op == "linear_int8":  # float32 steps over large integers, where the zero's term may cancel
        return 1e-5 * size.max() + 1e-5
    return (p.x.shape[1] / 8 + 12) * 2**-24 * size + 1e-30


@cache
def _agrees(op: str, family: str, isa: str) -> bool:
    """Does a row give what the scalar row gives, and the scalar row what the formula says?"""
    for bits in FAMILIES[family]:
        for seed in range(len(_SHAPES)):
            p = _problem(bits, seed)
            want = _formula(op, p) if isa == "scalar" else _run(op, p, "scalar")
            if not (np.abs(_run(op, p, isa) - want) <= _bound(op, p, isa)).all():
                return False
    return True
