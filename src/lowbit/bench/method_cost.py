"""What a training step of each row costs beside fp32's: the two take turns, and the middle of the ratios counts."""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from lowbit.bench.pool import Job, Setting, Slot, Templates
from lowbit.bench.rows import ROWS, Row

WARM = 2  # steps that are not timed


def measure_costs(setting: Setting, rows: list[Row], steps: int, say: Callable[[str], object]) -> None:
    """`steps` steps of every row in turn with fp32; appended to <folder>/cost.jsonl. Nothing is trained to the end."""
    folder = setting.folder
    setting = setting._replace(folder=folder / "cost", compile=False)  # no checkpoint of the real run is touched
    templates = Templates(setting)
    base = Slot(Job(ROWS["fp32"], 0), setting, templates)
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        slot = base if row.name == "fp32" else Slot(Job(row, 0), setting, templates)
        found = {"row": row.name, "protocol": setting.protocol.name, "batch": setting.protocol.batch}
        found |= {"device": setting.device.type, "threads": torch.get_num_threads()} | compare(slot, base, steps)
        with (folder / "cost.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        say(f"{row.name:<24} {found['cost']:.2f} times fp32 ({found['ms']:.1f} ms a step)")


def compare(slot: Slot, base: Slot, steps: int) -> dict[str, Any]:
    """cost: median ratio of neighbouring steps; ms, base_ms: medians."""
    pairs = [(_one(slot), _one(base)) for _ in range(WARM + steps)][WARM:]
    ms, base_ms = ([1000 * t for t in column] for column in zip(*pairs))
    return {"cost": median(a / b for a, b in pairs), "ms": median(ms), "base_ms": median(base_ms)}


def _one(slot: Slot) -> float:
    """Seconds of one step. The trainee's counters are put back: any number of steps can be timed."""
    t = slot.trainee
    with slot.here():
        t.k.zero_()
        began = time.perf_counter()
        t.step() if slot.graph is None else slot.graph.replay()
        if slot.stream is not None:
            slot.stream.synchronize()
    return time.perf_counter() - began
