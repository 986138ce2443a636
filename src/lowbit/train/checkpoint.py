"""Checkpoints: everything that the rest of a training depends on, in one safetensors file, written whole or not at all.

    net.*           the state dict: latent weights, scales, schedules, running statistics
    optimizer.*     the optimizer's tensors by parameter number and key
    random          torch's generator; the order of examples needs none, it follows from seed and epoch
    metadata        one JSON text: whose checkpoint it is, steps done, the curve so far

Going on from it gives the very weights that an undisturbed training gives (on the CPU bit for bit; GPUs add in any
order). Nothing is unpickled.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ArtifactError, TrainingError

NAME = "checkpoint.safetensors"


def write_checkpoint(path: Path, net: nn.Module, optimizer: Any, identity: dict[str, Any], log: dict[str, Any]) -> None:
    """Raises TrainingError, and leaves the checkpoint before it, where the weights are no numbers any more."""
    from safetensors.torch import save_file

    tensors = _tensors(net, optimizer)
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise TrainingError(f"{broken[0]} holds NaN or infinity. {ADVICE}")
    tensors["random"] = torch.get_rng_state()
    text = {"lowbit_train": json.dumps({"identity": identity, "log": log})}
    temporary = path.with_suffix(".part")
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, temporary, text)
    os.replace(temporary, path)


ADVICE = (
    "Lower the learning rate (--set lr=...), limit the gradients (--set clip=1), or warm up longer (--set warmup=2), "
    "and begin again with --force."
)


def read_checkpoint(path: Path, net: nn.Module, optimizer: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint into net, optimizer and torch's generator; returns its log.

    Raises ArtifactError if it is damaged, or of another recipe, seed or data; then nothing has changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = json.loads((file.metadata() or {})["lowbit_train"])
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        random = tensors.pop("random")
        theirs, log = text["identity"], text["log"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise ArtifactError(f"{path} is no whole checkpoint ({e}); begin again with --force.") from None
    check_identity(theirs, identity, path.parent)
    state: dict[str, Tensor] = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
    try:
        net.load_state_dict(state)
        optimizer.load_state_dict(_optimizer_state(tensors, optimizer))
        torch.set_rng_state(random)
    except (RuntimeError, KeyError, ValueError, TypeError) as e:
        raise ArtifactError(f"{path} does not fit this network ({str(e).splitlines()[0]}); use --force.") from None
    return log


def check_identity(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """Raise ArtifactError where a folder belongs to another recipe, naming the first difference."""
    names = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if names:
        k = names[0]
        raise ArtifactError(
            f"{folder} holds a training of another recipe ({k}: {theirs.get(k)!r} there, {ours.get(k)!r} here). "
            "Give another folder with -o, or --force to begin again."
        )


def _tensors(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {f"net.{n}": t for n, t in net.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                found[f"optimizer.{i}.{key}"] = value
    return found


def _optimizer_state(tensors: dict[str, Tensor], optimizer: Any) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            state.setdefault(int(i), {})[key] = t
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
