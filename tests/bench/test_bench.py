"""The benchmarks run on tiny shapes, and their figures follow from one another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowbit.bench import machine, rivals
from lowbit.bench.baseline import compare_rows, moved
from lowbit.bench.conv import ConvShape, bench_conv
from lowbit.bench.decode import bench_decode
from lowbit.bench.kernels import Shape, bench_kernels
from lowbit.bench.timing import medians, threads
from lowbit.cli import app
from lowbit.errors import FormatError, RecipeError
from lowbit.runtime import kernels
from tests.runtime.tiny_models import packed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here measures anything: buffers of kilobytes, hardly any time."""
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "PEAK_STEPS", 1000)
    monkeypatch.setattr("lowbit.bench.kernels.cache_bytes", lambda: 1 << 14)


def test_medians_take_turns_and_call_every_buffer() -> None:
    seen: list[str] = []
    calls = {name: [lambda n=name, i=i: seen.append(f"{n}{i}") for i in range(3)] for name in "ab"}
    got = medians(calls, 0.0)
    assert set(got) == {"a", "b"} and all(ms >= 0 for ms in got.values())
    assert set(seen) == {"a0", "a1", "a2", "b0", "b1", "b2"}
    assert "".join(s[0] for s in seen) == "aabb" * 4  # a warm-up and three rounds


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_the_peak_counts_its_products() -> None:
    with threads(1):
        one = kernels.int8_peak(10)
        assert one >= 80 and one == 10 * kernels.int8_peak(1)
    with threads(2):
        assert kernels.int8_peak(10) == 2 * one


def test_rows_of_kernels() -> None:
    found = bench_kernels([Shape(3, 64, 48)], ["uint4", "ternary"], (), [1, 2], 32, seconds=0.0)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 and len(found["machine"]) == 2
    for r in rows:
        assert r["speedup"] == pytest.approx(r["torch_ms"] / r["ms"])
        assert r["gmacs_per_second"] == pytest.approx(r["m"] * r["k"] * r["n"] / r["ms"] / 1e6)
        assert r["fraction_of_copy"] > 0 and r["bytes"] > r["n"] * r["k"] * 2 // 8 + 4 * r["m"] * (r["k"] + r["n"])
        assert (r["op"], r["format"].split("-")[0]) in {
            (o, f) for o in ("linear_int8", "linear_float") for f in ("uint4", "ternary")
        }
    with pytest.raises(RecipeError, match="'2048x2048' is not a shape. Write tokens x inputs x outputs"):
        Shape.parse("2048x2048")
    with pytest.raises(FormatError):
        bench_kernels([Shape(1, 32, 8)], ["uint44"], seconds=0.0)


def test_rows_of_exceptions_and_of_signs() -> None:
    shape = Shape(1, 64, 48)
    rows = bench_kernels([shape], ["uint2+6.5%", "uint2"], [shape], group=32, buffers=["resident"], seconds=0.0)["rows"]
    by = {(r["format"], r["activations"]): r for r in rows}
    assert len(by) == len(rows) == 5
    for how in ("int8", "float"):
        dense, more = by["uint2-g32", how], by["uint2-g32+6.5%", how]
        assert more["times_dense"] == pytest.approx(more["ms"] / dense["ms"]) and dense["times_dense"] is None
        assert more["bits"] > dense["bits"] and more["bytes"] > dense["bytes"]
    signs = by["signs", "sign"]
    assert signs["op"] == "binary_linear" and signs["bits"] == 1 and signs["fraction_of_peak"] is None
    assert signs["speedup"] == pytest.approx(signs["torch_ms"] / signs["ms"])
    for text in ("uint2+", "uint2+x", "uint2+60%"):
        with pytest.raises(RecipeError, match="Write for example"):
            bench_kernels([shape], [text], seconds=0.0)


def test_rows_of_convolutions() -> None:
    shapes = [ConvShape.parse("8x6x5x4"), ConvShape.parse("8x5x5x8x1x8")]
    rows = bench_conv(shapes, ["binary", "int4"], [1], 2, seconds=0.0)["rows"]
    assert [(r["format"], r["activations"]) for r in rows] == 2 * [
        ("binary-channel", "sign"), ("int4-channel", "int8"), ("int4-channel", "levels")
    ]  # fmt: skip
    for r in rows:
        assert r["speedup"] == pytest.approx(r["torch_ms"] / r["ms"])
        assert r["gmacs_per_second"] == pytest.approx(r["m"] * r["k"] * r["n"] / r["ms"] / 1e6)
    assert (rows[0]["m"], rows[0]["k"], rows[0]["n"]) == (60, 72, 4) and rows[-1]["k"] == 1
    for text in ("64x56x56", "8x4x4x8x3x3", "axbxcxd"):
        with pytest.raises(RecipeError, match="for example 64x56x56x64"):
            ConvShape.parse(text)
    with pytest.raises(RecipeError, match="uint4 has no int8 convolution"):
        bench_conv(shapes, ["uint4"], seconds=0.0)


def test_bench_conv_on_the_command_line(tmp_path: Path) -> None:
    command = ["bench", "conv", "--shape", "4x5x5x4", "--format", "ternary", "--seconds", "0", "--threads", "1"]
    saved = str(tmp_path / "rows.json")
    assert CliRunner().invoke(app, [*command, "--save", saved]).exit_code == 0
    done = CliRunner().invoke(app, [*command, "--against", saved, "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["what"] == "conv" and len(found["moved"]) == len(found["rows"]) == 2


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_rows_of_decode(name: str) -> None:
    model = packed(name)
    found = bench_decode(model, packed(name), thread_counts=[1], prompt=8, tokens=4, kv_bits=[32, 8])
    native = [r for r in found["rows"] if r["what"] == "native"]
    assert len(native) == (4 if name == "llama" else 0)
    assert [r["what"] for r in found["rows"]].count("module") == 2
    assert found["rows"][-1]["what"] == "transformers"
    for r in found["rows"]:
        assert r["decode_tokens_per_second"] == pytest.approx(1000 / r["ms"])
        assert r["prefill_tokens_per_second"] > 0 and r["decode_against_llama_cpp"] is None


def test_what_moved() -> None:
    row = {"op": "linear_int8", "format": "uint4-g32", "isa": "avx2", "threads": 1, "m": 1, "k": 2, "n": 3, "ms": 2.0}
    before = [row | {"ms": 3.0}, row | {"m": 2, "ms": 2.1}, row | {"m": 3, "ms": 1.0}]
    got = compare_rows([row, row | {"m": 2}, row | {"m": 3}, row | {"m": 4}], before)
    assert [moved(e) for e in got] == ["faster", "same", "slower", "new"]
    assert (got[0]["ratio"], got[3]["ratio"]) == (1.5, None)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


def test_the_command_saves_and_compares(tmp_path: Path) -> None:
    file = str(tmp_path / "rows.json")
    small = ("--shape", "1x64x32", "--format", "uint4", "--group", "32", "--threads", "1", "--seconds", "0")
    done = run("kernels", *small, "--save", file, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path(file).read_text("utf-8"))["rows"] == json.loads(done.stdout)["rows"]
    again = run("kernels", *small, "--against", file)
    assert again.exit_code == 0 and "rows moved by more than 10 %" in again.stdout
    assert "uint4-g32" in again.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("decode",), "needs a compressed model"),
        (("kernels", "--shape", "12"), "is not a shape"),
        (("kernels", "--buffers", "cold"), "Use rotating or resident"),
        (("kernels", "--activations", "int4"), "Use int8 or float"),
        (("decode", "--model", "x", "--gguf", "missing.gguf"), "missing.gguf is no file"),
        (("kernels", "--shape", "1x32x8", "--format", "uint4", "--group", "32", "--against", "no"), "does not hold"),
    ],
)
def test_messages(words: "tuple[str, ...]", says: str) -> None:
    done = run(*words)
    assert done.exit_code == 1 and says in done.stderr


def test_an_unknown_bench_is_a_command_typed_wrongly() -> None:
    done = run("everything")
    assert done.exit_code == 2 and "No such command" in done.stderr


def test_onnx_runtime_computes_the_same_product() -> None:
    if not (rivals.installed("onnxruntime") and rivals.installed("onnx")):
        pytest.skip("onnxruntime and onnx are not installed")
    x, w = torch.randn(2, 64), torch.randn(16, 64)
    (call,) = rivals.onnxruntime_calls(x, w, 8, 32, 1, 1)
    assert torch.allclose(torch.from_numpy(call()[0]), x @ w.T, atol=0.1)
