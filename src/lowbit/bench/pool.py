"""Several trainees side by side on one device.

On a GPU each trainee's step is a CUDA graph on a stream of its own, and one thread keeps two short chunks of every
stream in flight: kernels of different networks overlap, which processes (they take turns on a GPU) would not give. On
the CPU they are trained one after the other.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.bench.rows import Protocol, Row
from lowbit.bench.trainee import Loss, Trainee, new_network, plain_loss
from lowbit.train.device_images import DeviceImages

CHUNK = 16  # steps between two looks at a stream
SAVE_EVERY = 60.0  # seconds between checkpoints
Say = Callable[[str], object]


class Job(NamedTuple):
    """One network of the table."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}"


class Setting(NamedTuple):
    """What all jobs share. curve: a test accuracy every so many epochs."""

    protocol: Protocol
    data: DeviceImages
    device: torch.device
    dtype: torch.dtype
    folder: Path
    compile: bool = False
    graphs: bool = True
    curve: int = 10


class Slot:
    """A trainee at work."""

    def __init__(self, job: Job, setting: Setting, templates: "Templates"):
        self.job, self.setting = job, setting
        cuda = setting.device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(setting.device) if cuda else None
        self.pending: list[Any] = []
        self.graph: Any = None
        with self.here():
            template, loss = templates.get(job.row)
            self.trainee = Trainee(
                job.row, setting.protocol, job.seed, setting.data, setting.device, setting.dtype, template, loss
            )
            if self.checkpoint.is_file():
                self.trainee.resume(self.checkpoint)
            self.host_loss = torch.zeros((), pin_memory=cuda)
            if cuda and setting.graphs:
                self.capture()
        self.began = self.saved = time.perf_counter()
        self.waiting: list[tuple[Any, int]] = []

    def here(self) -> Any:
        return torch.cuda.stream(self.stream)

    @property
    def checkpoint(self) -> Path:
        return self.setting.folder / "checkpoints" / f"{self.job.name}.safetensors"

    def capture(self) -> None:
        """Warm up, put everything back, record one step."""
        before = {n: t.clone() for n, t in self.trainee.state().items()}
        for _ in range(3):
            self.trainee.step()
        with torch.no_grad():
            for n, t in self.trainee.state().items():
                t.copy_(before[n])
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.trainee.step()

    def ready(self) -> bool:
        self.pending = [e for e in self.pending if not e.query()]
        return len(self.pending) < 2

    def advance(self) -> bool:
        """Launch the next chunk; at the end of an epoch note the loss, sometimes the accuracy, and go on. True."""
        t = self.trainee
        n = min(CHUNK, t.steps - t.done % t.steps)
        with self.here():
            for _ in range(n):
                t.step() if self.graph is None else self.graph.replay()
            t.done += n
            if t.done % t.steps == 0:
                self._end_of_epoch()
            if self.stream is not None:
                event = torch.cuda.Event()
                event.record(self.stream)
                self.pending.append(event)
        return True

    def _end_of_epoch(self) -> None:
        t = self.trainee
        epoch = t.done // t.steps
        self._read_loss()
        self.host_loss.copy_(t.loss_sum, non_blocking=True)
        t.loss_sum.zero_()
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(self.stream)
            self.waiting.append((event, epoch))
        else:
            self.waiting.append((None, epoch))
        if epoch % self.setting.curve == 0 or epoch == 1 or t.done == t.total:
            t.curve.append((epoch, t.accuracy()))
        if t.done < t.total:
            t.load_draws()

    def _read_loss(self) -> None:
        """The mean loss of the epoch before; raises ArithmeticError where it is no number."""
        for event, epoch in self.waiting:
            if event is not None:
                event.synchronize()
            mean = float(self.host_loss) / self.trainee.steps
            self.trainee.losses.append(round(mean, 5))
            if not abs(mean) < float("inf"):
                raise ArithmeticError(f"the loss is {mean} in epoch {epoch}: a smaller learning rate may help")
        self.waiting.clear()

    def finished(self) -> bool:
        return self.trainee.done >= self.trainee.total

    def save(self) -> None:
        """A checkpoint, after everything that was launched."""
        with self.here():
            self._read_loss()
            now = time.perf_counter()
            self.trainee.seconds += now - self.began
            self.began = self.saved = now
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            self.trainee.save(self.checkpoint)

    def result(self, together: int) -> dict[str, Any]:
        """The row of the results file; the weights go beside it."""
        from safetensors.torch import save_file

        with self.here():
            self._read_loss()
            t, path = self.trainee, self.setting.folder / "weights" / f"{self.job.name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(t.export(), path, {"format": t.method.format, "row": self.job.row.name})
            seconds = t.seconds + time.perf_counter() - self.began
            self.checkpoint.unlink(missing_ok=True)
        return row_of(self.job, self.setting) | {
            "status": "done",
            "accuracy": t.curve[-1][1],
            "curve": t.curve,
            "losses": t.losses,
            "seconds": round(seconds, 2),
            "together": together,
        }


class Templates:
    """One network and one loss function per structure, so that compiling happens once for many rows."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.kept: dict[tuple[str, str], tuple[nn.Module, Loss]] = {}

    def get(self, row: Row) -> tuple[nn.Module, Loss]:
        key = (row.activations, row.block)
        if key not in self.kept:
            net = new_network(row, self.setting.protocol).to(self.setting.device)
            worth_it = self.setting.compile and row.activations == "float"  # most rows share this structure
            self.kept[key] = (net, _compiled(net) if worth_it else plain_loss)
        return self.kept[key]


def _compiled(net: nn.Module) -> Loss:
    """The loss through torch.compile: fewer and larger kernels."""
    fast = torch.compile(lambda tensors, x, y: plain_loss(net, tensors, x, y), dynamic=False)

    def loss(net: nn.Module, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return fast(tensors, x, y)

    return loss


def row_of(job: Job, setting: Setting) -> dict[str, Any]:
    """The part of a result that is known beforehand."""
    p = setting.protocol
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
    return {
        "row": job.row.name,
        "seed": job.seed,
        "bits": job.row.bits,
        "format": job.row.make().format,
        "activations": job.row.activations,
        "block": job.row.block,
        "protocol": {k: getattr(p, k) for k in p.__dataclass_fields__},
        "device": device,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def run_pool(jobs: Iterable[Job], setting: Setting, workers: int, deadline: float, say: Say) -> bool:
    """Train all jobs, `workers` at a time; results go to `<folder>/results.jsonl` line by line.

    deadline: of `time.perf_counter`; then checkpoints are written and False is returned. A job that fails becomes a
    row with its error, and the others go on.
    """
    queue, slots, templates = list(jobs), [], Templates(setting)  # type: ignore[var-annotated]
    total, finished = len(queue), 0
    began = reported = time.perf_counter()
    while queue or slots:
        while queue and len(slots) < workers and time.perf_counter() < deadline:
            job = queue.pop(0)
            slot = _guarded(job, setting, say, partial(Slot, job, setting, templates))
            slots += [slot] if slot is not None else []
            finished += slot is None
        if time.perf_counter() >= deadline:
            for slot in slots:
                _guarded(slot.job, setting, say, slot.save)
            say(f"time is up: {finished} of {total} finished, {len(slots)} checkpoints written, {len(queue)} not begun")
            return False
        for slot in [s for s in slots if s.ready()]:
            moved = _guarded(slot.job, setting, say, slot.advance)
            if moved and setting.device.type == "cpu" and time.perf_counter() - slot.saved > SAVE_EVERY:
                slot.save()
            if moved and not slot.finished():
                continue
            if moved:
                row = _guarded(slot.job, setting, say, partial(slot.result, min(workers, total)))
                if row is not None:
                    write_row(setting.folder, row)
                    say(f"{row['row']:<24} seed {row['seed']}  {100 * row['accuracy']:.2f} %  {row['seconds']:.0f} s")
            finished += 1
            slots.remove(slot)
        if time.perf_counter() - reported > 10:
            reported = time.perf_counter()
            say(_progress(slots, queue, setting, finished, total, reported - began))
        if setting.device.type == "cuda":
            time.sleep(2e-4)
    return True


def _progress(slots: list[Slot], queue: list[Job], setting: Setting, finished: int, total: int, spent: float) -> str:
    t = [s.trainee for s in slots]
    epochs = ", ".join(f"{s.job.name} {s.trainee.done // s.trainee.steps}" for s in slots)
    share = (finished + sum(x.done / x.total for x in t)) / total
    left = spent * (1 - share) / share if share > 0 else float("nan")
    return f"{spent:.0f} s, about {left:.0f} s left; {finished}/{total} done; epochs: {epochs}"


def _guarded(job: Job, setting: Setting, say: Say, do: Callable[[], Any]) -> Any:
    """What `do` gives; None where it failed, which is written as the job's row."""
    try:
        return do()
    except Exception as e:
        say(f"{job.name} failed: {type(e).__name__}: {e}")
        trace = traceback.format_exc(limit=-6)
        write_row(setting.folder, row_of(job, setting) | {"status": "failed", "error": f"{type(e).__name__}: {e}"})
        with (setting.folder / "errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"{job.name}\n{trace}\n")
        return None


def write_row(folder: Path, row: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows written so far: the last one for each row, seed and protocol counts."""
    path = folder / "results.jsonl"
    if not path.is_file():
        return []
    kept = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        kept[row["row"], row["seed"], json.dumps(row["protocol"])] = row
    return list(kept.values())
