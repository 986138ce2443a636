"""Recipes: what is understood, what wins, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.errors import FormatError, RecipeError
from lowbit.recipe import Recipe


def test_defaults_are_the_methods_own_format() -> None:
    assert str(Recipe().format_for("any")) == "uint4-g64-search"
    assert str(Recipe(method="hqq", bits=2, group=-1).format_for("any")) == "uint2-channel-zreal"
    assert str(Recipe(format="nf4-g32").format_for("any")) == "nf4-g32"


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"match": "*.0.mlp.*", "format": "float"},
        {"match": "*.mlp.*", "format": "int8-channel"},
        {"match": "*", "format": "nf4-g16"},
    ]
    recipe = Recipe(layers=rules)
    assert recipe.format_for("model.layers.0.mlp.up_proj") is None
    assert str(recipe.format_for("model.layers.1.mlp.up_proj")) == "int8-channel"
    assert str(recipe.format_for("model.layers.1.self_attn.q_proj")) == "nf4-g16"


@pytest.mark.parametrize(
    ("fields", "width", "expected"),
    [
        ({}, 576, "int8-g64"),
        ({"group": 32}, 576, "int8-g32"),
        ({"group": 128}, 576, "int8-g64"),  # 128 does not divide
        ({"group": -1}, 48, "int8-g16"),
        ({"group": 64}, 50, "int8-channel"),
        ({"embeddings": 4}, 64, "int4-g64"),
        ({"embeddings": 16}, 64, "None"),
    ],
)
def test_format_of_embeddings(fields: dict[str, Any], width: int, expected: str) -> None:
    assert str(Recipe(**fields).embedding_format(width)) == expected


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: gptq\nformat: nf4-g32\nwindows: 7\noptions: {damping: 0.5, refit: false}\n")
    return path


@pytest.mark.parametrize("as_object", [False, True])
def test_flags_win_over_a_recipe_whether_file_or_object(file: Path, as_object: bool) -> None:
    base = Recipe.load(file) if as_object else file
    merged = Recipe.merged(base, bits=3, windows=None, options={"damping": 0.25})
    assert str(merged.format_for("any")) == "uint3-g64-search"  # --bits 3 is not forgotten beside format: nf4-g32
    assert merged.windows == 7
    assert merged.options == {"damping": 0.25, "refit": False}
    assert merged.solver_options["act_order"] is True
    assert Recipe.merged(base, seed=3).format == "nf4-g32"
    assert Recipe.merged(base, format="int8-g16").format == "int8-g16"


def test_a_recipe_survives_being_written_down() -> None:
    recipe = Recipe(method="awq", bits=3, layers=[{"match": "*", "format": "float"}], options={"clip": False}, seed=5)
    assert Recipe(**recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bitz": 4}, "no field 'bitz'.*'bits'"),
        ({"bits": 9}, "bits=9"),
        ({"group": 0}, "group 0"),
        ({"embeddings": 12}, "12 bits"),
        ({"method": "gtpq"}, "'gptq'"),
        ({"options": {"dampin": 1}}, "no option 'dampin'.*'damping'"),
        ({"options": {"damping": "much"}}, "damping='much'.*number of at least 0"),
        ({"options": {"damping": -0.5}}, "number of at least 0"),
        ({"options": {"damping": float("nan")}}, "number of at least 0"),
        ({"options": {"damping": True}}, "number of at least 0"),
        ({"options": {"block": 0}}, "whole number of at least 1"),
        ({"options": {"block": 2.5}}, "whole number of at least 1"),
        ({"options": {"block": True}}, "whole number of at least 1"),
        ({"options": {"refit": 1}}, "true or false"),
        ({"format": "uint4-g64-stochastic"}, "other codes on every run"),
        ({"layers": [{"match": "*", "format": "int4-g16-stochastic"}]}, "other codes on every run"),
        ({"layers": [{"match": "*"}]}, "layers.0.format"),
        ({"bits": True}, "bits=True"),
        ({"group": False}, "group=False"),
        ({"seed": 2**64}, "seed="),
        ({"seed": -(2**63) - 1}, "seed="),
    ],
)
def test_what_is_not_understood_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(**fields)


def test_sweeps_can_be_left_out() -> None:
    assert Recipe(options={"sweeps": 0}).solver_options["sweeps"] == 0
    with pytest.raises(RecipeError, match="whole number of at least 0"):
        Recipe(options={"sweeps": -1})


def test_a_format_that_is_not_understood_is_refused_wherever_it_stands() -> None:
    for fields in ({"format": "uint44-g16"}, {"layers": [{"match": "*", "format": "uint44-g16"}]}):
        with pytest.raises(FormatError, match="uint4"):
            Recipe(**fields)


@pytest.mark.parametrize("text", ["- a list", "just words", "method: [", "1: 2"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="check the path"):
        Recipe.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "text",
    ["bits: 4\nmethod: rtn\nbits: 3", "layers:\n  - {match: '*', format: float, match: a}", "options: {a: 1, 'a': 2}"],
)
def test_a_field_written_twice_is_refused(tmp_path: Path, text: str) -> None:
    """YAML would take the last one without a word."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="twice"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["[" * 1000, "seed: 2024-13-45"])
def test_a_file_that_trips_the_yaml_reader(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Recipe.load(path)


def test_the_widest_seeds_work() -> None:
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(Recipe(seed=seed).seed)


def test_a_rule_has_options_of_its_own():
    rules = [
        {"match": "*.a", "format": "uint4-g16", "options": {"sweeps": 4}},
        {"match": "*.b", "format": "uint4-g16", "method": "hqq"},
    ]
    recipe = Recipe(method="gptq", options={"damping": 0.2}, layers=rules)
    assert recipe.solver_for("m.a")[1] == recipe.solver_options | {"sweeps": 4}
    assert recipe.solver_for("m.c")[1]["damping"] == 0.2 and recipe.solver_for("m.b")[0].name == "hqq"
    with pytest.raises(RecipeError, match="has no option 'sweps'. Did you mean"):
        Recipe(method="gptq", layers=[{"match": "*", "format": "uint4-g16", "options": {"sweps": 4}}])
