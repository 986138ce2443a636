"""After the training: pack, save, read back, and hold the packed network against the trained one."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import KernelError
from lowbit.evaluate._model import measuring
from lowbit.runtime.artifact import load, save
from lowbit.train.architectures import build
from lowbit.train.recipe import TrainRecipe
from lowbit.train.tasks import Task
from lowbit.training import pack, prepare

SAME = 0.999  # share of test examples on which packed and trained network must name the same class


def measure_packed(net: nn.Module, recipe: TrainRecipe, task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """Pack a copy of the trained network into `folder`, read it back, evaluate it on the CPU.

    Raises KernelError where it names another class than the trained network too often.
    """
    student = copy.deepcopy(net).cpu().eval()
    n = sum(p.numel() for p in build_like(recipe, task).parameters())
    manifest = save(pack(student), folder, recipe=recipe.as_dict(), seed=seed, force=True)
    loaded = load(folder, model=architecture_for(recipe, task))
    found = compare(net, loaded, task)
    if found["same_class"] < SAME:
        raise KernelError(
            f"the packed network names the same class as the trained one for {100 * found['same_class']:.2f} % of the "
            f"test set only ({100 * SAME} % are needed). Run `lowbit doctor`, or set LOWBIT_ISA=scalar."
        )
    sizes = {k: manifest["summary"][k] for k in ("bits_per_weight", "bits_per_weight_file")}
    size = (folder / "model.safetensors").stat().st_size
    layers = [
        {"name": k, "shape": r["meta"]["shape"], "bits_per_weight": r["bits_per_weight"], "bytes": r["bytes"]}
        for k, r in manifest["layers"].items()
    ]
    return found | sizes | {"bytes": size, "float_bytes": 4 * n, "folder": str(folder), "layers": layers}


def build_like(recipe: TrainRecipe, task: Task) -> nn.Module:
    """The float network of a recipe; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build(recipe.network, task.kind, task.shape, task.classes, recipe.network_options)


def architecture_for(recipe: TrainRecipe, task: Task) -> nn.Module:
    """What an artifact of the recipe is loaded into: float weights, input functions in their places."""
    net = build_like(recipe, task)
    choices = recipe.choices | {"weights": "float", "layers": [r | {"weights": "float"} for r in recipe.layers]}
    if recipe.rounds_inputs:
        prepare(net, choices)
    return net


def compare(trained: nn.Module, packed: nn.Module, task: Task) -> dict[str, float]:
    """packed_accuracy, same_class (shares), logit_difference (largest, over the largest logit)."""
    right = same = n = 0.0
    worst, largest = torch.zeros(()), torch.zeros(())
    with measuring(trained, packed):
        for x, y in task.test_batches():
            wanted, got = trained(x).cpu().float(), packed(x.cpu()).float()
            right += float((got.argmax(-1) == y.cpu()).sum())
            same += float((got.argmax(-1) == wanted.argmax(-1)).sum())
            worst, largest = _larger(worst, got - wanted), _larger(largest, wanted)
            n += y.numel()
    difference = float(worst / largest.clamp(min=1e-9))
    return {"packed_accuracy": right / n, "same_class": same / n, "logit_difference": difference}


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b.abs().max())
