"""What the README and the guide say is true: snippets run, commands and options exist, links lead somewhere.

Every fenced block marked `python` is run, the blocks of one page one after the other in one namespace and in an empty
folder. A block that needs something a test cannot have (a large model, a long training) is marked `python no-run`, and
must at least compile. In blocks marked `sh`, every `lowbit` command with its options and every `make` target must
exist.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


class Block(NamedTuple):
    language: str
    marks: tuple[str, ...]
    line: int  # of the first line of code
    code: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced code blocks of a page."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not (fence := re.match(r"\s*```(\S*)(.*)$", line)):
            continue
        code = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            code.append(inner)
        else:
            raise AssertionError(f"line {number}: a code block that never ends")
        yield Block(fence[1], tuple(fence[2].split()), number + 1, "\n".join(code))


def prose(text: str) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The link targets that a page's headings make."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@each_page
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text("utf-8")):
        if block.language != "python":
            continue
        # the padding makes a traceback name the line of the page
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if "no-run" not in block.marks:
            exec(code, namespace)


@each_page
def test_blocks_are_marked_with_what_they_are(page: Path) -> None:
    known = {"python", "sh", "text", "json", "yaml", "cpp", "toml"}
    for block in blocks(page.read_text("utf-8")):
        assert block.language in known, f"line {block.line - 1}: mark the block with one of {sorted(known)}"
        assert set(block.marks) <= {"no-run"}, f"line {block.line - 1}: unknown mark {block.marks}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no {file}"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has the headings {sorted(anchors(file))}"


def test_every_page_of_the_guide_is_reached_from_its_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "index.md" and f"({p.name})" not in index]
    assert not missing, f"docs/index.md has no link to {missing}"


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The commands of a page's `sh` blocks as words; continued lines joined, comments and pipes cut off."""
    for block in blocks(page.read_text("utf-8")):
        if block.language == "sh" and "no-run" not in block.marks:
            for line in block.code.replace("\\\n", " ").splitlines():
                for command in re.split(r"\s(?:&&|\|)\s", line.removeprefix("$ ")):
                    if words := shlex.split(command, comments=True):
                        yield [w for w in words if not re.match(r"^[A-Z_]+=", w)]


@each_page
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for words in shell_lines(page):
        if words[:1] == ["make"]:
            assert set(words[1:]) <= known, f"`{' '.join(words)}`: the Makefile has {sorted(known)}"


@each_page
def test_lowbit_commands_and_options_exist(page: Path) -> None:
    import typer.main

    from lowbit.cli import app

    group = typer.main.get_command(app)
    for words in shell_lines(page):
        if words[:1] != ["lowbit"]:
            continue
        command, rest = group, words[1:]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"`{' '.join(words)}`: no command {rest[0]!r}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in rest:
            if re.match(r"^--?[a-z]", word):
                assert word.split("=")[0] in known, f"`{' '.join(words)}`: no option {word}; there are {sorted(known)}"
