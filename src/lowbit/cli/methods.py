"""List what there is: solvers, estimators and the rest, with their sources."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, shell
from lowbit.errors import RecipeError, near_names

ORDER = 60
ROOMS = (
    "solvers",
    "allocate",
    "prune",
    "factorize",
    "distill",
    "search",
    "integer",
    "estimators",
    "weights",
    "activations",
    "layers",
)


def run(
    kind: Annotated[str | None, typer.Option(help="Only this kind, e.g. solver.")] = None, as_json: Json = False
) -> None:
    sh = shell()
    rows = listed()
    kinds = sorted({r["kind"] for r in rows})
    if kind is not None and kind not in kinds:
        raise RecipeError(f"unknown kind {kind!r}. {near_names(kind, kinds)}")
    rows = [r for r in rows if kind in (None, r["kind"])]
    sh.table(["name", "kind", "what it is", "source"], [(r["name"], r["kind"], r["title"], r["source"]) for r in rows])
    sh.say("A method is chosen with `lowbit compress --method NAME`; what it lets you change, with `--set KEY=VALUE`.")
    sh.result({"methods": rows})


def listed() -> list[dict[str, Any]]:
    """One row for every file with a SPEC in the rooms that hold methods."""
    rows = []
    for package in rooms():
        for m in iter_modules(package.__path__):
            if not m.name.startswith("_"):
                module = f"{package.__name__}.{m.name}"
                spec = getattr(import_module(module), "SPEC", None)
                if spec is not None:
                    rows.append(_row(spec, module))
    return sorted(rows, key=lambda r: (r["kind"], r["name"]))


def rooms() -> list[Any]:
    """The packages that are there; rooms open when their first method arrives."""
    import lowbit

    there = {m.name for m in iter_modules(lowbit.__path__)}
    return [import_module(f"lowbit.{room}") for room in ROOMS if room in there]


def _row(spec: Any, module: str) -> dict[str, Any]:
    row = {"name": spec.name, "kind": spec.kind, "source": spec.source, "title": spec.title, "module": module}
    options = getattr(spec, "options", None)
    return row | ({"options": options} if options else {})
