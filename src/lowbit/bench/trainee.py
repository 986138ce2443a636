"""One network of the method table in training: its tensors, one step, evaluation, checkpoint.

Everything a step reads lies in tensors that stay where they are (batch order, learning rate and schedules as tables,
the step's number), so on a GPU one step is captured once as a CUDA graph and only replayed; on the CPU the same step
runs as it stands. The whole data set lies on the device; crops and flips are gathered from padded images there.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowbit.bench.rows import Protocol, Row
from lowbit.errors import ArtifactError
from lowbit.train.device_images import PAD, DeviceImages
from lowbit.train.networks import quantized_names, resnet

Loss = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]


def plain_loss(net: nn.Module, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the network that computes with these tensors in place of its own."""
    return F.cross_entropy(functional_call(net, tensors, (x,)), y)


class Trainee:
    """`row` with one seed under `protocol`. Call `step` (or replay its graph) `total` times.

    template: a network of the row's structure, shared by trainees: its own values are never used
    """

    def __init__(
        self, row: Row, protocol: Protocol, seed: int, data: DeviceImages, device: torch.device,
        dtype: torch.dtype = torch.float32, template: "nn.Module | None" = None, loss: Loss = plain_loss,
    ):  # fmt: skip
        self.row, self.protocol, self.seed, self.data = row, protocol, seed, data
        self.device, self.dtype, self.loss = device, dtype, loss
        self.method = row.make()
        torch.manual_seed(seed)
        net = new_network(row, protocol)
        self.template = template if template is not None else new_network(row, protocol).to(device)
        self.names = quantized_names(net)
        self._split(net)
        self.steps = len(data.y) // protocol.batch
        self.total = self.steps * protocol.epochs
        self.table = self._schedule_table().to(device)
        self.draws = torch.zeros(self.steps, 4, protocol.batch, dtype=torch.int64, device=device)
        self.k = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.momentum = [torch.zeros_like(p) for p in self.trained.values()]
        self.done, self.seconds, self.curve, self.losses = 0, 0.0, [], []  # type: ignore[var-annotated]
        self._host = [torch.empty(self.draws.shape, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in "ab"]
        self.load_draws()

    def _split(self, net: nn.Module) -> None:
        """Parameters into stacks of equal shape (layers, out, kh * kw * in), and the rest."""
        params = dict(net.named_parameters())
        groups: dict[torch.Size, list[str]] = {}
        for name in self.names:
            groups.setdefault(params[f"{name}.weight"].shape, []).append(name)
        self.groups = list(groups.items())
        self.latents = []
        for shape, names in self.groups:
            flat = [params[f"{n}.weight"].detach().permute(0, 2, 3, 1).reshape(shape[0], -1) for n in names]
            self.latents.append({k: v.to(self.device) for k, v in self.method.latents(torch.stack(flat)).items()})
        taken = {f"{n}.weight" for n in self.names}
        self.others = {n: _on(p.detach(), self.device) for n, p in params.items() if n not in taken}
        self.buffers = {n: b.detach().clone().to(self.device) for n, b in net.named_buffers()}
        self.trained = dict(self.others)
        for i, p in enumerate(self.latents):
            self.trained |= {f"stack{i}.{k}": v for k, v in p.items() if not k.startswith("fixed_")}
        for tensor in self.trained.values():
            tensor.requires_grad_(True)

    def _schedule_table(self) -> Tensor:
        """(steps in all, 1 + schedule values): learning rate and what the method and the activations need."""
        p, rows, stage = self.protocol, [], -(-self.total // self.method.stages)
        for k in range(self.total):
            epoch, progress = k % stage / self.steps, k / max(self.total - 1, 1)
            warm = min(1.0, (epoch + 1 / self.steps) / p.warmup) if p.warmup else 1.0
            falling = 0.5 * (1 + math.cos(math.pi * (k % stage) / stage))
            rows.append((p.lr * warm * falling, *self.method.schedule(progress)))
        return torch.tensor(rows, dtype=torch.float32).reshape(self.total, -1)

    def load_draws(self) -> None:
        """The order, crops and flips of the epoch that begins: they depend on seed and epoch alone."""
        epoch, n, shape = self.done // self.steps, len(self.data.y), (self.steps, self.protocol.batch)
        draw = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        host = self._host[epoch % 2]
        host[:, 0] = torch.randperm(n, generator=draw)[: self.steps * self.protocol.batch].reshape(shape)
        host[:, 1:3] = torch.randint(0, 2 * PAD + 1, (self.steps, 2, self.protocol.batch), generator=draw)
        host[:, 3] = torch.randint(0, 2, shape, generator=draw)
        self.draws.copy_(host, non_blocking=True)

    def step(self) -> None:
        """One batch: forward, backward, update. Reads and writes the trainee's tensors only."""
        x, y = self.data.batch(self.draws.index_select(0, self.k % self.steps)[0], self.dtype)
        lr, *t = self.table.index_select(0, self.k)[0].unbind()
        loss = self.loss(self.template, self._tensors(tuple(t)), x, y)
        terms = [term for p in self.latents if (term := self.method.penalty(p)) is not None]
        grads = torch.autograd.grad(sum(terms, loss), list(self.trained.values()))
        with torch.no_grad():
            self._update(list(grads), lr)
            for p in self.latents:
                self.method.after(p)
            self.loss_sum += loss.detach()
            self.k += 1

    def _tensors(self, t: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Every parameter and buffer by the template's names, weights through the method."""
        out = {n: p.to(self.dtype) if p.ndim == 4 else p for n, p in self.others.items()}
        for p, (shape, names) in zip(self.latents, self.groups):
            out |= _by_layer(self.method.weight(p, t).to(self.dtype), shape, names)
        return out | self.buffers | {n: t[-1] for n in self.buffers if n.endswith(".sign.o") and t}

    def _update(self, grads: list[Tensor], lr: Tensor) -> None:
        """SGD with momentum; weight decay on everything but normalizations, biases, shifts and scales."""
        params = [p.detach() for p in self.trained.values()]
        decayed = [i for i, (name, p) in enumerate(self.trained.items()) if _decays(name, p)]
        torch._foreach_add_([grads[i] for i in decayed], [params[i] for i in decayed], alpha=self.protocol.decay)
        torch._foreach_mul_(self.momentum, self.protocol.momentum)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_sub_(params, torch._foreach_mul(self.momentum, lr))

    @torch.no_grad()
    def hard_tensors(self) -> dict[str, Tensor]:
        """As `_tensors`, with the levels and scales that are packed (scales as float16 keeps them), in float32."""
        out: dict[str, Tensor] = dict(self.others) | self.buffers
        for p, (shape, names) in zip(self.latents, self.groups):
            levels, scale = self.method.hard(p)
            scale = scale if self.row.bits == 32 else scale.half().float()
            out |= _by_layer(levels * scale, shape, names)
        return out

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of test images that the network with hard weights gets right, in float32."""
        tensors, right = self.hard_tensors(), torch.zeros((), device=self.device)
        self.template.eval()
        for x, y in self.data.test_batches():
            right += (functional_call(self.template, tensors, (x,)).argmax(1) == y).sum()
        self.template.train()
        return float(right) / len(self.data.y_test)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """For a file: `<layer>.levels` int16 (out, in, kh, kw) and `<layer>.scale`; all else as it is."""
        out = {n: t.detach().clone() for n, t in (self.others | self.buffers).items() if not n.endswith(".sign.o")}
        for p, (shape, names) in zip(self.latents, self.groups):
            levels, scale = self.method.hard(p)
            by_layer = _by_layer(levels, shape, names)
            if self.row.bits == 32:
                out |= by_layer
                continue
            for i, name in enumerate(names):
                out[f"{name}.levels"] = by_layer[f"{name}.weight"].round().to(torch.int16)
                out[f"{name}.scale"] = scale[i].half().float()
        return {n: t.cpu().contiguous() for n, t in out.items()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name: what a checkpoint holds."""
        out = {f"trained.{n}": t.detach() for n, t in self.trained.items()}
        out |= {f"momentum.{n}": m for n, m in zip(self.trained, self.momentum)}
        return out | {f"buffer.{n}": b for n, b in self.buffers.items()} | {"k": self.k, "loss_sum": self.loss_sum}

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        from safetensors.torch import save_file

        text = {"identity": self.identity(), "done": self.done, "seconds": self.seconds}
        text |= {"curve": self.curve, "losses": self.losses}
        temporary = path.with_suffix(".part")
        save_file({n: t.cpu().contiguous() for n, t in self.state().items()}, temporary, {"trainee": json.dumps(text)})
        temporary.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ArtifactError if it is of another row, seed, protocol or data set."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                text = json.loads((file.metadata() or {})["trainee"])
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as e:
            raise ArtifactError(f"{path} is no whole checkpoint ({e}); delete it to begin again.") from None
        if text["identity"] != self.identity():
            raise ArtifactError(f"{path} is a checkpoint of another run: give another folder, or delete it.")
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(tensors[name])
        self.done, self.seconds, self.curve, self.losses = (text[k] for k in ("done", "seconds", "curve", "losses"))
        self.load_draws()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on."""
        p = self.protocol
        settings = {k: getattr(p, k) for k in p.__dataclass_fields__}
        return {
            "row": self.row.name,
            "seed": self.seed,
            "images": len(self.data.y),
            "dtype": str(self.dtype),
        } | settings


def new_network(row: Row, protocol: Protocol) -> nn.Module:
    """The row's network in channels_last, without batch counters."""
    net = resnet(**protocol.network, activations=row.activations, block=row.block)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.num_batches_tracked = None
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _on(p: Tensor, device: torch.device) -> Tensor:
    copy = p.detach().clone().to(device)
    return copy.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else copy


def _by_layer(stack: Tensor, shape: torch.Size, names: list[str]) -> dict[str, Tensor]:
    """(layers, out, kh * kw * in) -> (out, in, kh, kw) of each layer, in channels_last without a copy."""
    out, in_, kh, kw = shape
    layers = stack.reshape(len(names), out, kh, kw, in_).unbind(0)
    return {f"{name}.weight": w.permute(0, 3, 1, 2) for name, w in zip(names, layers)}


def _decays(name: str, p: Tensor) -> bool:
    if name.startswith("stack"):
        return not name.endswith(".scale")
    return p.ndim > 1
