"""docs/json.md names the keys that each command's --json really prints: no more, no fewer.

One tiny random model goes through all commands in order, each in a process-wide runner but with its own standard
output.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from tests.sources import tiny_models as tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "json.md"
ROW = re.compile(r"^\| (`[^|]*`) \|", flags=re.MULTILINE)


def documented(command: str) -> set[str]:
    """The keys in the first column of the table under `## command`."""
    section = re.split(rf"^## {command}$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1].split("\n## ")[0]
    return {key for cell in ROW.findall(section) for key in re.findall(r"`(\w+)`", cell)}


def run(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, f"{' '.join(words)}: {done.stderr or done.exception}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command printed."""
    where = tmp_path_factory.mktemp("json")
    folder, out, text = str(where / "model"), str(where / "out"), str(where / "words.txt")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    Path(text).write_text(" ".join(f"w{3 + i * 7 % 60}" for i in range(400)) + "\n", "utf-8")
    data = ("--data", text, "--windows", "2", "--context", "16")
    return {
        "compress": run("compress", folder, "-o", out, "--bits", "4", "--group", "16", *data),
        "eval": run("eval", out, "--text", text, "--context", "16", "--windows", "3", "--against", folder),
        "generate": run("generate", out, "--prompt", "w5 w6", "--max-tokens", "3"),
        "inspect": run("inspect", out),
        "methods": run("methods"),
        "report": run("report", out),
        "bench": run("bench", "kernels", "--shape", "1x64x32", "--group", "32", "--format", "uint4", "--seconds", "0"),
        "doctor": run("doctor"),
    }


@pytest.mark.parametrize("command", ["compress", "eval", "generate", "inspect", "methods", "report", "bench", "doctor"])
def test_the_page_names_the_keys(command: str, printed: dict[str, dict[str, Any]]) -> None:
    assert documented(command) == set(printed[command])


@pytest.mark.parametrize("command", ["compress", "inspect", "methods", "doctor"])
def test_the_page_names_the_keys_of_rows(command: str, printed: dict[str, dict[str, Any]]) -> None:
    rows = "layers" if command in ("compress", "inspect") else "methods" if command == "methods" else "rows"
    section = PAGE.read_text("utf-8").split(f"\n## {command}\n")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| `{rows}`"))
    keys = {key for row in printed[command][rows] for key in row}
    assert keys <= set(re.findall(r"`(\w+)`", line)), f"docs/json.md, {command}, {rows}"


def test_the_page_names_the_keys_of_bench_rows(printed: dict[str, dict[str, Any]]) -> None:
    section = PAGE.read_text("utf-8").split("\n## bench\n")[1].split("\n## ")[0]
    row = section.split("A row of `kernels`: ")[1].split("\n\n")[0]
    assert set(printed["bench"]["rows"][0]) <= set(re.findall(r"`(\w+)`", row))
    assert set(printed["bench"]["machine"][0]) <= set(re.findall(r"`(\w+)`", section))


@pytest.mark.slow
def test_the_page_names_the_keys_of_the_demo(tmp_path: Path) -> None:
    printed = run("demo", "--quick", "-o", str(tmp_path / "demo"))
    assert documented("demo") == set(printed)
    row = PAGE.read_text("utf-8").split("\nA row: ")[1].split("\n## ")[0]
    assert {key for r in (printed["float"], *printed["rows"]) for key in r} == {*re.findall(r"`(\w+)`", row), "weights"}
