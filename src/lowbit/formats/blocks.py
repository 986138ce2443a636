"""Blocks: which weights of a matrix share one scale.

    tensor (-1,-1)    channel (1,-1)    group (1,g)    tile (r,c)            -1 means "all": "tile4xall"

A weight of more than two dimensions is seen as (out, everything else): a convolution's groups run along in * kh * kw.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import FormatError, ShapeError


@dataclass(frozen=True)
class Blocks:
    """`rows` x `cols` weights share a scale; -1 stands for the whole side."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if any(v != -1 and v < 1 for v in (self.rows, self.cols)):
            raise FormatError(f"Blocks({self.rows}, {self.cols}): each side is a positive count, or -1 for all of it.")

    @classmethod
    def parse(cls, text: str) -> "Blocks":
        """Read "tensor", "channel", "g64" or "tile16x64"."""
        if text in ("tensor", "channel"):
            return cls(-1 if text == "tensor" else 1, -1)
        if m := re.fullmatch(r"g([0-9]{1,18})", text):
            return cls(1, int(m[1]))
        if m := re.fullmatch(r"tile([0-9]{1,18}|all)x([0-9]{1,18}|all)", text):
            rows, cols = (-1 if side == "all" else int(side) for side in m.groups())
            return cls(rows, cols)
        raise FormatError(f'unknown blocks {text!r}. Use "tensor", "channel", "g64" (groups of 64) or "tile16x64".')

    def __str__(self) -> str:
        if self.cols == -1 and self.rows in (-1, 1):
            return "tensor" if self.rows == -1 else "channel"
        if self.rows == 1:
            return f"g{self.cols}"
        return "tile{}x{}".format(*("all" if side == -1 else side for side in (self.rows, self.cols)))

    def size(self, out: int, in_: int) -> tuple[int, int]:
        """Rows and columns of one block for a matrix (out, in_). Raises ShapeError where they do not divide."""
        r, c = (out if self.rows == -1 else self.rows), (in_ if self.cols == -1 else self.cols)
        if c > 0 and in_ % c:
            fits = [g for g in (256, 128, 64, 32, 16) if in_ % g == 0]
            fix = f"--group {fits[0]}" if fits else "--group -1 (one group per row)"
            raise ShapeError(
                f"in_features={in_} is not a multiple of group={c}. Try {fix}, "
                "or leave the layer as it is (`layers` in a recipe, `skip` in prepare)."
            )
        if r > 0 and out % r:
            raise ShapeError(f"out_features={out} is not a multiple of the tile's {r} rows: use rows that divide it.")
        return r, c

    def grid(self, out: int, in_: int) -> tuple[int, int]:
        """How many blocks down and across: the shape of the scales."""
        r, c = self.size(out, in_)
        return (out // r if r else 0), (in_ // c if c else 0)

    def split(self, w: Tensor) -> Tensor:
        """(out, in) -> (blocks, rows*cols), blocks in row-major order of the scales. An empty matrix has no blocks."""
        out, in_ = w.shape
        r, c = self.size(out, in_)
        if w.numel() == 0:
            return w.reshape(0, max(r * c, 1))
        return w.reshape(out // r, r, in_ // c, c).transpose(1, 2).reshape(-1, r * c)

    def merge(self, blocks: Tensor, out: int, in_: int) -> Tensor:
        """The inverse of `split`."""
        r, c = self.size(out, in_)
        if blocks.numel() == 0:
            return blocks.reshape(out, in_)
        return blocks.reshape(out // r, in_ // c, r, c).transpose(1, 2).reshape(out, in_)
