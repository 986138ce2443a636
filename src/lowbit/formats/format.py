"""Format: level set + blocks + scale rule. Enough to turn a float matrix into codes and back.

    uint4-g64            4-bit integers with an integer zero, groups of 64, fp16 scales, min-max
    int8-channel         symmetric 8-bit, one scale a row
    nf4-g64-fp32         NF4 with fp32 absmax
    fp4_e2m1-g32-e8m0-mx MXFP4 (also spelled "mxfp4")
    uint3-g64-zreal-search   real-valued zero, searched range
    kmeans3-channel      eight levels a row, found by weighted k-means

A format's string is its name in files and on the command line; `Format.parse(str(f)) == f`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.errors import FormatError, near_names
from lowbit.formats import scales
from lowbit.formats.blocks import Blocks
from lowbit.formats.levels import ROUNDINGS, LevelSet, levels
from lowbit.formats.stores import SCALE_DTYPES

ZEROS = ("none", "int", "real")
ALIASES = {
    "mxfp4": "fp4_e2m1-g32-e8m0-mx",
    "mxfp6_e2m3": "fp6_e2m3-g32-e8m0-mx",
    "mxfp6_e3m2": "fp6_e3m2-g32-e8m0-mx",
    "mxfp8_e4m3": "fp8_e4m3-g32-e8m0-mx",
    "mxfp8_e5m2": "fp8_e5m2-g32-e8m0-mx",
    "mxint8": "mxint8-g32-e8m0-mx",
}


class Grid(NamedTuple):
    """What `fit` found for each block: scale (blocks, 1), zero (blocks, 1) or None, table (blocks, L) or None (k-means)."""

    scale: Tensor
    zero: "Tensor | None" = None
    table: "Tensor | None" = None

    def __getitem__(self, at):  # type: ignore[override]
        """A sub-grid: the same selection of blocks from each member."""
        if isinstance(at, int):
            return tuple.__getitem__(self, at)
        return Grid(*(None if t is None else t[at] for t in tuple(self)))


@dataclass(frozen=True)
class Format:
    """levels x blocks x scale rule, how scales are stored, the kind of zero, and the rounding."""

    levels: LevelSet
    blocks: Blocks = Blocks(1, -1)
    scale_rule: str = ""
    scale_dtype: str = "fp16"
    zero: str = ""
    rounding: str = "even"

    def __post_init__(self) -> None:
        defaults = _defaults(self.levels)
        object.__setattr__(self, "zero", self.zero or defaults["zero"])
        object.__setattr__(self, "scale_rule", self.scale_rule or self._default_rule(defaults["rule"]))
        for value, known, what in (
            (self.scale_rule, (*scales.RULES, "kmeans"), "scale rule"),
            (self.scale_dtype, SCALE_DTYPES, "scale dtype"),
            (self.zero, ZEROS, "zero"),
            (self.rounding, ROUNDINGS, "rounding"),
        ):
            if value not in known:
                raise FormatError(f"unknown {what} {value!r}. {near_names(value, known)}")
        self._check_sense()

    def _default_rule(self, of_levels: str) -> str:
        return "minmax" if self.zero != "none" and of_levels in ("absmax", "mean") else of_levels

    def _check_sense(self) -> None:
        if self.levels.unsigned and self.zero == "none":
            raise FormatError(f"{self.levels.name} has no negative level and needs a zero: zint or zreal, or use int{self.levels.bits}.")
        if self.zero == "int" and not self.levels.is_integer_range:
            raise FormatError(f"{self.levels.name} levels are not consecutive integers: use zreal, or no zero.")
        if self.zero == "int" and self.levels.values[0] != 0:
            raise FormatError(f"{self.levels.name} with an integer zero is uint{self.levels.bits}: use that name.")
        if self.zero != "none" and self.scale_rule in ("absmax", "mean", "median", "mx"):
            raise FormatError(f"scale rule {self.scale_rule!r} finds no zero. Use minmax, search or lstsq, or no zero.")
        if (self.levels.values == ()) != (self.scale_rule == "kmeans"):
            raise FormatError("k-means levels and the scale rule 'kmeans' go together: kmeans1 .. kmeans8 need no rule named.")
        if self.levels.values == () and (self.blocks.cols != -1 or self.zero != "none"):
            raise FormatError("k-means tables are per row or per tensor, without a zero: use blocks channel or tensor.")

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Read a format string. Raises FormatError naming the word that is not understood.

        >>> str(Format.parse("uint4-g64"))
        'uint4-g64'
        """
        name, *words = ALIASES.get(text, text).split("-")
        options: dict[str, str] = {}
        blocks = Blocks(1, -1)
        for word in words:
            if word in SCALE_DTYPES:
                options["scale_dtype"] = word
            elif word in scales.RULES:
                options["scale_rule"] = word
            elif word in ROUNDINGS:
                options["rounding"] = word
            elif word.startswith("z") and word[1:] in ZEROS:
                options["zero"] = word[1:]
            else:
                blocks = _parse_blocks(word, text)
        return cls(levels(name), blocks, **options)

    def __str__(self) -> str:
        plain = Format(self.levels, self.blocks, zero=self.zero)
        words = [self.levels.name, str(self.blocks)]
        words += [self.scale_dtype] if self.scale_dtype != "fp16" else []
        words += [f"z{self.zero}"] if self.zero != _defaults(self.levels)["zero"] else []
        words += [self.scale_rule] if self.scale_rule != plain.scale_rule else []
        words += [self.rounding] if self.rounding != "even" else []
        return "-".join(words)

    def with_(self, **changes) -> "Format":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def overhead_words(self) -> str:
        """For a summary: what is stored beside the codes."""
        zero = {"none": "", "int": f" + {self.levels.bits}-bit zero", "real": " + fp16 zero"}[self.zero]
        return "table" if not self.levels.values else f"{self.scale_dtype} scale{zero}"


def fit(w: Tensor, fmt: Format, importance: "Tensor | None" = None) -> Grid:
    """Scale (and zero or table) of each block, by the format's rule.

    w: (blocks, n) float32, e.g. from `fmt.blocks.split`; importance: same shape, non-negative, or None.
    With scale_dtype "double" pass all blocks of the tensor at once: neighbouring scales share a step.
    """
    if fmt.scale_rule == "kmeans":
        from lowbit.formats.kmeans import kmeans_table

        table = kmeans_table(w, 2**fmt.levels.bits, importance)
        return Grid(torch.ones(w.shape[0], 1, device=w.device), None, table)
    if w.numel() == 0:
        return Grid(w.new_zeros(w.shape[0], 1), w.new_zeros(w.shape[0], 1) if fmt.zero != "none" else None)
    scale, zero = scales.RULES[fmt.scale_rule](w, fmt, importance)
    if fmt.scale_dtype == "double":
        from lowbit.formats.stores import load_scale, store_scale

        scale = load_scale(store_scale(scale, "double"), "double")
    return Grid(scale, zero)


def encode(w: Tensor, grid: Grid, fmt: Format, generator: "torch.Generator | None" = None) -> Tensor:
    """Nearest codes (uint8) of w (blocks, n) on a grid."""
    return scales.to_codes(w, grid.scale, grid.zero, fmt, generator, grid.table)


def decode(codes: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """(levels[code] - zero) * scale, float32, for codes (blocks, n)."""
    return scales.from_codes(codes, grid.scale, grid.zero, fmt, grid.table)


def _defaults(level_set: LevelSet) -> dict[str, str]:
    if not level_set.values:
        return {"zero": "none", "rule": "kmeans"}
    if level_set.unsigned:
        return {"zero": "int", "rule": "minmax"}
    return {"zero": "none", "rule": "mean" if level_set.name in ("binary", "ternary", "int1") else "absmax"}


def _parse_blocks(word: str, text: str) -> Blocks:
    try:
        return Blocks.parse(word)
    except FormatError as e:
        known = ["tensor", "channel", "g64", "tile16x64", *SCALE_DTYPES, *scales.RULES, *ROUNDINGS, "zint", "zreal", "znone"]
        raise FormatError(f"format {text!r}: word {word!r} is not understood. {near_names(word, known)}") from e
