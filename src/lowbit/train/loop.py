"""The loop that trains one network of a recipe with one seed, from the start or from where it stopped.

    trainer = Trainer(recipe, task, seed, folder)
    trainer.run(progress)            trains, with checkpoints in the folder; KeyboardInterrupt leaves one
    trainer.net, trainer.log         the trained network and its curve

The n-th step does the same whether or not the process was killed before it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.diagnose import Recorder
from lowbit.errors import RecipeError, TrainingError
from lowbit.evaluate._model import measuring
from lowbit.train.architectures import build
from lowbit.train.checkpoint import ADVICE, NAME, read_checkpoint, write_checkpoint
from lowbit.train.recipe import TrainRecipe
from lowbit.train.stopping import asked_to_stop
from lowbit.train.tasks import Task
from lowbit.training import penalty, prepare, step

Progress = Callable[[dict[str, Any]], object]
EARLY = 20  # steps after which the first figures are told
WARM = 3  # of them are not timed


class Trainer:
    """`recipe` on `task` with one seed. checkpoint_seconds: between two checkpoints, which end epochs or not."""

    def __init__(self, recipe: TrainRecipe, task: Task, seed: int, folder: Path, checkpoint_seconds: float = 60):
        self.recipe, self.task, self.seed, self.path = recipe, task, seed, folder / NAME
        self.checkpoint_seconds = checkpoint_seconds
        self.device = device_of(recipe)
        self.net = new_network(recipe, task, seed).to(self.device)
        self.optimizer = new_optimizer(recipe, self.net)
        self.per_epoch = task.steps(recipe.batch)
        self.total = self.per_epoch * recipe.epochs
        self.recorder = Recorder(self.net) if recipe.diagnostics else None
        self.done, self.losses = 0, torch.zeros((), device=self.device)
        self.log: dict[str, Any] = {"done": 0, "seconds": 0.0, "losses": 0.0, "curve": [], "diagnostics": []}

    def run(self, progress: Progress = lambda event: None) -> None:
        """All steps that are left. Raises TrainingError where the loss becomes NaN."""
        self._resume(progress)
        self.net.train()
        began, before = time.perf_counter(), self.log["seconds"]
        saved, first = began, self.done
        with asked_to_stop() as stop:
            while self.done < self.total:
                if self.done % self.per_epoch == 0 or self.done == first:
                    draws = self.task.draws(self.recipe.batch, self.seed, self.done // self.per_epoch)
                self._step(draws[self.done % self.per_epoch])
                self.log["seconds"] = before + time.perf_counter() - began
                self._tell(progress, began, first)
                if stop() or self.done == self.total or time.perf_counter() - saved > self.checkpoint_seconds:
                    self.save()
                    saved = time.perf_counter()
                if stop() and self.done < self.total:
                    raise KeyboardInterrupt

    def _resume(self, progress: Progress) -> None:
        if not self.path.is_file():
            return
        self.log = read_checkpoint(self.path, self.net, self.optimizer, self.identity())
        self.done = self.log["done"]
        self.losses.fill_(self.log["losses"])
        if 0 < self.done < self.total:
            progress({"event": "resume", "seed": self.seed, "done": self.done, "total": self.total})

    def _step(self, draw: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.done, self.per_epoch)
        x, y = self.task.batch(draw)
        record = self.recorder is not None and self.done % self.per_epoch == 0
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            if record and self.recorder is not None:
                with self.recorder:
                    loss = self._loss(x, y)
                    loss.backward()
                self.log["diagnostics"].append(self.recorder.record(self.done / self.per_epoch))
            else:
                loss = self._loss(x, y)
                loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.done += 1
        step(self.net, self.done / self.total)
        self.losses += loss.detach()
        if self.device.type == "cpu" or self.done % 20 == 0 or self.done == self.total:
            self._check(float(self.losses))

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.net(x), y) + penalty(self.net)

    def _check(self, losses: float) -> None:
        if not abs(losses) < float("inf"):
            kept = f" The checkpoint before it is kept in {self.path.parent}." if self.path.is_file() else ""
            raise TrainingError(f"the loss is NaN or infinite at step {self.done} of {self.total}.{kept} {ADVICE}")

    def _tell(self, progress: Progress, began: float, first: int) -> None:
        """The first figures, each step, each epoch with its loss and accuracy."""
        now, here = time.perf_counter(), self.done - first
        if here == WARM:
            self.warm = now
        if here == EARLY and self.total > EARLY:
            each = (now - self.warm) / (EARLY - WARM)
            event = {"event": "early", "seed": self.seed, "loss": float(self.losses) / self._into_epoch()}
            progress(event | {"step_seconds": each, "left": each * (self.total - self.done), "total": self.total})
        left = (now - began) / here * (self.total - self.done)
        what = {"seed": self.seed, "done": self.done, "total": self.total, "left": left}
        if self.done % self.per_epoch == 0:
            row = self._end_of_epoch()
            progress({"event": "epoch", **what, **row, "epochs": self.recipe.epochs})
        progress({"event": "step", **what})

    def _into_epoch(self) -> int:
        """Steps since the sum of losses began."""
        return (self.done - 1) % self.per_epoch + 1

    def _end_of_epoch(self) -> dict[str, Any]:
        epoch = self.done // self.per_epoch
        row: dict[str, Any] = {"epoch": epoch, "loss": float(self.losses) / self.per_epoch, "accuracy": None}
        self.losses.zero_()
        if epoch % self.recipe.evaluate == 0 or self.done == self.total:
            row |= evaluate(self.net, self.task)
        self.log["curve"].append(row)
        return row

    def save(self) -> None:
        """A checkpoint of now."""
        self.log |= {"done": self.done, "losses": float(self.losses)}
        write_checkpoint(self.path, self.net, self.optimizer, self.identity(), self.log)

    def identity(self) -> dict[str, Any]:
        return {**self.recipe.identity(), "seed": self.seed, "examples": self.task.fingerprint()}


def device_of(recipe: TrainRecipe) -> torch.device:
    """Raises RecipeError for a device that torch does not see."""
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise RecipeError(f"device {name!r}: {str(e).splitlines()[0]} Use --device cpu.") from None


def new_network(recipe: TrainRecipe, task: Task, seed: int) -> nn.Module:
    """Built and prepared, on the CPU; also sets torch's generator."""
    torch.manual_seed(seed)
    net = build(recipe.network, task.kind, task.shape, task.classes, recipe.network_options)
    return prepare(net, recipe.choices) if recipe.rounds_weights or recipe.rounds_inputs else net


def new_optimizer(recipe: TrainRecipe, net: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels, not on normalizations, biases, shifts and scales."""
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if decays(n, p)]
    others = [p for n, p in named if not decays(n, p)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, recipe.decay), (others, 0.0))
        if params
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr)


def decays(name: str, p: Tensor) -> bool:
    return p.ndim > 1 and not name.endswith("scale")


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Of (n, classes) and (n,), or (n, length, classes) and (n, length), in float32."""
    return F.cross_entropy(scores.flatten(0, -2).float(), y.flatten())


def evaluate(net: nn.Module, task: Task) -> dict[str, float]:
    """accuracy (0 to 1) and test_loss (nats) over the test set, in float32."""
    right = loss = 0.0
    n = 0
    with measuring(net):
        for x, y in task.test_batches():
            scores = net(x)
            right += float((scores.argmax(-1) == y).sum())
            loss += float(cross_entropy(scores, y)) * y.numel()
            n += y.numel()
    return {"accuracy": right / n, "test_loss": loss / n}
