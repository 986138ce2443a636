"""The rooms of the package know each other in one direction only, and the lower ones keep quiet.

formats <- estimators <- weights, activations, layers <- statistics <- solvers, allocate, ... <- recipe
<- sources, pipeline, evaluate, report <- api <- cli;  runtime knows formats only.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src" / "lowbit"

# A module may import from its own room and from rooms of a smaller number.
FLOOR = {
    "errors": 0,
    "_registry": 0,
    "_hook": 0,
    "_threads": 0,
    "formats": 1,
    "estimators": 2,
    "weights": 3,
    "activations": 3,
    "layers": 3,
    "statistics": 4,
    "allocate": 4,  # solvers allocate within a layer
}
FLOOR |= dict.fromkeys(("solvers", "prune", "factorize", "distill", "search", "integer", "training"), 5)
FLOOR |= {
    "recipe": 6,
    "diagnose": 6,
    "sources": 7,
    "pipeline": 7,
    "evaluate": 7,
    "report": 7,
    "export": 7,
    "api": 8,
    "integrations": 9,
    "train": 9,
    "demo": 9,
    "bench": 9,
    "cli": 10,
}
RUNTIME_FLOOR = 6  # it reads artifacts and streams text, so the rules for quiet rooms are not for it
RUNTIME_MAY = {"errors", "formats", "runtime", "_kernels", "_threads"}
# rooms that may use the runtime, which stands beside the ladder
MAY_USE_RUNTIME = {
    "training",
    "train",
    "bench",
    "demo",
    "sources",
    "pipeline",
    "evaluate",
    "report",
    "export",
    "api",
    "cli",
}
# same floor, and allowed to look sideways: the pipeline reads sources, the report shows evaluations
SIDEWAYS = {
    "pipeline": {"sources", "evaluate"},
    "evaluate": {"sources"},
    "export": {"sources"},
    "report": set(),
    "bench": {"train"},
    "sources": set(),
}


def room_of(path: Path) -> str:
    """`formats` for formats/levels.py, `api` for api.py, `` for the package's own __init__.py."""
    first = path.relative_to(SRC).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


FILES = sorted(SRC.rglob("*.py"))


def each(*, floor_below: int = 99, front_door: bool = False) -> Callable:
    """A rule for every file of the rooms that lie below a floor; what is wrong with each is told at once."""
    chosen = [f for f in FILES if front_door or room_of(f) in {"runtime", *FLOOR}]
    chosen = [f for f in chosen if FLOOR.get(room_of(f), RUNTIME_FLOOR) < floor_below]

    def decorate(rule: Callable[[Path], Iterator[str]]) -> Callable[[], None]:
        @wraps(rule)
        def test() -> None:
            assert len(chosen) > 20, "the files of the package are not where this test looks"
            assert [f"{f.relative_to(SRC)}{wrong}" for f in chosen for wrong in rule(f)] == []

        del test.__wrapped__  # pytest reads the signature of what is wrapped
        return test

    return decorate


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands; relative ones are made absolute."""
    package = ("lowbit", *path.relative_to(SRC).with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield node.lineno, module
            if module == "lowbit":  # `from lowbit import formats`
                yield from ((node.lineno, f"lowbit.{alias.name}") for alias in node.names)


def allowed(room: str, target: str) -> bool:
    if room in ("", target) or FLOOR.get(target) == 0:
        return True
    if room == "runtime":
        return target in RUNTIME_MAY
    if target == "_kernels":
        return room in {"formats", "solvers"} or room in MAY_USE_RUNTIME
    if target == "runtime":
        return room in MAY_USE_RUNTIME
    if target in SIDEWAYS.get(room, set()):
        return True
    return target in FLOOR and FLOOR[target] < FLOOR[room]


@each(front_door=True)
def test_every_file_lies_in_a_known_room(path: Path) -> Iterator[str]:
    if not (room_of(path) in {"", "runtime", "__main__", *FLOOR} or path.name.startswith("_")):
        yield f": a new room; give it a floor in {Path(__file__).name}"


@each()
def test_imports_go_down_only(path: Path) -> Iterator[str]:
    room = room_of(path)
    for line, module in imported(tree_of(path), path):
        top, _, rest = module.partition(".")
        if top == "lowbit" and rest:
            target = rest.split(".")[0]
            if target.startswith("__"):
                continue  # lowbit.__version__
            if not allowed(room, target):
                yield f":{line}: {room} may not import {module}"


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call whose callee is a plain name or attribute chain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


@each(front_door=True)
def test_no_unpickling(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    for line, module in imported(tree, path):
        if module.split(".")[0] in pickles:
            yield f":{line}: imports {module}"
    for line, name in calls(tree):
        if name in {"torch.load", "torch.jit.load", "np.load", "numpy.load", "eval", "exec", "yaml.load"}:
            yield f":{line}: calls {name}"


@each(floor_below=FLOOR["recipe"])
def test_lower_rooms_do_not_print_or_read_files(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    loud = {
        "print",
        "input",
        "open",
        "logging.getLogger",
        "logging.info",
        "Path.open",
        "torch.save",
        "torch.set_num_threads",
    }
    for line, name in calls(tree):
        ends = name.rsplit(".", 1)[-1]
        if room_of(path) == "_threads" and name == "torch.set_num_threads":
            continue  # one_thread() gives them back
        if name in loud or ends in {"read_text", "write_text", "read_bytes", "write_bytes"}:
            yield f":{line}: calls {name}"
    for line, module in imported(tree, path):
        if module.split(".")[0] in {"rich", "tqdm", "typer", "logging"}:
            yield f":{line}: imports {module}; take a progress callback instead"


@each(front_door=True)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> Iterator[str]:
    """`import lowbit` and `lowbit --help` stay quick."""
    heavy = {
        "transformers",
        "sklearn",
        "jinja2",
        "pyarrow",
        "datasets",
        "gguf",
        "sentencepiece",
        "scipy",
        "onnx",
        "onnxruntime",
        "llama_cpp",
    }
    if room_of(path) not in {"cli", ""}:
        heavy |= {"typer", "rich"}
    if room_of(path) == "integrations":  # each file there is imported with the library it is for, when it is asked for
        heavy.discard("transformers")
    for node in tree_of(path).body:  # the module's own level only
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, module in imported(ast.Module([node], []), path):
                if module.split(".")[0] in heavy:
                    yield f":{line}: imports {module} at the top"


def test_import_lowbit_does_not_import_torch() -> None:
    code = "import sys, lowbit; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"import lowbit also imports {done.stdout.strip()}"
