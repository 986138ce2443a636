"""lowbit train: exact resumption, every network on its tasks, the packed network, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.errors import ArtifactError, DataError, FormatError, RecipeError, TrainingError
from lowbit.train.loop import Trainer
from lowbit.train.recipe import TrainRecipe, load_recipe, shipped
from lowbit.train.runs import load_trained, run
from lowbit.train.tasks import task

CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog. " * 40
TINY: dict[str, Any] = {
    "task": "digits", "architecture": {"name": "mlp", "width": 16, "depth": 2}, "epochs": 2, "batch": 32,
    "train_examples": 128, "test_examples": 64,
}  # fmt: skip
BOTH_ROUNDED = {
    "architecture": {"name": "resnet", "depth": 8, "width": 4, "activations": "signed", "block": "single"},
    "weights": {"method": "quantize", "format": "binary-channel", "estimator": "reste"},
    "activations": {"method": "sign", "estimator": "approxsign"},
    "optimizer": "sgd",
    "lr": 0.05,
}


def tiny(**changes: Any) -> TrainRecipe:
    return TrainRecipe(**(TINY | changes))


def trained(recipe: TrainRecipe, folder: Path, stop_after: int = 0) -> dict[str, torch.Tensor]:
    """The state after training; with stop_after the process "dies" after so many steps, and another one goes on."""

    class Killed(Exception):
        pass

    def die(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["done"] == stop_after:
            raise Killed

    data = task(recipe.task).load(recipe.data, CPU, recipe.train_examples, recipe.test_examples)
    folder.mkdir(exist_ok=True)
    if stop_after:
        with pytest.raises(Killed):  # before that step's checkpoint: the one of the step before is what remains
            Trainer(recipe, data, 0, folder, checkpoint_seconds=0).run(die)
        torch.manual_seed(12345)
    trainer = Trainer(recipe, data, 0, folder, checkpoint_seconds=1e9)
    trainer.run()
    assert trainer.done == trainer.total
    return trainer.net.state_dict()


@pytest.mark.parametrize("changes", [{}, BOTH_ROUNDED], ids=["adamw", "sgd, schedule, signs"])
def test_a_killed_training_goes_on_to_the_very_same_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny(**changes)
    straight = trained(recipe, tmp_path / "straight")
    resumed = trained(recipe, tmp_path / "resumed", stop_after=6)  # in the middle of the second epoch
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


@pytest.mark.parametrize(
    "name, options",
    [("mlp", {"width": 8}), ("resnet", {"depth": 8, "width": 4}), ("vit", {"width": 8, "depth": 1, "heads": 2}),
     ("lstm", {"width": 8})],
)  # fmt: skip
def test_every_network_learns_images_and_packs(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny(architecture={"name": name, **options}, epochs=1, train_examples=64, weights="ternary-channel")
    row = run(recipe, tmp_path / "out")["rows"][0]
    assert row["same_class"] == 1 and row["packed_accuracy"] == row["accuracy"]
    assert row["bits_per_weight"] < 8 and row["bytes"] < 2 * row["float_bytes"]


@pytest.mark.parametrize(
    "name, options",
    [("mlp", {"width": 8, "window": 4}), ("lstm", {"width": 8}), ("gpt", {"width": 8, "depth": 1, "heads": 2})],
)
def test_every_network_learns_characters_and_packs(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = TrainRecipe(
        task="shakespeare", data=str(tmp_path / "text.txt"), architecture={"name": name, **options}, epochs=1, batch=8
    )
    row = run(recipe, tmp_path / "out")["rows"][0]
    assert row["same_class"] == 1 and 0 < row["loss"] < 5


def test_the_future_does_not_reach_the_past() -> None:
    from lowbit.train.architectures import build

    for name, options in (("gpt", {"width": 8, "depth": 1, "heads": 2}), ("lstm", {"width": 8}), ("mlp", {"width": 8})):
        net = build(name, "characters", (64,), 5, options).eval()
        x = torch.randint(0, 5, (1, 64))
        other = torch.cat([x[:, :40], (x[:, 40:] + 1) % 5], 1)
        with torch.no_grad():
            a, b = net(x), net(other)
        assert torch.allclose(a[:, :40], b[:, :40], atol=1e-6) and not torch.allclose(a[:, 40:], b[:, 40:]), name


def test_a_run_trains_seeds_packs_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    events: list[str] = []
    result = run(tiny(seeds=[0, 1]), out, progress=lambda e: events.append(e["event"]))
    assert [r["seed"] for r in result["rows"]] == [0, 1] and result["spread"] is not None
    assert events.count("epoch") == 4 and events.count("pack") == 2
    data = task("digits").load("", CPU, 128, 64)
    net = load_trained(out, seed=1)
    with torch.no_grad():
        right = (net(data.x_test).argmax(1) == data.y_test).float().mean()
    assert float(right) == pytest.approx(result["rows"][1]["accuracy"])
    records = result["rows"][0]["diagnostics"]
    assert len(records) == 2 and records[1]["layers"]["1"]["flip_rate"] > 0
    json.dumps(result)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tiny(epochs=1)
    first = run(recipe, out)
    with pytest.raises(ArtifactError, match="this very training, finished.* --force"):
        run(recipe, out)
    with pytest.raises(ArtifactError, match=r"another recipe \(epochs: 1 there, 2 here\).* -o"):
        run(tiny(epochs=2), out)
    again = run(recipe, out, force=True)
    assert again["accuracy"] == first["accuracy"]
    assert len(run(tiny(epochs=1, seeds=[0, 1]), out)["rows"]) == 2  # more seeds: the first is kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="something else than a training"):
        run(recipe, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_nan_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"NaN or infinite at step \d+ of 8.*--set lr="):
        run(tiny(optimizer="sgd", lr=1e30, schedule="constant", warmup=0, weights="float"), tmp_path / "out")


def test_a_checkpoint_of_another_recipe_or_half_a_file_is_refused(tmp_path: Path) -> None:
    trained(tiny(epochs=1), tmp_path / "seed-0")
    data = task("digits").load("", CPU, 128, 64)
    with pytest.raises(ArtifactError, match=r"another recipe \(lr: 0.003 there, 0.1 here\)"):
        Trainer(tiny(epochs=1, lr=0.1), data, 0, tmp_path / "seed-0").run()
    file = tmp_path / "seed-0" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="no whole checkpoint.*--force"):
        Trainer(tiny(epochs=1), data, 0, tmp_path / "seed-0").run()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"task": "digit"}, RecipeError, "unknown task 'digit'. Did you mean 'digits'"),
        ({"architecture": "resnett"}, RecipeError, "Did you mean 'resnet'"),
        ({"architecture": "gpt"}, RecipeError, "is for characters, not for images"),
        ({"architecture": {"name": "mlp", "widht": 3}}, RecipeError, "no option 'widht'. Did you mean 'width'"),
        ({"weights": "ternery"}, FormatError, "ternery"),
        ({"weights": {"method": "quantise"}}, RecipeError, "Did you mean 'quantize'"),
        ({"activations": "sine"}, RecipeError, "Did you mean 'sign'"),
        ({"epochs": 0}, RecipeError, "recipe field epochs=0"),
        ({"lrr": 0.1}, RecipeError, "no field 'lrr'. Did you mean 'lr'"),
        ({"seeds": [1, 1]}, RecipeError, "different whole numbers"),
        ({"optimizer": "lion"}, RecipeError, "optimizer='lion'"),
    ],
)
def test_bad_recipes_are_refused_before_work_begins(changes: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        tiny(**changes)


def test_missing_data_and_devices(tmp_path: Path) -> None:
    for name in ("cifar10", "shakespeare"):
        with pytest.raises(DataError, match=f"task {name} needs .*--data"):
            task(name).load("", CPU, 0, 0)
    with pytest.raises(DataError, match="--data FOLDER"):
        task("cifar10").load(str(tmp_path), CPU, 0, 0)
    with pytest.raises(RecipeError, match="Use --device cpu"):
        run(tiny(device="abacus"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shipped_recipes_are_whole() -> None:
    recipes = {name: load_recipe(name) for name in shipped()}
    assert "digits-ternary" in recipes and all(r.title for r in recipes.values())
    with pytest.raises(RecipeError, match="Did you mean 'digits-ternary'"):
        load_recipe("digits-ternry")


def test_learning_rates_rise_and_fall() -> None:
    r = tiny(lr=1.0, epochs=10, warmup=1, schedule="linear")
    assert [round(r.lr_at(k, 4), 3) for k in (0, 3, 20, 39)] == [0.25, 0.925, 0.5, 0.025]
    assert tiny(lr=1.0, epochs=10, warmup=0).lr_at(20, 4) == pytest.approx(0.5)
