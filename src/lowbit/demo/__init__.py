"""`lowbit demo`: train a small network, make its weights 8-bit down to binary, pack, save, load, run from packed bits,
report.

Each variant starts from the trained float network, is fine-tuned for a few epochs with rounded weights, and is measured
as what was read back from its file. Everything is seeded; times are those of the machine in hand.
"""

import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit._threads import one_thread
from lowbit.demo.digits import Digits, digit_net, load_digits, logits, share_right, train
from lowbit.errors import ArtifactError, KernelError

__all__ = ["MARK", "VARIANTS", "Variant", "run_demo"]

MARK = "demo.json"  # in the folder: the demo may overwrite what the demo wrote
Progress = Callable[[dict[str, Any]], object]


class Variant(NamedTuple):
    """One row of the table."""

    name: str
    format: str
    estimator: str = "identity"


VARIANTS = (
    Variant("8-bit", "int8-channel"),
    Variant("4-bit", "int4-channel"),
    Variant("3-bit", "int3-channel"),
    Variant("2-bit", "int2-channel"),
    Variant("ternary", "ternary-channel"),
    Variant("binary", "binary-channel"),
)


def run_demo(out: Path, seed: int = 0, quick: bool = False, progress: "Progress | None" = None) -> dict[str, Any]:
    """Everything, into the folder `out`; returns the table as {"float", "rows", "seconds", ...}.

    quick: a smaller network and fewer epochs, for trying the machinery. progress gets {"event": "float" | "variant" |
    "step", ...}. Raises ArtifactError if `out` holds anything but an earlier demo, KernelError if a packed network
    computes something else.
    """
    tell = progress or (lambda event: None)
    started = time.perf_counter()
    _check_folder(out)
    data, width, epochs, tuning = load_digits(seed), 16 if quick else 48, 3 if quick else 6, 1 if quick else 3
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        net = digit_net(width)
        tell({"event": "float", "weights": sum(p.numel() for p in net.parameters())})
        train(net, data, epochs, 4e-3, seed, _steps(tell, "float"))
        reference = _float_row(net, data, out)
        tell({"event": "row", **reference})
        rows = []
        for variant in VARIANTS:
            rows.append(_variant_row(variant, net, data, out, width, tuning, seed, tell))
            tell({"event": "row", **rows[-1]})
    result = {"float": reference, "rows": rows, "seed": seed, "quick": quick, "out": str(out), "machine": _machine()}
    result |= {"test_images": len(data.x_test), "train_images": len(data.x_train), "kept_bytes": rows[-1]["kept_bytes"]}
    result["seconds"] = round(time.perf_counter() - started, 2)
    (out / MARK).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def _variant_row(
    variant: Variant, net: nn.Module, data: Digits, out: Path, width: int, epochs: int, seed: int, tell: Progress
) -> dict[str, Any]:
    """Attach, fine-tune, pack, save, load, measure."""
    from lowbit.runtime.artifact import load, save
    from lowbit.training import pack, prepare

    student = copy.deepcopy(net)
    prepare(student, variant.format, variant.estimator)
    train(student, data, epochs, 2e-3, seed + 1, _steps(tell, variant.name))
    wanted = logits(student, data)
    packed = pack(student)
    folder = out / variant.name
    recipe = {"method": "train", "format": variant.format, "estimator": variant.estimator, "epochs": epochs}
    manifest = save(packed, folder, recipe=recipe, seed=seed, force=True)
    loaded = load(folder, model=digit_net(width))
    got = logits(loaded, data)
    return {
        "name": variant.name,
        "format": variant.format,
        "accuracy": share_right(got, data),
        "bits_per_weight": manifest["summary"]["bits_per_weight"],
        "bits_per_weight_file": manifest["summary"]["bits_per_weight_file"],
        "bytes": (folder / "model.safetensors").stat().st_size,
        "images_per_second": _images_per_second(loaded, data),
        "logit_difference": _agreement(variant.name, got, wanted),
        "folder": str(folder),
        "layers": _layers(manifest),
        "kept_bytes": sum(row["bytes"] for row in manifest["plain"].values()),
    }


def _layers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    rows = manifest["layers"].items()
    return [
        {"name": n, "shape": r["meta"]["shape"], "bits_per_weight": r["bits_per_weight"], "bytes": r["bytes"]}
        for n, r in rows
    ]


def _float_row(net: nn.Module, data: Digits, out: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("{}\n", "utf-8")
    path = out / "float.safetensors"
    save_file(net.state_dict(), path)
    n = sum(p.numel() for p in net.parameters())
    return {
        "name": "float",
        "format": "float32",
        "accuracy": share_right(logits(net, data), data),
        "bits_per_weight": 32.0,
        "bits_per_weight_file": 32.0,
        "weights": n,
        "bytes": path.stat().st_size,
        "images_per_second": _images_per_second(net, data),
    }


def _agreement(name: str, got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest logit difference between the trained and the packed network, relative to the largest logit."""
    difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
    if not difference < 1e-3:
        raise KernelError(
            f"{name}: the packed network's logits differ by {difference:.2g} from the trained network's. "
            "Run `lowbit doctor`, or set LOWBIT_ISA=scalar."
        )
    return difference


@torch.no_grad()
def _images_per_second(net: nn.Module, data: Digits, batch: int = 256, repeats: int = 5) -> float:
    """From the median time of a batch, after warm-up."""
    from lowbit.evaluate import latency

    x = data.x_test[:batch]
    return len(x) / latency(lambda: net(x), repeats, 2).median_ms * 1e3


def _steps(tell: Progress, what: str) -> Callable[[int, int], object]:
    return lambda done, total: tell({"event": "step", "what": what, "done": done, "total": total})


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise ArtifactError(f"{out} holds something else than an earlier demo. Give another place with --out.")


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
