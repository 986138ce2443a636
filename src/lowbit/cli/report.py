"""Write the report of a compressed model: one offline HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli._shell import Json, shell

ORDER = 70


def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    to: Annotated[Path | None, typer.Option("--to", help="Where to write; OUT/report.html if left out.")] = None,
    as_json: Json = False,
) -> None:
    from lowbit.report import write_report

    sh = shell()
    path = write_report(out, to)
    size = path.stat().st_size
    sh.say(f"Wrote {path} ({size / 1000:.0f} kB). Open it in any browser; it needs no network.")
    sh.result({"report": str(path), "bytes": size})
