"""Every kernel row against the scalar row in a C++ program of its own: for this machine, and for 64-bit ARM (NEON, with
and without dot products) built by a cross compiler and run under user-mode emulation."""

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


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    def built(compiler: str, *flags: str) -> Path:
        sources = [p for p in sorted((ROOT / "csrc").glob("*.cpp")) if not p.name.startswith("binding")]
        out = tmp_path_factory.mktemp("native") / "check_rows"
        args = ["-std=c++17", "-O1", "-ffp-contract=off", *flags]
        done = subprocess.run(
            [compiler, *args, f"-I{ROOT / 'csrc'}", *map(str, [*sources, DRIVER]), "-o", str(out), "-lpthread"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    return built


def check(*command: "str | Path") -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rows_of_this_machine(build) -> None:
    need("c++")
    check(build("c++"), "scalar")


def test_rows_of_64_bit_arm(build) -> None:
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = build("aarch64-linux-gnu-g++", "-static")
    check("qemu-aarch64", "-cpu", "max", program, "dotprod", "neon", "scalar")
    check("qemu-aarch64", "-cpu", "cortex-a53", program, "neon", "scalar")  # a processor without SDOT
