"""Check this machine: CPU, kernels in use, the self-check of every kernel row, versions.

Exit code 1 if a kernel row computes something else than the scalar row.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from lowbit.cli._shell import Json, shell
from lowbit.errors import KernelError

ORDER = 80
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


def run(as_json: Json = False) -> None:
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
    if forced:
        sh.say(f"LOWBIT_ISA={forced} forces these rows; unset it for the best ones.")
    sh.result(
        {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_bytes": memory,
            "forced_isa": forced,
            "versions": versions,
            "rows": rows,
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
