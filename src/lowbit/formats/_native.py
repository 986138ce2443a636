"""The compiled extension, where it is there and fits: the inner loop of searched scales (csrc/search.cpp)."""

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowbit.formats.format import Format

NONE = torch.empty(0, 0, dtype=torch.float32)


def knows(w: Tensor, fmt: "Format") -> bool:
    """Whether the extension can search this tensor's scales."""
    plain = w.device.type == "cpu" and w.dtype == torch.float32 and fmt.levels.is_integer_range
    return plain and not torch.compiler.is_compiling() and extension() is not None


def scale_errors(
    w: Tensor,
    importance: "Tensor | None",
    scale: Tensor,
    zero: "Tensor | None",
    bottom: float,
    top: float,
    real_zero: bool,
    norm: float,
) -> Tensor:
    """(candidates, blocks, 1): sum importance |w_hat - w|**norm of each candidate scale (candidates, blocks, 1)."""
    error = torch.empty_like(scale[..., 0])
    flat = (NONE if t is None else t.reshape(len(t), -1).float() for t in (w, importance, scale, zero))
    arrays = [t.detach().contiguous().numpy() for t in flat]
    isa = os.environ.get("LOWBIT_ISA", "").strip()
    threads = torch.get_num_threads()
    extension().scale_errors(*arrays, bottom, top, real_zero, norm, error.numpy(), threads, isa)
    return error[..., None]


@cache
def extension() -> Any:
    try:
        from lowbit import _kernels  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _kernels
