"""The command line. One file a command; the folder is the table.

A command file has a docstring (its first line is the short help), `ORDER` (its place in the list) and `run`, a typer
function, or `COMMANDS`, several by name. Nothing here imports torch or transformers before a command needs it, so that
`lowbit --help` answers at once.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from lowbit.cli._shell import guarded

HELP = """Neural networks at 1 to 8 bits per weight: compress, measure, run.

**Start here** (no download, no GPU, about a minute):

    lowbit demo

**Then, with a language model** (a .gguf file, a folder, or a Hugging Face name):

    lowbit compress MODEL -o OUT --bits 4 --data TEXT
    lowbit eval OUT --text OTHER_TEXT
    lowbit generate OUT --prompt "Hello"
    lowbit report OUT
"""


def build() -> typer.Typer:
    """The typer application with every command of this folder."""
    cli = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    cli.callback()(start)
    for name, module in sorted(commands().items(), key=lambda item: item[1].ORDER):
        text = module.__doc__.strip()
        if hasattr(module, "COMMANDS"):
            cli.add_typer(_group(module.COMMANDS), name=name, help=text, short_help=text.splitlines()[0])
        else:
            cli.command(name, help=text, short_help=text.splitlines()[0])(guarded(module.run))
    return cli


def _group(functions: dict[str, Any]) -> typer.Typer:
    """Commands under one name, `lowbit NAME COMMAND`."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    for name, run in functions.items():
        group.command(name)(guarded(run))
    return group


def commands() -> dict[str, Any]:
    """Command name -> its module."""
    names = sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))
    return {name: import_module(f"{__name__}.{name}") for name in names}


def main() -> None:
    """Entry point of `lowbit`."""
    app(prog_name="lowbit")


def _version(wanted: bool) -> None:
    if wanted:
        import lowbit

        print(f"lowbit {lowbit.__version__}")
        raise typer.Exit


def start(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command's name."""


start.__doc__ = HELP

app = build()
