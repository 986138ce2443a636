"""The rows of 64-bit ARM (NEON, with and without dot products) against the scalar row, in a C++ program of its own:
built by a cross compiler and run under user-mode emulation. `make sanitize` runs the same program on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests/kernels/native/check_rows.cpp"

pytestmark = pytest.mark.slow


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (on Debian: apt install g++-aarch64-linux-gnu qemu-user)")


def build(compiler: str, out: Path, *flags: str) -> None:
    sources = [p for p in sorted((ROOT / "csrc").glob("*.cpp")) if not p.name.startswith("binding")]
    args = ["-std=c++17", "-O1", "-ffp-contract=off", *flags, f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, *args, *map(str, [*sources, DRIVER]), "-o", str(out), "-lpthread"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def check(*command: "str | Path") -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rows_of_64_bit_arm(tmp_path: Path) -> None:
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = tmp_path / "check_rows"
    build("aarch64-linux-gnu-g++", program, "-static")
    check("qemu-aarch64", "-cpu", "max", program, "dotprod", "neon", "scalar", "sparse:neon")
    check("qemu-aarch64", "-cpu", "cortex-a53", program, "neon", "scalar")  # a processor without SDOT
