"""Train a network in few bits by a recipe: attach, train, pack, check, report. Without a recipe: the list of them.

    lowbit train digits-ternary                          seconds, no download
    lowbit train shakespeare-gpt --data input.txt
    lowbit train my-recipe.yaml -o out --epochs 50 --seed 0 --seed 1

Type the same command again to go on after an interruption: the weights will be those of an undisturbed training.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, Shell, shell
from lowbit.cli._values import parse_settings
from lowbit.report.words import number, size_words, time_words

ORDER = 60


def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a YAML file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; train-RECIPE if left out.")] = None,
    data: Annotated[str | None, typer.Option(help="The task's folder, file or hub name.")] = None,
    weights: Annotated[str | None, typer.Option(help="Another method or format for the weights.")] = None,
    activations: Annotated[str | None, typer.Option(help="Another method for the layers' inputs.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="One training each. Repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, as lr=0.01. Repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin again where OUT holds a training.")] = False,
    as_json: Json = False,
) -> None:
    sh = shell()
    if recipe is None:
        _list(sh)
        return
    sh.hint_on_interrupt = "Type the same command again to go on."
    from lowbit.report.training_page import write_training_report
    from lowbit.train.recipe import load_recipe
    from lowbit.train.runs import run as train

    flags = {"data": data, "weights": weights, "activations": activations, "epochs": epochs, "device": device}
    chosen = load_recipe(recipe, **parse_settings(settings) | {k: v for k, v in flags.items() if v is not None},
                         seeds=seed)  # fmt: skip
    folder = out or Path(f"train-{Path(recipe).stem}")
    with TrainProgress(sh) as progress:
        result = train(chosen, folder, force, progress)
    result["report"] = str(write_training_report(folder, result))
    _show(sh, result)
    sh.result(result)


class TrainProgress:
    """A bar with the time left at a terminal; elsewhere the first figures and a line an epoch."""

    def __init__(self, sh: Shell):
        self.shell = sh
        self.words = ""
        self._context: Any = None
        self._step: Any = None

    def __enter__(self) -> "TrainProgress":
        self._context = self.shell.progress("")
        self._step = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __call__(self, e: dict[str, Any]) -> None:
        if e["event"] == "step":
            self._step(e["done"], e["total"], self.words)
        elif e["event"] == "epoch":
            self._epoch(e)
        elif line := _line(e):
            self.shell.say(line)

    def _epoch(self, e: dict[str, Any]) -> None:
        self.words = f"epoch {e['epoch']}/{e['epochs']}  loss {e['loss']:.3g}"
        if e["accuracy"] is not None:
            self.words += f"  accuracy {100 * e['accuracy']:.1f} %"
        if not self.shell.rich and (e["epochs"] <= 20 or e["epoch"] % (e["epochs"] // 20) == 0):
            self.shell.say(f"{self.words}  {time_words(e['left'])} left")


def _line(e: dict[str, Any]) -> str:
    """What is said about an event, "" for nothing."""
    if e["event"] == "start":
        return (
            f"Seed {e['seed']}: {e['parameters']:,} parameters, {e['train_examples']:,} training and "
            f"{e['test_examples']:,} test examples, {e['total']:,} steps on {e['device']}."
        )
    if e["event"] == "resume":
        return f"Going on after step {e['done']:,} of {e['total']:,}."
    if e["event"] == "early":
        return (
            f"First steps: loss {e['loss']:.3g}, {1000 * e['step_seconds']:.1f} ms a step, "
            f"about {time_words(e['left'])} left."
        )
    return "Packing, and comparing with the trained network." if e["event"] == "pack" else ""


def _list(sh: Shell) -> None:
    from lowbit.recipe import read_yaml
    from lowbit.train.recipe import shipped

    rows = [{"name": name, "title": str(read_yaml(path).get("title", ""))} for name, path in shipped().items()]
    sh.table(["recipe", "what it trains"], [(r["name"], r["title"]) for r in rows])
    sh.say("\nStart with: lowbit train digits-ternary")
    sh.result({"recipes": rows})


def _show(sh: Shell, r: dict[str, Any]) -> None:
    rows = [
        (
            row["seed"], f"{100 * row['accuracy']:.2f} %", number(row["loss"]),
            "-" if "bytes" not in row else f"{row['bits_per_weight']:.2f}",
            "-" if "bytes" not in row else f"{row['bytes']:,}",
            "-" if "bytes" not in row else f"{100 * row['same_class']:.2f} %", time_words(row["train_seconds"]),
        )
        for row in r["rows"]
    ]  # fmt: skip
    sh.say()
    sh.table(["seed", ">accuracy", ">loss", ">bits per weight", ">bytes", ">packed: same class", ">training"], rows)
    if r["spread"] is not None:
        sh.say(f"Accuracy {100 * r['accuracy']:.2f} %, spread {100 * r['spread']:.2f} points over {len(rows)} seeds.")
    packed = next((row for row in r["rows"] if "bytes" in row), None)
    if packed:
        sh.say(f"Packed: {size_words(packed['bytes'])} instead of {size_words(packed['float_bytes'])}, read back, run.")
    sh.say(f"Report: {r['report']}", "bold")
    if packed:
        sh.say(f'In Python: net = lowbit.train.load_trained("{r["out"]}")')
