"""The corruption track: what is left of each row's accuracy on images with noise, blur, fog, JPEG artefacts, ..."""

import json
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bench.packing import read_float_network
from lowbit.bench.pool import Job, Setting
from lowbit.train.corruptions import KINDS, corrupt
from lowbit.train.device_images import DeviceImages

SEVERITIES = (1, 3, 5)
CHUNK = 1000  # images at a time
FILE = "corrupted.jsonl"


def corrupt_all(setting: Setting, jobs: list[Job], n: int, say: Callable[[str], object]) -> None:
    """Every finished network on the first n test images, clean and corrupted: `<folder>/corrupted.jsonl`.

    clean: accuracy; kinds: accuracy of each corruption, one number a severity; relative: their mean over clean's.
    """
    path, data = setting.folder / FILE, setting.data
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    done = {(r["row"], r["seed"]) for r in rows if r["images"] == n}
    x, y = data.x_test[:n], data.y_test[:n]
    worse = {kind: [corrupt(x.cpu(), kind, s).to(x.device) for s in SEVERITIES] for kind in KINDS}
    for job in jobs:
        weights = setting.folder / "weights" / f"{job.name}.safetensors"
        if not weights.is_file() or (job.row.name, job.seed) in done:
            continue
        net = read_float_network(job.row, setting.protocol, weights).to(x.device)
        found: dict[str, Any] = {"row": job.row.name, "seed": job.seed, "images": n, "clean": accuracy(net, data, x, y)}
        found["kinds"] = {kind: [accuracy(net, data, bad, y) for bad in images] for kind, images in worse.items()}
        mean = fmean(a for column in found["kinds"].values() for a in column)
        found["relative"] = mean / found["clean"] if found["clean"] else None
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        say(f"{job.name:<28} {100 * found['clean']:.2f} % clean, {100 * mean:.2f} % corrupted")


@torch.no_grad()
def accuracy(net: nn.Module, data: DeviceImages, x: Tensor, y: Tensor) -> float:
    """Share of x (n, h, w, 3) uint8 that gets its class."""
    right = [int((net(data.normal(a)).argmax(1) == b).sum()) for a, b in zip(x.split(CHUNK), y.split(CHUNK))]
    return sum(right) / len(y)
