"""Embeddings and output heads: 8-bit groups, a few thousand rows at a time so that no second float copy is needed."""

import torch
from torch import Tensor

from lowbit.formats import Format, QuantizedTensor, quantize
from lowbit.pipeline.memory import EMBEDDING_ROWS


def quantize_rows(w: Tensor, fmt: Format, rows: int = EMBEDDING_ROWS, keep: bool = False) -> QuantizedTensor:
    """`quantize` of w (out, in) in slices of rows; equal to the whole.

    keep=True also overwrites w by its dequantized values.
    Formats whose scale is shared over more than a row, or whose slices do not end on bytes, are quantized at once.
    """
    out = w.shape[0]
    if fmt.blocks.rows != 1 or fmt.scale_dtype == "double" or rows % 40:
        return _kept(w, quantize(w, fmt), keep)
    parts = []
    for i in range(0, out, rows):
        part = quantize(w[i : i + rows], fmt)
        parts.append(_kept(w[i : i + rows], part, keep).tensors())
    joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return QuantizedTensor.from_tensors({"shape": list(w.shape), "parts": [{"format": str(fmt)}]}, joined)


def _kept(w: Tensor, q: QuantizedTensor, keep: bool) -> QuantizedTensor:
    if keep:
        w.copy_(q.dequantize())
    return q
