"""Quantize: the weight function that rounds to a format in the forward pass and lets the gradient through.

    w_hat = decode(encode(w))  on the grid fitted to the present w, in every forward pass
    dL/dw = dL/dw_hat * T'(w / scale)

The float weight stays the trained parameter (`module.parametrizations.weight.original`); the model computes with w_hat.
`quantized()` gives the codes of this very w_hat, so packing changes no value.
"""

import torch
from torch import Tensor, nn

from lowbit.errors import FormatError
from lowbit.estimators import Estimator, through
from lowbit.estimators import estimator as find_estimator
from lowbit.formats import Format, Grid, QuantizedTensor, decode, encode, fit
from lowbit.formats.tensor import matrix_shape


class Quantize(nn.Module):
    """Parametrization for `torch.nn.utils.parametrize.register_parametrization(layer, "weight", Quantize("ternary"))`.

    fmt:       a format or its string; blocks are those of the weight seen as (out, everything else)
    estimator: its name, or an Estimator
    """

    def __init__(self, fmt: Format | str, estimator: str | Estimator = "identity"):
        super().__init__()
        self.format = fmt if isinstance(fmt, Format) else Format.parse(fmt)
        self.estimator = find_estimator(estimator)
        if self.format.rounding == "stochastic":
            raise FormatError(
                f"{self.format}: stochastic rounding gives another weight on every call. Use ties to even."
            )

    def forward(self, w: Tensor) -> Tensor:
        """w (out, ...) -> w_hat of the same shape and dtype. The grid is a constant in the backward pass."""
        with torch.no_grad():
            w_hat, slope = self._project(w.detach())
        return through(w, w_hat, slope)

    def quantized(self, w: Tensor) -> QuantizedTensor:
        """Codes and scales of w: `quantized(w).dequantize()` equals `forward(w)` bit for bit."""
        matrix = self._matrix(w.detach())
        blocks, grid = self._grid(matrix)
        codes = self.format.blocks.merge(encode(blocks, grid, self.format), *matrix.shape)
        return QuantizedTensor.from_codes(codes, grid, self.format, tuple(w.shape))

    def _matrix(self, w: Tensor) -> Tensor:
        return w.float().reshape(matrix_shape(tuple(w.shape)))

    def _grid(self, matrix: Tensor) -> tuple[Tensor, Grid]:
        """Blocks of the matrix and their grid, in the precision a file keeps (scales come so from `fit`)."""
        blocks = self.format.blocks.split(matrix)
        grid = fit(blocks, self.format)
        scale, zero, table = grid.scale, grid.zero, grid.table
        zero = zero.half().float() if zero is not None and self.format.zero == "real" else zero
        return blocks, Grid(scale, zero, None if table is None else table.half().float())

    def _project(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        matrix, fmt = self._matrix(w), self.format
        blocks, grid = self._grid(matrix)
        if fmt.scale_dtype == "double":  # its scales move once more when they are stored
            w_hat = self.quantized(w).dequantize()
        else:
            w_hat = fmt.blocks.merge(decode(encode(blocks, grid, fmt), grid, fmt), *matrix.shape).reshape(w.shape)
        if self.estimator.name == "identity":
            return w_hat, None
        slope = self.estimator.slope(blocks / grid.scale.clamp(min=torch.finfo(torch.float32).tiny))
        return w_hat, fmt.blocks.merge(slope, *matrix.shape).reshape(w.shape).to(w.dtype)

    def extra_repr(self) -> str:
        return f"{str(self.format)!r}, estimator={self.estimator.name!r}"
