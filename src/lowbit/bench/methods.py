"""Compare ways to train at 1 to 4 bits: one network, one protocol, many methods, several seeds.

    lowbit bench methods --data cifar10/ --out methods/ --seeds 3                       the small CPU protocol
    lowbit bench methods --data cifar10/ --out methods/ --protocol resnet20 --device cuda --bf16 --workers 12

Type the same command again to go on where it stopped: finished rows are kept, unfinished ones have checkpoints (a
`--minutes` limit writes them too). `--smoke` runs 30 steps of every row, `--probe` measures images per second, `--cost`
times steps beside fp32's, `--pack` packs the finished networks and compares each with what was trained, `--corrupt`
evaluates them on test images with noise, blur, fog, JPEG artefacts and others.
`python -m lowbit.bench.methods` is the same with less around it, for machines that have torch and little else.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.bench.corruption import corrupt_all
from lowbit.bench.method_cost import measure_costs
from lowbit.bench.method_table import cells, table
from lowbit.bench.pool import Job, Setting, Slot, Templates, read_rows, run_pool
from lowbit.bench.rows import PROTOCOLS, ROWS, Protocol, Row
from lowbit.errors import LowbitError, RecipeError, near_names
from lowbit.train.device_images import DeviceImages
from lowbit.train.images import read_images


@dataclass(frozen=True)
class Request:
    """What is asked for. changes: other values of the protocol's fields, None for its own."""

    data: str
    out: Path
    protocol: str = "small"
    rows: str = ""
    seeds: int = 1
    workers: int = 1
    device: str = "cpu"
    minutes: float = float("inf")
    bf16: bool = False
    compile: bool = False
    graphs: bool = True
    curve: int = 10
    smoke: bool = False
    probe: bool = False
    pack: bool = False
    cost: int = 0
    corrupt: int = 0
    changes: dict[str, Any] = field(default_factory=dict)


CHANGES = ("epochs", "batch", "lr", "train_images", "test_images", "depth", "width")
Say = Callable[[str], object]


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: "list[str] | None" = None) -> int:
    """Entry point; returns the exit code: 0 all rows done, 3 time was up, 1 an error in one sentence."""
    try:
        return run(_request(arguments), say)
    except LowbitError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def run(request: Request, say: Say) -> int:
    """Do what is asked; 0 where all of it is done, 1 where a row failed its check, 3 where time was up.

    Raises RecipeError for unknown rows, protocols and devices, DataError for missing data, ArtifactError where the
    folder holds checkpoints of another protocol.
    """
    began = time.perf_counter()
    rows, protocol = select(request.rows), protocol_of(request)
    device = torch.device(request.device)
    _set_up(device)
    train, test = read_images(request.data)
    data = DeviceImages(train.first(protocol.train_images), test.first(protocol.test_images), device)
    say(f"{len(data.y)} training and {len(data.y_test)} test images, {time.perf_counter() - began:.1f} s to read")
    dtype = torch.bfloat16 if request.bf16 else torch.float32
    setting = Setting(protocol, data, device, dtype, request.out, request.compile, request.graphs, request.curve)
    jobs = [Job(row, seed) for seed in range(request.seeds) for row in rows]
    if request.smoke or request.probe:
        failed = smoke(setting, jobs, request.workers, say) if request.smoke else 0
        for compiled in {False, request.compile} if request.probe else ():
            probe(setting._replace(compile=compiled), rows, say)
        return failed
    if request.cost:
        measure_costs(setting, rows, request.cost, say)
        return 0
    if request.pack:
        return pack_all(setting, jobs, say)
    if request.corrupt:
        corrupt_all(setting, jobs, request.corrupt, say)
        return 0
    return _train(setting, jobs, request, began, say)


def _train(setting: Setting, jobs: list[Job], request: Request, began: float, say: Say) -> int:
    protocol = setting.protocol
    done = {
        (r["row"], r["seed"])
        for r in read_rows(request.out)
        if r["status"] == "done" and r["protocol"] == vars(protocol)
    }
    jobs = [job for job in jobs if (job.row.name, job.seed) not in done]
    jobs.sort(key=lambda job: not (request.out / "checkpoints" / f"{job.name}.safetensors").is_file())
    say(f"{len(jobs)} networks to train, {len(done)} done before; {protocol}")
    whole = run_pool(jobs, setting, request.workers, began + 60 * request.minutes, say)
    for row in table(request.out, protocol):
        say("  ".join(f"{c:>8}" if i else f"{c:<24}" for i, c in enumerate(cells(row)[:6])).rstrip())
    return 0 if whole else 3


def select(names: str) -> list[Row]:
    """Rows by name; comma-separated, a trailing * stands for anything; empty for all."""
    wanted = [n for n in names.split(",") if n] or ["*"]
    chosen: list[Row] = []
    for name in wanted:
        found = [r for r in ROWS.values() if r.name == name or (name.endswith("*") and r.name.startswith(name[:-1]))]
        if not found:
            raise RecipeError(f"unknown row {name!r}. {near_names(name, tuple(ROWS))}")
        chosen += [r for r in found if r not in chosen]
    return chosen


def protocol_of(request: Request) -> Protocol:
    """The named protocol with the request's changes. Raises RecipeError for an unknown name."""
    name = request.protocol
    if name not in PROTOCOLS:
        raise RecipeError(f"unknown protocol {name!r}. {near_names(name, tuple(PROTOCOLS))}")
    return replace(PROTOCOLS[name], **{k: v for k, v in request.changes.items() if v is not None})


def _set_up(device: torch.device) -> None:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RecipeError("--device cuda: torch sees no GPU here. Use --device cpu.")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def smoke(setting: Setting, jobs: list[Job], workers: int, say: Say) -> int:
    """30 steps of every row; says which fail. Writes into <out>/smoke."""
    steps = min(30, len(setting.data.y) // setting.protocol.batch)
    y = setting.data.y
    setting.data.y = y[: steps * setting.protocol.batch]
    try:
        protocol = replace(setting.protocol, epochs=1, warmup=0.5)
        began = time.perf_counter()
        setting = setting._replace(folder=setting.folder / "smoke", protocol=protocol)
        run_pool(jobs, setting, workers, float("inf"), say)
    finally:
        setting.data.y = y
    failed = [r for r in read_rows(setting.folder) if r["status"] != "done"]
    for r in failed:
        say(f"FAILED {r['row']}: {r['error']}")
    say(f"smoke: {len(jobs) - len(failed)} of {len(jobs)} rows ran, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


def pack_all(setting: Setting, jobs: list[Job], say: Say) -> int:
    """Pack every finished network and evaluate it: `<out>/packed.jsonl`. 1 if one differs from the trained network."""
    from lowbit.bench.packing import measure

    worst, path = 1.0, setting.folder / "packed.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    done = {(r["row"], r["seed"]) for r in rows}
    for job in jobs:
        weights = setting.folder / "weights" / f"{job.name}.safetensors"
        if weights.is_file() and (job.row.name, job.seed) not in done:
            row: dict[str, Any] = {"row": job.row.name, "seed": job.seed}
            row |= measure(job.row, setting.protocol, weights, setting.data)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(
                f"{job.name:<28} {row['bits_per_weight']:.3f} bits, {row['bytes']:,} bytes, {100 * row['accuracy']:.2f}"
                f" %, {100 * row['same_class']:.2f} % of the classes as trained"
            )
            worst = min(worst, row["same_class"])
    return int(worst < 0.999)


def probe(setting: Setting, rows: list[Row], say: Say) -> None:
    """Images per second of several networks side by side."""
    say("torch.compile:" if setting.compile else "as it stands:")
    for k in (1, 4, 8, 16) if setting.device.type == "cuda" else (1,):
        began, slots = time.perf_counter(), []
        try:
            templates = Templates(setting)
            slots = [Slot(Job(rows[i % len(rows)], i), setting, templates) for i in range(k)]
            ready = time.perf_counter()
            images = rate(slots, 3.0) * setting.protocol.batch / (time.perf_counter() - ready)
        except Exception as e:
            say(f"{k:>3} side by side failed: {type(e).__name__}: {e}")
            return
        minutes = setting.protocol.epochs * len(ROWS) * len(setting.data.y) / images / 60
        say(
            f"{k:>3} side by side: {images:>9,.0f} images/s (ready after {ready - began:.1f} s); "
            f"{setting.protocol.epochs} epochs of {len(ROWS)} rows take {minutes:.1f} minutes"
        )


def rate(slots: list[Slot], seconds: float) -> int:
    """Steps that these trainees make together in about so many seconds."""
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for slot in slots:
            if slot.ready():
                before = slot.trainee.done
                slot.advance()
                steps += slot.trainee.done - before
    for slot in slots:
        if slot.stream is not None:
            slot.stream.synchronize()
    return steps


def _request(arguments: "list[str] | None") -> Request:
    given = vars(_parser().parse_args(arguments))
    given["graphs"] = not given.pop("no_graphs")
    return Request(changes={k: given.pop(k) for k in CHANGES}, **given)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m lowbit.bench.methods", description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder of Parquet files, hub name, or a file of lowbit.train.images")
    p.add_argument("--out", required=True, type=Path, help="folder for results, weights and checkpoints")
    p.add_argument("--protocol", default="small", help=f"one of {', '.join(PROTOCOLS)}")
    p.add_argument("--rows", default="", help="comma-separated names, a trailing * allowed; all rows if left out")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--workers", type=int, default=1, help="networks side by side")
    p.add_argument("--device", default="cpu")
    p.add_argument("--minutes", type=float, default=float("inf"), help="stop then, with checkpoints")
    p.add_argument("--bf16", action="store_true", help="convolutions in bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--no-graphs", action="store_true", help="launch kernels one by one")
    p.add_argument("--curve", type=int, default=10, help="test accuracy every so many epochs")
    for name in ("epochs", "batch", "train-images", "test-images", "depth", "width"):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--smoke", action="store_true", help="30 steps of every row")
    p.add_argument("--cost", type=int, default=0, metavar="STEPS", help="time so many steps of each row beside fp32's")
    p.add_argument("--pack", action="store_true", help="pack and evaluate what is finished")
    p.add_argument("--corrupt", type=int, default=0, metavar="IMAGES", help="evaluate on so many corrupted test images")
    p.add_argument("--probe", action="store_true", help="measure images per second")
    return p


if __name__ == "__main__":
    sys.exit(main())
