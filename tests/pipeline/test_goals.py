"""From probe to recipe: budgets are kept to the byte, impossible ones name what is reachable."""

import json
import re
from math import prod

import numpy as np
import pytest
import torch

from lowbit.api import compress_model
from lowbit.errors import BudgetError, RecipeError
from lowbit.evaluate import perplexity
from lowbit.pipeline.goals import ALLOCATORS, Goals, Search, choose, embedding_menu, menu
from lowbit.recipe import Recipe
from lowbit.runtime.artifact import load
from lowbit.solvers import find
from tests.cli.helpers import refused, run, run_json, words
from tests.sources import tiny_models as tiny

BASE = Recipe(method="gptq")


def bits_of(fmt):
    return int(re.search(r"[0-9]", fmt)[0])


def made_up(seed=0, layers=6):
    """A probe's result with losses a_i 4^-b."""
    rng = np.random.default_rng(seed)
    options = menu([64, 128])
    width = {o.label: bits_of(o.format) for o in options}
    rows = {}
    for i in range(layers):
        a = 10 ** rng.uniform(-1, 1)
        shape = [64, 128] if i % 2 else [128, 64]
        rows[f"m.{i}.w"] = {"shape": shape, "loss": {la: a * 4.0**-b for la, b in width.items()}}
    ends = {
        "embed": {
            "shape": [256, 64],
            "loss": {f: 4.0 ** -int(f.strip("uint").split("-")[0]) for f in embedding_menu(64)},
        }
    }
    return {"layers": rows, "ends": ends, "plain_bytes": 1000}


def test_the_menu_fits_the_model():
    labels = [o.label for o in menu([576, 1536])]
    assert labels[0] == "icquant kmeans2-channel-shared" and "gptq uint2-g64-search" not in labels, "it is dominated"
    assert "gptq uint2-g64-search" in [o.label for o in menu([576, 1536], fast=True)], "but it has no exceptions"
    assert {o.format.split("-")[1] for o in menu([576, 1536], "gptq")} == {"g64", "g32"}, "128 does not divide 576"
    assert {o.format.split("-")[1] for o in menu([100])} == {"channel"}
    assert {o.label.split("-")[1] for o in menu([256], "rtn", 32)} == {"g32"}
    eight = next(o for o in menu([64]) if o.format.startswith("uint8"))
    assert eight.like == "gptq uint4-g64-search" and eight.factor == pytest.approx((15 / 255) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_goals_are_kept_and_more_is_never_worse(seed):
    probe, losses = made_up(seed), []
    for size in (30_000, 36_000, 42_000, 60_000):
        chosen = choose(probe, Goals(bytes=size), BASE)
        assert chosen.expected["bytes"] <= size
        losses.append(chosen.expected["loss"])
        best = min((u["loss"] for u in chosen.uniform if u["bytes"] <= size), default=np.inf)
        assert chosen.expected["loss"] <= best * (1 + 1e-9), "one format for all would have been better"
    assert losses == sorted(losses, reverse=True)
    smallest = choose(probe, Goals(max_loss=losses[1]), BASE).expected
    assert smallest["loss"] <= losses[1] * (1 + 1e-6) and smallest["bytes"] <= 36_000 * 1.01
    assert choose(probe, Goals(bits=2.9), BASE).expected["bits_per_weight"] <= 2.9


def test_several_goals_at_once():
    probe = made_up()
    seconds = {(*r["shape"], la): 1e-3 * bits_of(la)
               for r in (*probe["layers"].values(), *probe["ends"].values()) for la in r["loss"]}  # fmt: skip
    both = choose(probe, Goals(bytes=40_000, latency=0.025), BASE, seconds=seconds, rest=0.002)
    assert both.expected["bytes"] <= 40_000 and both.expected["latency"] <= 0.025
    with pytest.raises(BudgetError, match=r"--latency.*smallest reachable with these formats is 1[0-9.]+ms"):
        choose(probe, Goals(latency=0.004), BASE, seconds=seconds, rest=0.002)


def test_the_frontier_falls_and_the_recipe_is_short():
    chosen = choose(made_up(), Goals(bytes=36_000), BASE)
    sizes, losses = [p["bytes"] for p in chosen.frontier], [p["loss"] for p in chosen.frontier]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and len(sizes) > 10
    assert len(chosen.recipe.layers) < 6 and chosen.recipe.format
    assert json.loads(json.dumps(chosen.as_dict()))["expected"] == chosen.expected


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        (Goals(bytes=10_000), r"--budget: at most 0\.01 MB cannot be met; the smallest reachable .* is 0\.1MB"),
        (Goals(bits=1.5), r"--bits: .* smallest reachable with these formats is 2\.2[0-9]\. Try --bits 2\.2"),
        (Goals(max_loss=1e-9), r"--max-loss: .* smallest reachable with these formats is 0\.0[0-9]%"),
    ],
)
def test_impossible_goals_name_the_smallest_reachable(goals, said):
    with pytest.raises(BudgetError, match=said):
        choose(made_up(), goals, BASE)


def test_goals_that_are_none():
    with pytest.raises(RecipeError, match="positive number"):
        Goals(bytes=-1)
    assert not Goals() and Goals(bits=2.5) and Goals(bits=2.5).only_bits


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    where = tmp_path_factory.mktemp("goals")
    torch.manual_seed(0)
    tiny.model("llama").save_pretrained(where / "model")
    tiny.tokenizer().save_pretrained(where / "model")
    return where / "model", words(where / "words.txt", 900)


SMALL = ("--windows", 6, "--context", 16)


def test_a_budget_end_to_end(tiny_llama, tmp_path):
    """Counted bytes are what was expected, the measured loss is that of the artifact, the report shows the frontier."""
    model, text = tiny_llama
    out, events = tmp_path / "out", []
    got = compress_model(model, out, budget=24_000, data=str(text), windows=6, context=16, progress=events.append)
    choice = got["choice"]
    assert choice["met"] and choice["goals"] == {"bytes": 24_000}
    size = (out / "model.safetensors").stat().st_size
    assert size == choice["measured"]["bytes"] <= 24_000 and size > 20_000
    assert choice["expected"]["bytes"] == pytest.approx(size, rel=0.08)
    assert len({la["format"] for la in got["layers"]}) > 2, "formats should differ between layers"
    assert choice["expected"]["bits_per_weight"] == pytest.approx(choice["measured"]["bits_per_weight"], rel=1e-9)
    kept = json.loads((out / "run.json").read_text())["choice"]
    assert kept["frontier"] and kept["measured"] == choice["measured"]
    kinds = [e["event"] for e in events]
    assert kinds.index("probe") < kinds.index("chosen") < kinds.index("block") < kinds.index("measured")
    assert not (tmp_path / "out.partial").exists()
    ids = torch.randint(3, 60, (2, 16))
    assert perplexity(load(out), ids).perplexity > 1


@pytest.mark.slow
def test_an_average_of_bits_and_a_loss_from_the_command_line(tiny_llama, tmp_path):
    model, text = tiny_llama
    got = run_json("compress", model, "-o", tmp_path / "a", "--bits", 4.5, "--data", text, *SMALL)
    assert got["bits_per_weight"] <= 4.5 and got["choice"]["goals"] == {"bits": 4.5}
    done = run("compress", model, "-o", tmp_path / "b", "--max-loss", "2%", "--data", text, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "Expected: " in done.stdout and "Measured: " in done.stdout and "held-out windows" in done.stdout
    assert "Chosen among" in (tmp_path / "b" / "report.html").read_text()
    whole = run_json("compress", model, "-o", tmp_path / "c", "--bits", 4, "--group", 16, "--data", text, *SMALL)
    assert "choice" not in whole


@pytest.mark.slow
def test_a_latency_is_measured_on_this_machine(tiny_llama, tmp_path):
    model, text = tiny_llama
    got = compress_model(model, tmp_path / "out", latency=5.0, data=str(text), windows=4, context=16)
    choice = got["choice"]
    assert 0 < choice["expected"]["latency"] < 5.0 and 0 < choice["measured"]["latency"] < 5.0 and choice["met"]
    with pytest.raises(BudgetError, match="--latency: at most 0.0001 ms a token cannot be met"):
        compress_model(model, tmp_path / "no", latency=1e-7, data=str(text), windows=4, context=16)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_to_a_goal_goes_on_where_it_was_stopped(tiny_llama, tmp_path):
    model, text = tiny_llama
    how = {"budget": 24_000, "data": str(text), "windows": 6, "context": 16}
    compress_model(model, tmp_path / "whole", **how)

    def stop_at(kind, n):
        def hear(event):
            hear.seen += event["event"] == kind
            if hear.seen == n:
                raise KeyboardInterrupt

        hear.seen = 0
        return hear

    for kind, n in (("probe", 3), ("block", 1), ("measured", 1)):
        with pytest.raises(KeyboardInterrupt):
            compress_model(model, tmp_path / "out", **how, progress=stop_at(kind, n))
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    heard = []
    compress_model(model, tmp_path / "out", **how, progress=heard.append)
    assert not {"probe", "block"} & {e["event"] for e in heard}, "everything was there"
    for name in ("model.safetensors", "lowbit.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_contradicts_a_goal_is_refused(tiny_llama, tmp_path):
    model, text = tiny_llama
    goal = ("compress", model, "-o", tmp_path / "out", "--budget", "60MB")
    assert "chooses the formats" in refused(*goal, "--data", text, "--format", "nf4-g16")
    assert "add --data FILE" in refused(*goal)
    assert "takes no goal" in refused(*goal, "--data", text, "--method", "awq")
    assert "Did you mean 5%" in refused(*goal[:4], "--max-loss", "5", "--data", text, code=2)
    assert "for example 20ms" in refused(*goal[:4], "--latency", "20", "--data", text, code=2)
    tight = refused("compress", model, "-o", tmp_path / "out", "--bits", 1.5, "--data", text, *SMALL)
    assert "smallest reachable" in tight and "Try --bits 2." in tight
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*ALLOCATORS])
def test_every_allocator_keeps_the_goal(name):
    probe = made_up()
    chosen = choose(probe, Goals(bits=3.4), BASE, allocator=name)
    assert chosen.expected["bits_per_weight"] <= 3.4
    assert bool(chosen.recipe.layers) != (name in ("uniform", "preset")), "these layers have no roles for presets"
    best = choose(probe, Goals(bits=3.4), BASE, allocator="integer_program").expected["loss"]
    assert chosen.expected["loss"] >= best * (1 - 1e-3)


def test_searches_that_are_not_known(tmp_path):
    for how in ({"allocate": "greddy"}, {"sensitivity": "hessian"}):
        with pytest.raises(RecipeError, match="unknown"):
            Search(**how)
    assert "add --budget" in refused("compress", "model", "-o", tmp_path / "out", "--allocate", "greedy")


def test_scalebits_spreads_an_average_over_layers_and_tiles(tiny_llama, tmp_path):
    """Between layers by the probe, within them tile by tile; the counted average is kept."""
    model, text = tiny_llama
    how = {"data": str(text), "windows": 6, "context": 16}
    got = compress_model(model, tmp_path / "out", method="scalebits", bits=4.0, **how)
    recipe = json.loads((tmp_path / "out" / "lowbit.json").read_text())["recipe"]
    averages = {recipe["options"]["average"], *(r["options"]["average"] for r in recipe["layers"])}
    assert len(averages) > 1 and averages <= set(find("scalebits").averages)
    assert got["bits_per_weight"] <= 4.0 and got["choice"]["met"]
    assert got["choice"]["expected"]["bits_per_weight"] == pytest.approx(got["bits_per_weight"], rel=0.06)


def test_sizes_of_the_expected_recipe_are_exact():
    probe = made_up()
    chosen = choose(probe, Goals(bits=3.0), BASE)
    from lowbit.allocate import storage_bytes

    bits = sum(
        8 * storage_bytes(tuple(r["shape"]), str(chosen.recipe.format_for(n))) for n, r in probe["layers"].items()
    )
    assert chosen.expected["bits_per_weight"] * sum(
        prod(r["shape"]) for r in probe["layers"].values()
    ) == pytest.approx(bits)
