"""Time the kernels or a model's generation beside what else one could use; compare ways to train.

lowbit bench kernels --threads 1 --threads 2 --shape 1x2048x2048
lowbit bench conv --shape 64x56x56x64
lowbit bench decode --model out --gguf model.gguf
lowbit bench methods --data cifar10/ --out methods/ --seeds 3
"""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lowbit.cli._bench_methods import claims, methods, tasks
from lowbit.cli._shell import Json, Shell, jsonable, shell

ORDER = 85

Threads = Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; torch's number if left out.")]
Activations = Annotated[list[str] | None, typer.Option(help="int8 or float; both if left out.")]
Save = Annotated[Path | None, typer.Option(help="Write the rows to this file, a later --against.")]
Against = Annotated[Path | None, typer.Option(help="Rows of an earlier run: say what moved.")]


def kernels(
    shape: Annotated[
        list[str] | None, typer.Option(help="Tokens x inputs x outputs, as 1x2048x2048. Repeatable.")
    ] = None,
    fmt: Annotated[
        list[str] | None,
        typer.Option("--format", help="Levels, as uint4; uint2+5% with exceptions; signs. Repeatable."),
    ] = None,
    group: Annotated[int, typer.Option(help="Weights that share a scale; -1 for a row.")] = 128,
    threads: Threads = None,
    buffers: Annotated[
        list[str] | None, typer.Option(help="rotating (from memory) or resident (from the caches). Repeatable.")
    ] = None,
    activations: Activations = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Spent on each figure.")] = 0.3,
    save: Save = None,
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Time products of packed weights beside torch and ONNX Runtime.

    Medians over repeats; candidates take turns. ONNX Runtime joins in where it is installed: pip install
    "lowbit[bench]". --save keeps the rows, --against says what moved since.
    """
    sh, ways, before = shell(), _ways(activations), _earlier(against)
    with sh.progress("kernels") as step:
        found = _kernels(sh, shape, fmt, group, threads or [_torch_threads()], buffers, ways, seconds, step)
    _finish(sh, found, save, before)


def conv(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Channels x height x width x outputs (x kernel x groups), as 64x56x56x64. Repeatable."),
    ] = None,
    fmt: Annotated[list[str] | None, typer.Option("--format", help="binary, ternary, int4, ... Repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Spent on each figure.")] = 0.3,
    save: Save = None,
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Time packed convolutions beside torch: ResNet-18's four stages and a depthwise layer, unless told otherwise.

    Floats in and floats out, rounding the inputs included; "levels" is a layer between two others of its kind, int8 in
    and int8 out. --save keeps the rows, --against says what moved since.
    """
    sh, before = shell(), _earlier(against)
    with sh.progress("conv") as step:
        found = _conv(shape, fmt, threads or [_torch_threads()], batch, seconds, step)
    _finish(sh, found, save, before)


def decode(
    model: Annotated[list[Path] | None, typer.Option(help="A compressed folder. Repeatable.")] = None,
    float_model: Annotated[str | None, typer.Option(help="Its float model, run by transformers.")] = None,
    gguf: Annotated[list[Path] | None, typer.Option(help="Files for llama.cpp. Repeatable.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Length of the prompt.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens of the answer.")] = 64,
    kv_bits: Annotated[list[int] | None, typer.Option(help="32 or 8. Repeatable.")] = None,
    no_module: Annotated[bool, typer.Option("--no-module", help="Leave out the model's own forward.")] = False,
    threads: Threads = None,
    activations: Activations = None,
    save: Save = None,
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Time a compressed model's prompt and answer beside its float model and llama.cpp.

    Medians over repeats; candidates take turns. llama.cpp joins in where it is installed: pip install "lowbit[bench]".
    --save keeps the rows, --against says what moved since.
    """
    sh, ways, counts, before = shell(), _ways(activations), threads or [_torch_threads()], _earlier(against)
    with sh.progress("decode") as step:
        found = _decode(sh, model, float_model, gguf, counts, prompt_tokens, max_tokens, kv_bits, ways, no_module, step)
    _finish(sh, found, save, before)


COMMANDS = {"kernels": kernels, "conv": conv, "decode": decode, "methods": methods, "tasks": tasks, "claims": claims}


class _Earlier(NamedTuple):
    """An earlier run's rows, and where they were kept."""

    path: Path
    cpu: "str | None"
    rows: list[dict[str, Any]]


def _earlier(path: "Path | None") -> "_Earlier | None":
    """Read before anything is timed: a wrong name must not cost minutes. Raises DataError."""
    from lowbit.bench.baseline import compare_rows
    from lowbit.errors import DataError

    if path is None:
        return None
    try:
        kept = json.loads(path.read_text("utf-8"))
        compare_rows([], kept["rows"])
        return _Earlier(path, kept.get("cpu"), kept["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path} does not hold the rows of an earlier run. Make one with --save {path}.") from e


def _finish(sh: Shell, found: dict[str, Any], save: "Path | None", before: "_Earlier | None") -> None:
    _show(sh, found["what"], found)
    if before is not None:
        found["moved"] = _moved(sh, found["rows"], before)
    if save is not None:
        kept = jsonable({k: found[k] for k in ("cpu", "machine", "rows")})
        save.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    sh.result(found)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _ways(activations: "list[str] | None") -> list[str]:
    from lowbit.errors import RecipeError

    ways = activations or ["int8", "float"]
    if wrong := [w for w in ways if w not in ("int8", "float")]:
        raise RecipeError(f"--activations {wrong[0]} is unknown. Use int8 or float.")
    return ways


def _kernels(sh: Shell, shape: Any, fmt: Any, group: int, counts: list[int], buffers: Any, ways: list[str],
             seconds: float, step: Any) -> dict[str, Any]:  # fmt: skip
    from lowbit.bench.kernels import BUFFERS, FORMATS, SHAPES, SIGN_SHAPES, SIGNS, Shape, bench_kernels
    from lowbit.errors import RecipeError

    shapes = [Shape.parse(s) for s in shape] if shape else SHAPES
    kinds = buffers or list(BUFFERS)
    if wrong := [b for b in kinds if b not in BUFFERS]:
        raise RecipeError(f"--buffers {wrong[0]} is unknown. Use {' or '.join(BUFFERS)}.")
    formats = [f for f in fmt or FORMATS if f != SIGNS]
    signs = shapes if SIGNS in (fmt or ()) else () if fmt or shape else SIGN_SHAPES
    found = bench_kernels(shapes if formats else (), formats, signs, counts, group, kinds, ways, seconds, step)
    return {"what": "kernels", "cpu": _cpu(), "moved": None, **found}


def _conv(shape: Any, fmt: Any, counts: list[int], batch: int, seconds: float, step: Any) -> dict[str, Any]:
    from lowbit.bench.conv import FORMATS, SHAPES, ConvShape, bench_conv

    shapes = [ConvShape.parse(s) for s in shape] if shape else SHAPES
    found = bench_conv(shapes, fmt or FORMATS, counts, batch, seconds, progress=step)
    return {"what": "conv", "cpu": _cpu(), "moved": None, **found}


def _decode(sh: Shell, models: "list[Path] | None", float_model: "str | None", gguf: "list[Path] | None",
            counts: list[int], prompt: int, tokens: int, kv_bits: Any, ways: list[str], no_module: bool,
            step: Any) -> dict[str, Any]:  # fmt: skip
    from lowbit.bench import rivals
    from lowbit.bench.decode import bench_decode
    from lowbit.bench.machine import measure_machine
    from lowbit.cli._models import open_runnable
    from lowbit.errors import DataError, RecipeError

    if not models:
        raise RecipeError("bench decode needs a compressed model: lowbit bench decode --model OUT.")
    if missing := [p for p in gguf or [] if not p.is_file()]:
        raise DataError(f"{missing[0]} is no file. Give a .gguf file for llama.cpp.")
    if gguf and not rivals.installed("llama_cpp"):
        sh.note('llama.cpp is left out: pip install "lowbit[bench]" brings it.')
    other = open_runnable(float_model).model if float_model else None
    rows: list[dict[str, Any]] = []
    for path in models:
        found = bench_decode(
            open_runnable(str(path)).model, other, gguf or [], counts, prompt, tokens, kv_bits or [32], ways,
            not no_module, progress=step,
        )  # fmt: skip
        rows += [{"model": str(path)} | row for row in found["rows"]]
    return {
        "what": "decode",
        "cpu": _cpu(),
        "moved": None,
        "machine": [measure_machine(c).as_dict() for c in counts],
        "rows": rows,
    }


def _cpu() -> str:
    from lowbit.cli.doctor import cpu_name

    return cpu_name()


def _show(sh: Shell, what: str, found: dict[str, Any]) -> None:
    for m in found["machine"]:
        sh.say(f"{found['cpu']}, {m['threads']} threads: copies {m['copy_gbytes_per_second']:.1f} GB/s, adds up "
               f"{m['int8_gmacs_per_second']:.0f} G int8 products/s ({m['isa']})")  # fmt: skip
    if what == "decode":
        columns = [
            "model",
            "what",
            "activations",
            ">cache bits",
            ">threads",
            ">prompt tokens/s",
            ">answer tokens/s",
            ">x llama.cpp",
        ]
        sh.table(columns, [_decode_cells(r) for r in found["rows"]])
        return
    if what == "conv":
        columns = [
            "shape",
            ">threads",
            "format",
            "inputs",
            "row",
            ">ms",
            ">torch ms",
            ">x torch",
            ">GMAC/s",
            ">of peak",
        ]
        sh.table(columns, [_conv_cells(r) for r in found["rows"]])
        return
    columns = ["shape", "buffers", ">threads", "format", "activations", "row", ">ms", ">x torch", ">x bf16", ">x ORT",
               ">x dense", ">GMAC/s", ">of peak",
               ">GB/s", ">of copy"]  # fmt: skip
    sh.table(columns, [
        (f"{r['m']}x{r['k']}x{r['n']}", r["buffers"], r["threads"], r["format"], r["activations"], r["isa"],
         f"{r['ms']:.3f}", _times(r["speedup"]), _times(r["bf16_speedup"]), _times(r["onnxruntime_speedup"]),
         _times(r["times_dense"]),
         f"{r['gmacs_per_second']:.1f}", _percent(r["fraction_of_peak"]), f"{r['gbytes_per_second']:.1f}",
         f"{100 * r['fraction_of_copy']:.0f} %") for r in found["rows"]
    ])  # fmt: skip


def _conv_cells(r: dict[str, Any]) -> tuple[Any, ...]:
    peak = _percent(r["fraction_of_peak"])
    times = f"{r['ms']:.3f}", f"{r['torch_ms']:.3f}", _times(r["speedup"]), f"{r['gmacs_per_second']:.1f}", peak
    return (r["shape"], r["threads"], r["format"], r["activations"], r["isa"], *times)


def _decode_cells(r: dict[str, Any]) -> tuple[Any, ...]:
    rates = f"{r['prefill_tokens_per_second']:.0f}", f"{r['decode_tokens_per_second']:.1f}"
    return (
        r["model"],
        r["what"],
        r["activations"] or "",
        r["kv_bits"] or "",
        r["threads"],
        *rates,
        _times(r["decode_against_llama_cpp"]),
    )


def _percent(share: "float | None") -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _times(ratio: "float | None") -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _moved(sh: Shell, rows: list[dict[str, Any]], before: _Earlier) -> list[dict[str, Any]]:
    from lowbit.bench.baseline import compare_rows, moved

    entries = compare_rows(rows, before.rows)
    if before.cpu != _cpu():
        sh.note(f"{before.path} was made on another processor ({before.cpu}): this compares machines.")
    told = [t for t in entries if moved(t) not in ("same", "new")]
    for t in told:
        name = " ".join(str(v) for k, v in t.items() if k not in ("ms", "baseline_ms", "ratio") and v is not None)
        sh.say(f"{moved(t)}: {name}: {t['baseline_ms']:.3f} -> {t['ms']:.3f} ms ({t['ratio']:.2f}x)")
    sh.say(f"{len(told)} of {len(entries)} rows moved by more than 10 % against {before.path}.")
    return entries
