"""Format strings: a name in files, so every one reads back as itself, and nonsense is refused with words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError, LowbitError, ShapeError
from lowbit.formats import Blocks, Format, levels
from lowbit.formats.format import ALIASES, ZEROS
from lowbit.formats.levels import LEVEL_SET_NAMES, ROUNDINGS
from lowbit.formats.scales import RULES
from lowbit.formats.stores import SCALE_DTYPES

sides = st.one_of(st.just(-1), st.integers(1, 300))


@given(
    st.sampled_from([*LEVEL_SET_NAMES, "pot3_s2", "pot4nz_s4"]),
    st.builds(Blocks, sides, sides),
    st.sampled_from(["", "kmeans", "shared", *RULES]),
    st.sampled_from(SCALE_DTYPES),
    st.sampled_from(["", *ZEROS]),
    st.sampled_from(ROUNDINGS),
)
def test_every_format_reads_back_as_itself(name, blocks, rule, dtype, zero, rounding) -> None:
    try:
        fmt = Format(levels(name), blocks, rule, dtype, zero, rounding)
    except FormatError:
        return
    assert Format.parse(str(fmt)) == fmt and str(Format.parse(str(fmt))) == str(fmt)


@pytest.mark.parametrize("name", LEVEL_SET_NAMES)
def test_every_level_set_has_a_default_format(name: str) -> None:
    fmt = Format(levels(name))
    assert str(fmt) == f"{name}-channel" and Format.parse(f"{name}-channel") == fmt


def test_defaults() -> None:
    assert (Format.parse("int4-g64").scale_rule, Format.parse("int4-g64").zero) == ("absmax", "none")
    assert (Format.parse("uint4-g64").scale_rule, Format.parse("uint4-g64").zero) == ("minmax", "int")
    assert Format.parse("ternary").scale_rule == "mean" and Format.parse("binary-zreal").scale_rule == "mean"
    assert Format.parse("int4-zreal").scale_rule == "minmax" and Format.parse("nf4-zreal").scale_rule == "minmax"
    assert Format.parse("kmeans3").scale_rule == "kmeans"


def test_aliases() -> None:
    for alias, full in ALIASES.items():
        assert str(Format.parse(alias)) == full


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        (Blocks(-1, -1), "tensor"),
        (Blocks(1, -1), "channel"),
        (Blocks(1, 64), "g64"),
        (Blocks(16, 64), "tile16x64"),
        (Blocks(4, -1), "tile4xall"),
        (Blocks(-1, 8), "tileallx8"),
    ],
)
def test_blocks_have_names(blocks: Blocks, text: str) -> None:
    assert str(blocks) == text and Blocks.parse(text) == blocks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4-g64-g32", "says blocks twice"),
        ("int4-fp16-bf16", "says scale dtype twice"),
        ("int4-zreal-znone", "says zero twice"),
        ("int4-minmx", "'minmx' is not understood. Did you mean 'minmax'"),
        ("int4-g0", "'g0' is not understood"),
        ("int4-g", "not understood"),
        ("int4-", "not understood"),
        ("int4-G64", "not understood"),
        ("int4-g６4", "not understood"),
        ("", "unknown level set"),
        ("x" * 101, "short string"),
        ("uint4-znone", "needs a zero: zint, zreal, or int4"),
        ("int4-zint", "int4 takes no integer zero: use uint4"),
        ("ternary-zint", "takes no integer zero"),
        ("kmeans4-zint", "without a zero"),
        ("uint4-absmax", "'absmax' finds no int zero"),
        ("uint4-mean", "'mean' finds no int zero"),
        ("int4-zreal-mx", "'mx' finds no real zero"),
        ("kmeans4-absmax", "go with the rule"),
        ("kmeans4-shared-zreal", "without a zero"),
        ("int4-shared", "go with the rule"),
        ("kmeans4-fp32", "k-means has no scales"),
    ],
)
def test_nonsense_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Format.parse(text)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_a_format_error(text: str) -> None:
    try:
        Format.parse(text)
    except LowbitError:
        pass


def test_constructor_names_the_near_ones() -> None:
    with pytest.raises(FormatError, match="unknown scale rule 'absmx'. Did you mean 'absmax'"):
        Format(levels("int4"), scale_rule="absmx")
    with pytest.raises(FormatError, match="unknown scale dtype 'fp8'"):
        Format(levels("int4"), scale_dtype="fp8")
    with pytest.raises(FormatError, match=r"Blocks\(0, 3\)"):
        Blocks(0, 3)


def test_blocks_that_do_not_divide_say_what_does() -> None:
    with pytest.raises(ShapeError, match=r"in_features=96 is not a multiple of group=64. Try --group 32"):
        Blocks(1, 64).size(8, 96)
    with pytest.raises(ShapeError, match=r"Try --group -1 \(one group per row\)"):
        Blocks(1, 64).size(8, 97)
    with pytest.raises(ShapeError, match="out_features=8 is not a multiple of the tile's 3 rows"):
        Blocks(3, 32).size(8, 96)


def test_with_and_overhead_words() -> None:
    fmt = Format.parse("uint4-g64").with_(scale_dtype="bf16")
    assert str(fmt) == "uint4-g64-bf16" and fmt.overhead_words == "bf16 scale + 4-bit zero"
    assert Format.parse("kmeans2").overhead_words == "table"
    assert Format.parse("int2-zreal").overhead_words == "fp16 scale + fp16 zero"
