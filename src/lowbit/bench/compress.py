"""Compare ways to compress one model: a row for each method and width, compressed and measured by the command line.

    python -m lowbit.bench.compress model.gguf --data valid.txt --out table/ --rows 'gptq-*,icquant-*' --minutes 60
    python -m lowbit.bench.compress --out table/ --show                 the table and table/frontier.svg again

The first half of the text calibrates, the second half measures (--windows of 512 tokens); --text adds another text.
Finished rows are kept in table/rows.jsonl: type the same command again to go on. A row that fails is kept with its
error. Bits are counted over the blocks' layers; bytes are those of the tensors in the file. Decode speed is that of
one thread after a prompt of 64 tokens, with int8 inputs, the best of the turns of `lowbit bench decode`.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lowbit.bench.compress_rows import Row, rows
from lowbit.bench.frontier import frontier_svg
from lowbit.errors import LowbitError, RecipeError, near_names


def main(arguments: "list[str] | None" = None) -> int:
    """Entry point; returns the exit code: 0 all rows there, 3 time was up, 1 an error in one sentence."""
    args = _parser().parse_args(arguments)
    try:
        return _run(args)
    except LowbitError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    chosen = select(args.rows)
    if not args.show and (args.model is None or args.data is None):
        raise RecipeError("give a model and --data TEXT, or --show for the rows that are there.")
    args.out.mkdir(parents=True, exist_ok=True)
    kept, end = args.out / "rows.jsonl", time.monotonic() + 60 * args.minutes
    done = {r["name"] for r in read(kept) if r.get("error") is None}
    whole = True
    for name, recipe in {} if args.show else chosen.items():
        if name in done:
            continue
        if time.monotonic() > end:
            whole = False
            break
        found = {"name": name, "recipe": recipe, **measured(args, recipe)}
        with kept.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(line(found), flush=True)
    found_rows = [r for r in read(kept) if r["name"] in chosen]
    (args.out / "table.md").write_text("\n".join([HEADER, *map(line, found_rows)]) + "\n")
    (args.out / "frontier.svg").write_text(frontier_svg(found_rows))
    return 0 if whole else 3


def select(names: str) -> dict[str, Row]:
    """Rows by name; comma-separated, * stands for anything; empty for all."""
    table = rows()
    chosen: dict[str, Row] = {}
    for wanted in [n for n in names.split(",") if n] or ["*"]:
        found = {n: r for n, r in table.items() if fnmatchcase(n, wanted)}
        if not found:
            raise RecipeError(f"unknown row {wanted!r}. {near_names(wanted, tuple(table))}")
        chosen |= found
    return chosen


def read(path: Path) -> list[dict[str, Any]]:
    """The last line of each row."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return list({r["name"]: r for r in map(json.loads, lines)}.values())


# -- one row


def measured(args: argparse.Namespace, recipe: Row) -> dict[str, Any]:
    """Compress and evaluate; {"error": ...} where either fails."""
    import yaml

    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    goal = recipe.get("goal", {})
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    half = f"{args.data}[:50%]"
    try:
        how = [w for k, v in goal.items() for w in (f"--{k.replace('_', '-')}", v)]
        how = how or ["--recipe", work / "recipe.yaml"]
        made = _lowbit("compress", args.model, "-o", work / "out", *how, "--data", half)
        found = {k: made[k] for k in ("bytes", "seconds", "peak_memory_bytes")}
        found |= {"bits": made["bits_per_weight"] or 32.0, "bits_file": made["bits_per_weight_file"], "error": None}
        for key, text in (("ppl", f"{args.data}[50%:]"), *([("ppl_extra", args.text)] if args.text else [])):
            result = _lowbit("eval", work / "out", "--text", text, "--windows", args.windows)
            found |= {key: result["perplexity"], f"{key}_tokens_per_second": result["tokens_per_second"]}
        return found | {"decode_tokens_per_second": _decode_speed(work / "out")}
    except subprocess.CalledProcessError as e:
        return {"error": (e.stderr or e.stdout).strip().splitlines()[-1][:300]}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode_speed(folder: Path) -> "float | None":
    """Tokens a second; None for what `bench decode` does not run (a model in float)."""
    words = ("--threads", 1, "--prompt-tokens", 64, "--max-tokens", 32, "--activations", "int8")
    try:
        rows = _lowbit("bench", "decode", "--model", folder, *words)["rows"]
    except subprocess.CalledProcessError:
        return None
    return max(r["decode_tokens_per_second"] for r in rows)


def _lowbit(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return json.loads(done.stdout)


# -- what is shown

NAMES = ("row", "bits", "file, bits", "MB", "perplexity", "other text", "s", "peak GB", "tokens/s")
HEADER = f"| {' | '.join(NAMES)} |\n{'|---' * len(NAMES)}|"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row.get("error"):
        return f"| {row['name']} | failed: {row['error']} |{' |' * (len(NAMES) - 2)}"
    other, seconds, peak = row.get("ppl_extra"), row.get("seconds"), row.get("peak_memory_bytes")
    cells = [f"{row['bits']:.3f}", f"{row['bits_file']:.3f}", f"{row['bytes'] / 1e6:.1f}", number(row["ppl"])]
    cells += [number(other), f"{seconds:.0f}" if seconds else "", f"{peak / 1e9:.2f}" if peak else ""]
    cells.append(f"{row['decode_tokens_per_second']:.0f}" if row.get("decode_tokens_per_second") else "")
    return f"| {row['name']} | " + " | ".join(cells) + " |"


def number(x: "float | None") -> str:
    """Four figures; powers of ten where perplexities say only that a model is broken."""
    return "" if x is None else f"{x:.2f}" if x < 1000 else f"{x:.1e}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", help="text; its first half calibrates, its second half measures")
    parser.add_argument("--text", help="another text to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default="", help="names, comma-separated; * stands for anything")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--show", action="store_true", help="table and plot of the rows that are there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
