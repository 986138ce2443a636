"""How scales are kept: fp32, fp16, bf16, E8M0 (a power of two in one byte), or themselves quantized ("double").

    round(scale)         the value the file will give back; codes are always chosen for this value
    store(scale)         the tensors written          load(tensors, shape) -> scale, float32

Double quantization: offset = mean(scale); 256 neighbouring scales (row-major) share absmax/127; codes are int8. With groups of 64 this
costs 8/64 + 32/16384 = 0.127 bits a weight. Sources: Dettmers 2023 (arXiv:2305.14314) for the idea (its codes are an 8-bit float, ours int8);
OCP MX v1.0 for E8M0 (byte e means 2**(e-127), 255 is NaN and never written, 0 stands for a scale of 0).
"""

import torch
from torch import Tensor

from lowbit.errors import FormatError

SCALE_DTYPES = ("fp32", "fp16", "bf16", "e8m0", "double")
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DOUBLE_BLOCK = 256


def round_scale(scale: Tensor, dtype: str) -> Tensor:
    """The float32 value that `dtype` stores for each scale; a positive scale never becomes 0 or infinite.

    Raises FormatError where fp16 cannot hold the scale.
    """
    if dtype == "double":  # needs all scales of the tensor at once: `store_scale` decides
        return scale.float()
    if dtype == "e8m0":
        return _e8m0_value(_e8m0_code(scale))
    kind = torch.finfo(_TORCH[dtype])
    if scale.numel() and float(scale.max()) > kind.max:
        raise FormatError(f"a scale of {float(scale.max()):.3g} does not fit {dtype}. Use scale_dtype bf16 or fp32.")
    smallest = torch.where(scale > 0, kind.tiny * kind.eps, 0.0)  # the smallest subnormal
    return torch.maximum(scale, smallest).to(_TORCH[dtype]).float()


def store_scale(scale: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors a scale matrix becomes: {"scale": ...}, and for "double" also "scale_step" and "scale_offset"."""
    if dtype == "e8m0":
        return {"scale": _e8m0_code(scale)}
    if dtype != "double":
        return {"scale": scale.to(_TORCH[dtype])}
    flat = scale.reshape(-1).float()
    offset = flat.mean().reshape(1) if flat.numel() else torch.zeros(1)
    blocks = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % _DOUBLE_BLOCK)).reshape(-1, _DOUBLE_BLOCK)
    step = blocks.abs().amax(1) / 127
    codes = (blocks / step.clamp(min=1e-30)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"scale": codes.reshape(-1)[: flat.numel()].reshape(scale.shape), "scale_step": step, "scale_offset": offset}


def load_scale(tensors: dict[str, Tensor], dtype: str) -> Tensor:
    """The scale matrix as float32, in the shape it was stored."""
    stored = tensors["scale"]
    if dtype == "e8m0":
        return _e8m0_value(stored)
    if dtype != "double":
        return stored.float()
    flat = stored.reshape(-1).float()
    step = tensors["scale_step"].repeat_interleave(_DOUBLE_BLOCK)[: flat.numel()]
    return (flat * step + tensors["scale_offset"]).clamp(min=0).reshape(stored.shape)


def scale_specs(shape: tuple[int, int], dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor, so that a reader can check them before it believes them."""
    if dtype in _TORCH:
        return {"scale": (shape, _TORCH[dtype])}
    if dtype == "e8m0":
        return {"scale": (shape, torch.uint8)}
    n_steps = -(-shape[0] * shape[1] // _DOUBLE_BLOCK)
    return {
        "scale": (shape, torch.int8),
        "scale_step": ((n_steps,), torch.float32),
        "scale_offset": ((1,), torch.float32),
    }


def _e8m0_code(scale: Tensor) -> Tensor:
    """Nearest power of two (in the logarithm, ties up); frexp, since log2 is wrong just below a power of two."""
    mantissa, exponent = torch.frexp(scale.float())  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    power = exponent - 1 + (mantissa >= 2**-0.5)
    return torch.where(scale > 0, (power + 127).clamp(1, 254), torch.zeros_like(power)).to(torch.uint8)


def _e8m0_value(code: Tensor) -> Tensor:
    value = torch.ldexp(torch.ones(code.shape, device=code.device), code.to(torch.int32) - 127)
    return torch.where(code > 0, value, torch.zeros_like(value))
