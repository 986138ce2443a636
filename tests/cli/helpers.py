"""Running commands in this process, each with standard output and error of its own."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lowbit.cli import app

RUNNER = CliRunner()


def run(*words: object) -> Any:
    """exit_code, stdout, stderr."""
    return RUNNER.invoke(app, [str(w) for w in words])


def run_json(*words: object) -> dict[str, Any]:
    """The one object on standard output."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.stderr or done.exception
    return json.loads(done.stdout)


def refused(*words: object, code: int = 1) -> str:
    """The message of a command that must fail: one line, no traceback."""
    done = run(*words)
    assert done.exit_code == code, f"exit code {done.exit_code}: {done.stdout}{done.stderr}{done.exception!r}"
    said = [line for line in done.stderr.splitlines() if line.startswith("lowbit: ")] if code == 1 else [done.stderr]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    return " ".join(said[0].replace("│", " ").split())


def words(path: Path, n: int = 600) -> Path:
    """A text of n tokens of the tiny tokenizer, twelve a line."""
    tokens = [f"w{3 + i * 7 % 60}" for i in range(n)]
    path.write_text("".join(" ".join(tokens[i : i + 12]) + "\n" for i in range(0, n, 12)), "utf-8")
    return path
