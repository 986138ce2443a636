"""Check this machine: CPU, kernels in use, the self-check of every kernel row, versions, and what speed to expect.

The speeds are a quick measurement of a 2048 x 2048 layer beside torch in float32 (`lowbit bench kernels` is the long
one); --no-speed leaves them out. Exit code 1 if a kernel row computes something else than the scalar row.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, Shell, shell
from lowbit.errors import KernelError

ORDER = 80
SHAPES = ((1, 2048, 2048), (32, 2048, 2048))  # one token, and a prompt
PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "gguf",
    "scikit-learn",
    "datasets",
    "pyarrow",
)


def run(
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not measure the formats' speed.")] = False,
    as_json: Json = False,
) -> None:
    import torch

    import lowbit
    from lowbit.report.words import size_words
    from lowbit.runtime import kernels

    sh = shell()
    rows = kernels.rows()
    failed = [r for r in rows if r["selfcheck"] == "failed"]
    cpu, memory = cpu_name(), _memory()
    threads, forced = torch.get_num_threads(), os.environ.get("LOWBIT_ISA") or None
    versions = {"lowbit": lowbit.__version__, "python": platform.python_version(), **_versions()}
    sh.say(
        f"{cpu}, {os.cpu_count()} cores, torch uses {threads} threads, {size_words(memory)} of memory, "
        f"{platform.system()} {platform.machine()}"
    )
    sh.say("  ".join(f"{name} {v or '(not installed)'}" for name, v in versions.items()))
    sh.table(
        ["operation", "format", "row", "runs", "self-check"],
        [(r["op"], r["format"], r["isa"], "yes" if r["active"] else "", r["selfcheck"]) for r in rows],
    )
    if any(r["selfcheck"] == "not supported" for r in rows):
        sh.say("not supported: this processor cannot run that row, so it is not used here.")
    if forced:
        sh.say(f"LOWBIT_ISA={forced} forces these rows; unset it for the best ones.")
    speed = [] if no_speed or failed else expected_speed(sh)
    sh.result(
        {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_bytes": memory,
            "forced_isa": forced,
            "versions": versions,
            "rows": rows,
            "speed": speed,
            "ok": not failed,
        }
    )
    if failed:
        names = ", ".join(sorted({f"{r['op']}/{r['format']}/{r['isa']}" for r in failed}))
        text = (
            f"{names}: wrong results on this machine. Set LOWBIT_ISA=scalar to go on without it, and report it, please."
        )
        if sh.as_json:  # the object above is the one object
            print(f"lowbit: {text}", file=sys.stderr)
            raise typer.Exit(1)
        raise KernelError(text)
    sh.say("All is well.", "bold green")


def expected_speed(sh: Shell) -> list[dict[str, Any]]:
    """Rows of the formats' speed-ups over torch's float32 layer, measured in seconds; shown to people as a table."""
    from lowbit.bench.kernels import bench_kernels

    threads = torch_threads()
    sh.say(f"Speed of a packed 2048 x 2048 layer over torch's float32 layer, {threads} threads:")
    with sh.progress("speed") as step:
        found = bench_kernels(SHAPES, thread_counts=[threads], buffers=["rotating"], seconds=0.03, progress=step)
    table: dict[tuple[str, int], dict[str, Any]] = {}
    for r in found["rows"]:
        row = table.setdefault((r["format"], r["m"]), {"format": r["format"], "bits": r["bits"], "tokens": r["m"]})
        row[f"{r['activations']}_speedup"] = r["speedup"]
    rows = sorted(table.values(), key=lambda r: r["tokens"])
    sh.table(
        ["format", ">bits per weight", ">tokens", ">int8 activations", ">float activations"],
        [
            (r["format"], f"{r['bits']:.2f}", r["tokens"], f"{r['int8_speedup']:.1f}x", f"{r['float_speedup']:.1f}x")
            for r in rows
        ],
    )
    return rows


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith(("model name", "Model"))]
    except OSError:
        names = []
    return (names or [platform.processor() or platform.machine()])[0]


def _memory() -> "int | None":
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def _versions() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            table[name] = version(name)
        except PackageNotFoundError:
            table[name] = None
    return table
