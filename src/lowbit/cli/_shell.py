"""What every command shares: where output goes, how an error ends, what --json means.

    a person at a terminal   rich tables, live progress
    a pipe or a file         plain lines, no colours, no control characters
    --json                   one JSON object on standard output and nothing else; progress only where standard error
                             is a terminal

Exit codes: 0 all went well; 1 a LowbitError, one sentence on standard error (and {"error": ...} with --json); 2 a
command typed wrongly; 130 interrupted.
"""

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from lowbit.errors import LowbitError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class Shell:
    """One run of one command. `say`, `table` and `progress` speak to people; `result` ends a --json run."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.real_stdout = sys.stdout
        self.hint_on_interrupt = ""

    @property
    def stream(self) -> Any:
        """Where words for people go."""
        return sys.stderr if self.as_json else self.real_stdout

    @property
    def rich(self) -> bool:
        """True where a person watches."""
        return is_terminal(self.stream)

    @property
    def quiet(self) -> bool:
        """A --json run with nobody watching says nothing but its object."""
        return self.as_json and not self.rich

    def console(self) -> Any:
        from rich.console import Console

        return Console(file=self.stream, highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str = "", style: str = "") -> None:
        """A line for people. Styles only reach a terminal."""
        if self.as_json:
            return
        if self.rich:
            self.console().print(clean(text), style=style or None)
        else:
            print(clean(text), file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """A line on standard error: a hint beside the result."""
        if not self.quiet:
            print(clean(text), file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """Columns starting with '>' are numbers and stand to the right."""
        if self.as_json:
            return
        cells = [[clean(str(c)) for c in row] for row in rows]
        (self._rich_table if self.rich else self._plain_table)(columns, cells, title)

    def _rich_table(self, columns: Sequence[str], rows: list[list[str]], title: str) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, header_style="bold"
        )
        for c in columns:
            table.add_column(c.removeprefix(">"), justify="right" if c.startswith(">") else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console().print(table)

    def _plain_table(self, columns: Sequence[str], rows: list[list[str]], title: str) -> None:
        if title:
            self.say(title)
        head = [c.removeprefix(">") for c in columns]
        width = [max(map(len, column)) for column in zip(head, *rows)]
        for row in [head, *rows]:
            cells = [c.rjust(w) if name.startswith(">") else c.ljust(w) for c, w, name in zip(row, width, columns)]
            self.say("  ".join(cells).rstrip())

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[..., None]]:
        """`with shell.progress("windows") as step: step(done, total[, what])`: a bar for a person, else silence."""
        if not self.rich:
            yield lambda done, total, what="": None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        words = TextColumn("{task.description}", markup=False)
        with Progress(
            words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console(), transient=True
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, what=what: bar.update(task, completed=done, total=total, description=what)

    def result(self, values: dict[str, Any]) -> None:
        """The object of a --json run; nothing otherwise."""
        if self.as_json:
            print(json.dumps(jsonable(values), allow_nan=False), file=self.real_stdout, flush=True)


def guarded(run: Callable[..., Any]) -> Callable[..., None]:
    """A command whose errors are one sentence and an exit code; with --json, what libraries print goes to stderr."""

    @functools.wraps(run)
    def command(**options: Any) -> None:
        shell = Shell(bool(options.get("as_json")))
        _current.append(shell)
        try:
            with contextlib.redirect_stdout(sys.stderr) if shell.as_json else contextlib.nullcontext():
                run(**options)
        except LowbitError as e:
            raise typer.Exit(fail(shell, str(e), type(e).__name__)) from None
        except KeyboardInterrupt:
            raise typer.Exit(fail(shell, f"Stopped. {shell.hint_on_interrupt}".strip(), "Interrupted", 130)) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; no complaint at exit
            raise typer.Exit(1) from None
        except MemoryError:
            text = "out of memory. Close other programs, or give fewer --windows or a shorter --context."
            raise typer.Exit(fail(shell, text, "MemoryError")) from None
        except OSError as e:
            raise typer.Exit(fail(shell, _os_sentence(e), type(e).__name__)) from None
        finally:
            _current.pop()

    return command


_current: list[Shell] = []


def shell() -> Shell:
    """The shell of the command that runs."""
    return _current[-1] if _current else Shell()


def fail(shell: Shell, sentence: str, kind: str, code: int = 1) -> int:
    """Say what went wrong; with --json also as the object. Returns the exit code."""
    sentence = clean(" ".join(sentence.split()))
    print(f"lowbit: {sentence}", file=sys.stderr, flush=True)
    shell.result({"error": {"type": kind, "message": sentence}})
    return code


WRITABLE = " Give a place you may write to."


def _os_sentence(e: OSError) -> str:
    where = f"{e.filename}: " if e.filename else ""
    another = " Give another place with -o."
    full = {28: " Free some space, or give another -o."}
    fix = (dict.fromkeys((13, 30), WRITABLE) | dict.fromkeys((17, 20, 36), another) | full).get(e.errno or 0, "")
    return f"{where}{e.strerror or e}.{fix}"


def is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"


def clean(text: str) -> str:
    """Names come from files: control characters must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def jsonable(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null. Paths become strings."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
