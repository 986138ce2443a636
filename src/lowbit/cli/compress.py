"""Compress a model and write the artifact.

MODEL is a .gguf file, a folder with safetensors, or a Hugging Face name. The float model is read one block at a time.
A run that was stopped goes on from the last finished block when the same command is typed again.

    lowbit compress model.gguf -o out --method gptq --bits 4 --group 64 --data "valid.txt[:50%]"

With a goal instead of a width (--budget 60MB, --bits 2.5, --max-loss 5%, --latency 20ms, or several) a short probe
finds out what each layer loses at each width, and every layer gets the format that serves the goal best. What is
expected is said before, what was got is measured after.

    lowbit compress model.gguf -o out --budget 60MB --data "valid.txt[:50%]"
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._progress import CompressProgress
from lowbit.cli._shell import Json, shell
from lowbit.cli._values import parse_fraction, parse_seconds, parse_settings, parse_size
from lowbit.report.words import number, size_words, time_words

ORDER = 20
METHOD = "How to quantize"
GOAL = "Or what to reach"
DATA = "Calibration"
RUN = "The run"

Bits = Annotated[
    float | None,
    typer.Option(min=1, max=8, help="Bits per code (4); 2.5 is an average to reach.", rich_help_panel=METHOD),
]


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a model folder or a Hugging Face name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")],
    method: Annotated[str | None, typer.Option(help="See `lowbit methods` (gptq).", rich_help_panel=METHOD)] = None,
    bits: Bits = None,
    group: Annotated[
        int | None, typer.Option(help="Weights that share a scale; -1 for a whole row (64).", rich_help_panel=METHOD)
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="A format instead of bits and group, e.g. nf4-g64.", rich_help_panel=METHOD)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML recipe; options typed beside it win.", rich_help_panel=METHOD)
    ] = None,
    embed_bits: Annotated[
        int | None, typer.Option(help="Bits of embeddings and output head; 16 leaves them (8).", rich_help_panel=METHOD)
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="How packed layers read their input: float or int8 (float).", rich_help_panel=METHOD),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.", rich_help_panel=METHOD),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of the weights' file, e.g. 60MB.", rich_help_panel=GOAL)
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="How much perplexity may rise, e.g. 5%.", rich_help_panel=GOAL),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time to generate a token here, e.g. 20ms.", rich_help_panel=GOAL)
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="Who chooses: greedy, integer_program, pareto, policy_gradient, preset, uniform (greedy).",
            rich_help_panel=GOAL,
        ),
    ] = None,
    sensitivity: Annotated[
        str | None, typer.Option(help="By what: fisher, or trace as HAWQ (fisher).", rich_help_panel=GOAL)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text: a file, a folder, Parquet, a dataset; a part as FILE[:50%].", rich_help_panel=DATA),
    ] = None,
    gram: Annotated[
        str | None,
        typer.Option(
            help="What is gathered: inputs, or the loss's gradients too: oac, guided, fisher (inputs).",
            rich_help_panel=DATA,
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of text (24).", rich_help_panel=DATA)] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window (512).", rich_help_panel=DATA)] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are taken (0).", rich_help_panel=DATA)] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A tokenizer's folder, if not the model's own.", rich_help_panel=DATA),
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Refuse to need more, e.g. 8GB.", rich_help_panel=RUN)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.", rich_help_panel=RUN)] = False,
    as_json: Json = False,
) -> None:
    sh = shell()
    _check_choices(bits, group, format, activations)
    options = parse_settings(settings)
    ceiling = parse_size(max_ram) if max_ram is not None else None
    sh.hint_on_interrupt = (
        f"Finished blocks are kept in {out}.partial: type the same command again to go on from there."
    )
    from lowbit.api import compress_model

    how = {
        "recipe": recipe,
        "method": method,
        "bits": int(bits) if bits is not None and bits == int(bits) else bits,
        "group": group,
        "format": format,
        "embed_bits": embed_bits,
        "activations": activations,
        "gram": gram,
        "options": options or None,
        "data": data,
        "windows": windows,
        "context": context,
        "seed": seed,
        "tokenizer": tokenizer,
        "budget": parse_size(budget) if budget is not None else None,
        "max_loss": parse_fraction(max_loss) if max_loss is not None else None,
        "latency": parse_seconds(latency) if latency is not None else None,
        "allocate": allocate,
        "sensitivity": sensitivity,
    }
    typed: dict[str, Any] = {k: v for k, v in how.items() if v is not None}
    with CompressProgress(sh) as progress:
        result = compress_model(model, out, **typed, max_ram=ceiling, force=force, progress=progress)
    _write_report(out)
    _summary(sh, result, model, out)
    sh.result(result)
    if not result.get("choice", {"met": True})["met"]:
        sh.note(f"lowbit: {result['choice']['words']} was not reached; {out} is the nearest that was found.")
        raise typer.Exit(1)


def _check_choices(bits: float | None, group: int | None, fmt: str | None, activations: str | None) -> None:
    """Options that contradict each other, before anything is read."""
    if fmt is not None and (bits is not None or group is not None):
        raise typer.BadParameter(f"--format {fmt} says bits and group itself; leave out --bits and --group.")
    if group is not None and group != -1 and group < 1:
        raise typer.BadParameter(
            f"--group {group}: give how many weights share a scale, e.g. --group 64, or -1 for a whole row."
        )
    if activations not in (None, "float", "int8"):
        raise typer.BadParameter(f"--activations {activations}: use float or int8.")


def _write_report(out: Path) -> None:
    from lowbit.report import write_report

    write_report(out)


def _summary(sh: Any, result: dict[str, Any], model: str, out: Path) -> None:
    layers = result.get("layers", [])
    errors = [la["error"] for la in layers if la.get("error") is not None]
    file_bits = f"{result['bits_per_weight_file']:.3f} bits per weight"
    rows = [
        ("compressed blocks", f"{result['bits_per_weight']:.3f} bits per weight"),
        ("whole file", f"{file_bits}, {size_words(result['bytes'])}, {len(layers)} layers compressed"),
        ("mean layer error", number(sum(errors) / len(errors), 3) if errors else "-"),
        ("time", time_words(result["seconds"])),
        ("peak memory", size_words(result["peak_memory_bytes"])),
        ("report", str(out / "report.html")),
    ]
    if "choice" in result:
        rows[2:3] = [("perplexity", _reached(result["choice"]))]
    sh.say()
    sh.say(f"Wrote {out}", style="bold green")
    for name, value in rows:
        sh.say(f"  {name:<18} {value}")
    sh.say()
    sh.say("Next:")
    sh.say(f"  lowbit eval {quoted(out)} --text TEXT --against {quoted(model)}")
    sh.say(f'  lowbit generate {quoted(out)} --prompt "The capital of France is"')


def _reached(choice: dict[str, Any]) -> str:
    got, expected = choice["measured"], choice["expected"]
    words = f"{100 * got['loss']:+.2f}% on {got['windows']} held-out windows ({100 * expected['loss']:+.2f}% expected)"
    return words + (f", {1000 * got['latency']:.3g} ms a token" if "latency" in got else "")


def quoted(path: object) -> str:
    import shlex

    return shlex.quote(str(path))
