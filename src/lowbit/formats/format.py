"""Format: level set + blocks + scale rule. Enough to turn a float matrix into codes and back.

    uint4-g64            4-bit integers with an integer zero, groups of 64, fp16 scales, min-max
    int8-channel         symmetric 8-bit, one scale a row
    nf4-g64-fp32         NF4 with fp32 absmax
    fp4_e2m1-g32-e8m0-mx MXFP4 (also spelled "mxfp4")
    uint3-g64-zreal-search   real-valued zero, searched range
    kmeans3-channel      eight levels a row, found by weighted k-means
    kmeans2-g64-shared   four levels for the whole tensor, an fp16 scale for every group of 64
    kmeans2-g64-dual     levels a1 + a2, a1, 0, a2 of two numbers a group: two binary planes (DB-LLM)

A format's string is its name in files and on the command line; `Format.parse(str(f)) == f`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import FormatError, near_names
from lowbit.formats import scales
from lowbit.formats.blocks import Blocks
from lowbit.formats.kmeans import dual_scales, kmeans_table, shared_table
from lowbit.formats.levels import ROUNDINGS, LevelSet, levels
from lowbit.formats.stores import BILEVEL, SCALE_DTYPES, double_scale

ZEROS = ("none", "int", "real")
TABLE_RULES = ("kmeans", "shared", "dual")
ALIASES = {
    "mxfp4": "fp4_e2m1-g32-e8m0-mx",
    "mxfp6_e2m3": "fp6_e2m3-g32-e8m0-mx",
    "mxfp6_e3m2": "fp6_e3m2-g32-e8m0-mx",
    "mxfp8_e4m3": "fp8_e4m3-g32-e8m0-mx",
    "mxfp8_e5m2": "fp8_e5m2-g32-e8m0-mx",
    "mxint8": "mxint8-g32-e8m0-mx",
}


class Grid(NamedTuple):
    """What `fit` found: scale (blocks, 1); zero (blocks, 1) or None; for k-means a table, else None.

    The table is (blocks, L), or (L,) where the blocks share it: what follows then leaves it as it is.
    """

    scale: Tensor
    zero: "Tensor | None" = None
    table: "Tensor | None" = None

    def __getitem__(self, at: Any) -> Any:
        """`take` for a selection of blocks; a plain int picks the member, as of any tuple."""
        return tuple.__getitem__(self, at) if isinstance(at, int) else self.take(at)

    def take(self, at: Any) -> "Grid":
        """A sub-grid: the same selection of blocks (slice, mask or index tensor) from each member."""
        return self.map(lambda member: member[at])

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Grid":
        """The grid of fn(member), for the members that are there."""
        scale, zero, table = self
        if table is not None and table.ndim > 1:
            table = fn(table)
        return Grid(fn(scale), None if zero is None else fn(zero), table)

    def where(self, condition: Tensor, other: "Grid") -> "Grid":
        """This grid's blocks where condition (blocks, 1) holds, else those of `other`, which has the same members."""

        def chosen(a: "Tensor | None", b: "Tensor | None") -> "Tensor | None":
            return a if a is None or b is None or a.ndim == 1 else torch.where(condition, a, b)

        scale = torch.where(condition, self.scale, other.scale)
        return Grid(scale, chosen(self.zero, other.zero), chosen(self.table, other.table))


CHANNEL, TENSOR = Blocks(1, -1), Blocks(-1, -1)
_NO_ZERO_FOUND = ("absmax", "median", "tbt", "twn", "mx")


@dataclass(frozen=True)
class Format:
    """levels x blocks x scale rule, how scales are stored, the kind of zero, and the rounding.

    Left empty, `scale_rule` and `zero` follow the levels: absmax, or mean for binary and ternary; an integer zero and
    minmax for unsigned integers. Raises FormatError for names that are not known and for choices that exclude each
    other.
    """

    levels: LevelSet
    blocks: Blocks = CHANNEL
    scale_rule: str = ""
    scale_dtype: str = "fp16"
    zero: str = ""
    rounding: str = "even"

    def __post_init__(self) -> None:
        defaults = _defaults(self.levels)
        object.__setattr__(self, "zero", self.zero or defaults["zero"])
        object.__setattr__(self, "scale_rule", self.scale_rule or self._default_rule(defaults["rule"]))
        for value, known, what in (
            (self.scale_rule, (*scales.RULES, *TABLE_RULES), "scale rule"),
            (self.scale_dtype, (*SCALE_DTYPES, BILEVEL), "scale dtype"),
            (self.zero, ZEROS, "zero"),
            (self.rounding, ROUNDINGS, "rounding"),
        ):
            if value not in known:
                raise FormatError(f"unknown {what} {value!r}. {near_names(value, known)}")
        self._check_sense()

    def _default_rule(self, of_levels: str) -> str:
        if self.zero == "none" or (of_levels == "mean" and self.zero == "real"):
            return of_levels
        return "minmax" if of_levels in ("absmax", "mean") else of_levels

    def _check_sense(self) -> None:
        name, rule = self.levels.name, self.scale_rule
        if self.scale_dtype == BILEVEL and (self.zero == "int" or rule in TABLE_RULES):
            raise FormatError(f"{name}: {BILEVEL} keeps scales and real zeros: use zreal, or levels without a zero.")
        if (self.levels.values == ()) != (rule in TABLE_RULES):
            raise FormatError(
                "k-means levels go with the rule 'kmeans' (a table for each block), which need not be named, "
                "'shared' (one table, scales for the blocks) or 'dual' (two numbers for each block)."
            )
        if rule in TABLE_RULES:
            if self.zero != "none":
                raise FormatError(f"{name}: k-means tables stand without a zero: leave z{self.zero} out.")
            if rule == "dual" and self.levels.bits != 2:
                raise FormatError(f"{name}: two binary planes have four levels: use kmeans2-g64-dual.")
            if rule != "shared" and self.scale_dtype != "fp16":
                raise FormatError(
                    f"{name}: k-means has no scales, and its table is fp16: leave {self.scale_dtype} out."
                )
            return
        if self.levels.unsigned and self.zero == "none":
            raise FormatError(f"{name} has no negative level and needs a zero: zint, zreal, or int{self.levels.bits}.")
        if self.zero == "int" and not self.levels.unsigned:
            raise FormatError(f"{name} takes no integer zero: use uint{self.levels.bits}, or a real zero (zreal).")
        if (self.zero != "none" and rule in _NO_ZERO_FOUND) or (self.zero == "int" and rule == "mean"):
            raise FormatError(
                f"scale rule {rule!r} finds no {self.zero} zero. Use minmax, search or lstsq, or no zero."
            )

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Read a format string. Raises FormatError naming the word that is not understood.

        >>> str(Format.parse("uint4-g64"))
        'uint4-g64'
        """
        if not isinstance(text, str) or len(text) > 100:
            raise FormatError(f'a format is a short string such as "uint4-g64", not {str(text)[:100]!r}.')
        name, *words = ALIASES.get(text, text).split("-")
        options: dict[str, Any] = {"levels": levels(name)}
        for word in words:
            field, value = _parse_word(word, text)
            if field in options:
                raise FormatError(f"format {text!r} says {field.replace('_', ' ')} twice: {word!r} is one too many.")
            options[field] = value
        return cls(**options)

    def __str__(self) -> str:
        plain = Format(self.levels, self.blocks, zero=self.zero)
        words = [self.levels.name, str(self.blocks)]
        words += [self.scale_dtype] if self.scale_dtype != "fp16" else []
        words += [f"z{self.zero}"] if self.zero != _defaults(self.levels)["zero"] else []
        words += [self.scale_rule] if self.scale_rule != plain.scale_rule else []
        words += [self.rounding] if self.rounding != "even" else []
        return "-".join(words)

    def with_(self, **changes: Any) -> "Format":
        """A copy with some fields changed; the others stay, a rule that was a default too."""
        return replace(self, **changes)

    @property
    def overhead_words(self) -> str:
        """For a summary: what is stored beside the codes."""
        zero = {"none": "", "int": f" + {self.levels.bits}-bit zero", "real": " + fp16 zero"}[self.zero]
        by_rule = {"kmeans": "table", "dual": "two fp16 scales"}
        return by_rule.get(self.scale_rule, f"{self.scale_dtype} scale{zero}")


def fit(w: Tensor, fmt: Format, importance: "Tensor | None" = None) -> Grid:
    """Scale (and zero or table) of each block, by the format's rule.

    w: (blocks, n) float32, e.g. from `fmt.blocks.split`
    importance: same shape, non-negative, or None. It weighs the errors where a rule has any, and every rule leaves out
        weights of importance 0. In a block whose importance is all 0 it counts as all 1.
    With scale_dtype "double" and with the rule "shared" pass all blocks of the tensor at once: they have something in
    common.
    """
    if fmt.scale_dtype == BILEVEL:
        raise FormatError(f"{BILEVEL} scales are known only with their rows: use --method spqr, or fp16 scales.")
    if importance is not None:
        importance = importance.where((importance > 0).any(1, keepdim=True), torch.ones_like(importance))
    if fmt.scale_rule == "kmeans":
        table = kmeans_table(w, 2**fmt.levels.bits, importance)
        return Grid(torch.ones(w.shape[0], 1, dtype=torch.float32, device=w.device), None, table)
    if fmt.scale_rule == "dual":
        return dual_grid(*dual_scales(w, importance))
    if fmt.scale_rule == "shared":
        scale, table = shared_table(w, 2**fmt.levels.bits, importance, lambda s: _stored(s, fmt))
        return Grid(scale, None, table)
    if w.numel() == 0:
        return Grid(w.new_zeros(w.shape[0], 1), w.new_zeros(w.shape[0], 1) if fmt.zero != "none" else None)
    scale, zero = scales.RULES[fmt.scale_rule](w, fmt, importance)
    if fmt.scale_dtype != "double":
        return Grid(scale, zero)
    stored = double_scale(scale)
    if fmt.zero == "real" and zero is not None:  # keep the offset -zero * scale where it was found
        zero = (zero * scale / torch.where(stored > 0, stored, 1.0)).half().float()
    return Grid(stored, zero)


def dual_grid(a1: Tensor, a2: Tensor) -> Grid:
    """The levels a2 < 0 <= a1 (blocks, 1) span: a1, a2, both and none, sorted into a table of four."""
    table = torch.cat([a2, torch.zeros_like(a1), a1 + a2, a1], 1).sort(1).values
    return Grid(torch.ones_like(a1), None, table)


def _stored(scale: Tensor, fmt: Format) -> Tensor:
    """The scales as the file will give them back."""
    return double_scale(scale) if fmt.scale_dtype == "double" else scales.round_scale(scale, fmt.scale_dtype)


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


def _parse_word(word: str, text: str) -> tuple[str, Any]:
    """The field of Format that a word sets, and its value."""
    rules = (*scales.RULES, "shared", "dual")
    for field, known in (("scale_dtype", (*SCALE_DTYPES, BILEVEL)), ("scale_rule", rules), ("rounding", ROUNDINGS)):
        if word in known:
            return field, word
    if word.startswith("z") and word[1:] in ZEROS:
        return "zero", word[1:]
    try:
        return "blocks", Blocks.parse(word)
    except FormatError as e:
        names = ["tensor", "channel", "g64", "tile16x64", *SCALE_DTYPES, *rules, *ROUNDINGS]
        names += [f"z{kind}" for kind in ZEROS]
        raise FormatError(f"format {text!r}: word {word!r} is not understood. {near_names(word, names)}") from e
