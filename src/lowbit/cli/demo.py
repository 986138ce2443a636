"""Start here: train a small network, make it 8-bit to binary, pack it, run it. About a minute.

No download, no GPU: a convolutional network learns scikit-learn's handwritten digits, then its weights become 8, 4, 3
and 2 bits, ternary and binary. Each variant is packed, written to disk, read back and run from its packed bits. The
report shows the table.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, Shell, shell
from lowbit.report.words import size_words

ORDER = 10
COLUMNS = ["weights", ">accuracy", ">bits per weight", ">bytes on disk", ">smaller", ">images/s"]


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed networks and the report.")] = Path(
        "lowbit-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order of images.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller network, fewer epochs: seconds.")] = False,
    as_json: Json = False,
) -> None:
    sh = shell()
    sh.hint_on_interrupt = "Nothing is lost: type lowbit demo again."
    from lowbit.demo import run_demo
    from lowbit.report.demo_page import write_demo_report

    with DemoProgress(sh) as progress:
        result = run_demo(out, seed, quick, progress)
    result["report"] = str(write_demo_report(out, result))
    _show(sh, result)
    sh.result(result)


class DemoProgress:
    """A bar that names the network in training at a terminal; a line for each finished one elsewhere."""

    def __init__(self, sh: Shell):
        self.shell = sh
        self._context: Any = None
        self._step: Any = None

    def __enter__(self) -> "DemoProgress":
        self._context = self.shell.progress("")
        self._step = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._step(event["done"], event["total"], f"training, {event['what']} weights")
        elif event["event"] == "row" and not self.shell.rich:
            self.shell.say(f"{event['name']:<8} trained and measured: {100 * event['accuracy']:.1f} % right")
        elif event["event"] == "float" and not self.shell.rich:
            self.shell.say(f"Training a network of {event['weights']:,} weights on handwritten digits.")


def _show(sh: Shell, r: dict[str, Any]) -> None:
    base = r["float"]
    rows = [
        (
            v["name"], f"{100 * v['accuracy']:.1f} %", f"{v['bits_per_weight']:.2f}", f"{v['bytes']:,}",
            f"{base['bytes'] / v['bytes']:.1f}x", f"{v['images_per_second']:,.0f}",
        )
        for v in (base, *r["rows"])
    ]  # fmt: skip
    sh.say()
    sh.table(COLUMNS, rows)
    for line in _small_print(r):
        sh.say(line)
    sh.say()
    sh.say(f"Report: {r['report']}", "bold")
    sh.say()
    sh.say("Next, with a language model (a .gguf file, a folder, or a Hugging Face name) and any text file:")
    sh.say("  lowbit compress MODEL -o out --method gptq --bits 4 --group 64 --data text.txt")
    sh.say("  lowbit eval out --text other.txt --against MODEL")
    sh.say('  lowbit generate out --prompt "The capital of France is"')
    sh.say('Or with a network of your own, in Python: lowbit.prepare(net, "ternary"), train, lowbit.pack(net).')


def _small_print(r: dict[str, Any]) -> tuple[str, ...]:
    """What the figures mean."""
    worst = max(v["logit_difference"] for v in r["rows"])
    return (
        f"{r['test_images']} test images, never trained on; one is {100 / r['test_images']:.1f} points. One thread.",
        "Bits per weight are those of the compressed layers, scales included; bytes are whole files.",
        "Every row was read back from its file and ran from packed bits; its logits agree with those of the",
        f"trained network within {worst:.0e}. The first convolution, the last layer and the normalizations",
        f"({size_words(r['kept_bytes'])}) keep 32 bits. Everything took {r['seconds']:.0f} s.",
    )
