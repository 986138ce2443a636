"""How scales are kept: fp32, fp16, bf16, E8M0 (a power of two in one byte), or themselves quantized ("double", and
"q3x16", which also keeps real zeros so, and which only a solver that knows the matrix's rows can fill: SpQR).

    round_scale(scale)     the value the file will give back; codes are always chosen for this value
    store_scale(scale)     the tensors written             load_scale(tensors) -> scale, float32

Storing is idempotent: what was loaded is stored as the same bytes.

E8M0: byte e means 2**(e - 127), 0 .. 254; there is no zero, so a scale of 0 becomes 2**-127 (a float32 subnormal),
and 255 (NaN) is never written. Source: OCP MX v1.0.

Double: 256 neighbouring scales (row-major) share step = max / 255; codes are uint8, scale = code * step, and a
positive scale keeps a code of at least 1. With groups of 64 this costs 8/64 + 32/16384 = 0.127 bits a weight. Source:
Dettmers 2023 (arXiv:2305.14314) for the idea; there the codes are an 8-bit float around the mean. Scales are
positive, so unsigned codes need no offset: a zero scale stays zero, and with the step held to 16 significant bits
every product and quotient below is exact, which makes storing idempotent.
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.packing import pack_bits, packed_bytes, unpack_bits

SCALE_DTYPES = ("fp32", "fp16", "bf16", "e8m0", "double")  # those that any rule can be stored in
BILEVEL = "q3x16"
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DOUBLE_BLOCK = 256
_ROWS, _BITS = 16, 3  # of "q3x16"
_E8M0_VALUES = [2.0 ** (code - 127) for code in range(255)] + [float("nan")]


def round_scale(scale: Tensor, dtype: str, up: bool = False) -> Tensor:
    """The float32 value that `dtype` stores for each scale; a positive scale never becomes 0 or infinite.

    up: for E8M0 the next power of two, so that nothing clips; otherwise the nearest in the logarithm.
    "double" is left as it is: it needs all scales of the tensor at once, which `double_scale` gets.
    Raises FormatError where `dtype` cannot hold a scale so large.
    """
    if dtype == "double":
        return scale.float()
    if dtype == "e8m0":
        return _e8m0_value(_e8m0_code(scale, up))
    kind = torch.finfo(_TORCH[dtype])
    if not torch.compiler.is_compiling() and scale.numel() and float(scale.max()) > kind.max:
        raise FormatError(f"a scale of {float(scale.max()):.3g} does not fit {dtype}. Use scale_dtype bf16 or fp32.")
    smallest = torch.where(scale > 0, kind.tiny * kind.eps, 0.0)  # the smallest subnormal
    return torch.maximum(scale, smallest).to(_TORCH[dtype]).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32, exponents clamped to E8M0's -127 .. 127."""
    return _e8m0_value((exponent + 127).clamp(0, 254))


def double_scale(scale: Tensor) -> Tensor:
    """The float32 values that "double" stores for all scales of one tensor, in row-major order."""
    return load_scale(store_scale(scale, "double"), "double")


def store_scale(scale: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors a scale matrix becomes: {"scale": ...}, and for "double" also "scale_step"."""
    if dtype == "e8m0":
        return {"scale": _e8m0_code(scale)}
    if dtype != "double":
        return {"scale": scale.to(_TORCH[dtype])}
    flat = scale.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _DOUBLE_BLOCK)).reshape(-1, _DOUBLE_BLOCK)
    step = _sixteen_bits(blocks.amax(1) / 255) if flat.numel() else flat
    codes = (blocks / torch.where(step > 0, step, torch.ones_like(step))[:, None]).round().clamp(max=255)
    codes = torch.maximum(codes, (blocks > 0).float()).to(torch.uint8)
    return {"scale": codes.reshape(-1)[: flat.numel()].reshape(scale.shape), "scale_step": step}


def load_scale(tensors: dict[str, Tensor], dtype: str) -> Tensor:
    """The scale matrix as float32, in the shape it was stored."""
    stored = tensors["scale"]
    if dtype == "e8m0":
        return _e8m0_value(stored)
    if dtype != "double":
        return stored.float()
    step = tensors["scale_step"].repeat_interleave(_DOUBLE_BLOCK)[: stored.numel()]
    return stored.float() * step.reshape(stored.shape)


def scale_specs(shape: tuple[int, int], dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor, so that a reader can check them before it believes them."""
    if dtype in _TORCH:
        return {"scale": (shape, _TORCH[dtype])}
    if dtype == "e8m0":
        return {"scale": (shape, torch.uint8)}
    n_steps = -(-shape[0] * shape[1] // _DOUBLE_BLOCK)
    return {"scale": (shape, torch.uint8), "scale_step": ((n_steps,), torch.float32)}


def store_bilevel(x: Tensor, name: str) -> dict[str, Tensor]:
    """ "q3x16": a matrix (rows, groups) in 3-bit codes between the least and the largest of each 16 rows of a column.

    x = offset + code * step, offset and step fp16. Source: Dettmers 2023 (SpQR, arXiv:2306.03078).
    """
    codes, step, offset = _bilevel(x)
    codes = codes.reshape(-1, x.shape[1])[: len(x)]
    return {name: pack_bits(codes, _BITS), f"{name}_step": step[:, 0], f"{name}_offset": offset[:, 0]}


def load_bilevel(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The matrix as float32."""
    codes = unpack_bits(tensors[name], _BITS, shape[0] * shape[1]).reshape(shape).float()
    step, offset = (tensors[f"{name}_{k}"].float().repeat_interleave(_ROWS, 0)[: shape[0]] for k in ("step", "offset"))
    return offset + codes * step


def bilevel_specs(shape: tuple[int, int], name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what `store_bilevel` gives."""
    blocks = (-(-shape[0] // _ROWS), shape[1])
    codes = ((packed_bytes(shape[0] * shape[1], _BITS),), torch.uint8)
    return {name: codes, f"{name}_step": (blocks, torch.float16), f"{name}_offset": (blocks, torch.float16)}


def bilevel_values(x: Tensor) -> Tensor:
    """What "q3x16" gives back for a matrix (rows, groups), or one column of it."""
    codes, step, offset = _bilevel(x)
    return (offset.float() + codes.float() * step.float()).reshape(-1, x.shape[1])[: len(x)]


def _bilevel(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes (blocks, 16, groups) uint8; step and offset (blocks, 1, groups) fp16. A last block repeats the last row."""
    padded = torch.cat([x, x[-1:].expand(-len(x) % _ROWS, -1)]).reshape(-1, _ROWS, x.shape[1])
    low, high = padded.amin(1, keepdim=True), padded.amax(1, keepdim=True)
    if x.numel() and float(torch.maximum(-low, high).max()) > torch.finfo(torch.float16).max:
        raise FormatError("a scale or zero does not fit fp16, in which q3x16 keeps their range: use fp32 scales.")
    offset = low.half()
    step = ((high - offset.float()) / (2**_BITS - 1)).clamp(min=0).half()
    divisor = torch.where(step > 0, step.float(), 1.0)
    codes = ((padded - offset.float()) / divisor).round().clamp(0, 2**_BITS - 1)
    return codes.to(torch.uint8), step, offset


def _sixteen_bits(x: Tensor) -> Tensor:
    """x >= 0 with its significand rounded up to 16 bits: no code exceeds 255. At least 2**-100, but 0 stays."""
    bits = torch.where(x > 0, x.clamp(min=2.0**-100), x).contiguous().view(torch.int32)
    return ((bits + 0xFF) & ~0xFF).view(torch.float32)


def _e8m0_code(scale: Tensor, up: bool = False) -> Tensor:
    """Nearest power of two (in the logarithm) or the next one; frexp, as log2 errs just below a power of two."""
    mantissa, exponent = torch.frexp(scale.float())  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    power = exponent - 1 + (mantissa > 0.5 if up else mantissa >= 2**-0.5)
    return torch.where(scale > 0, (power + 127).clamp(0, 254), torch.zeros_like(power)).to(torch.uint8)


def _e8m0_value(code: Tensor) -> Tensor:
    return torch.tensor(_E8M0_VALUES, dtype=torch.float32, device=code.device)[code.long()]
