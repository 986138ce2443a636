"""Run by test_accelerate.py in two processes: train a prepared network through accelerate, and compare.

python -m torch.distributed.run --nproc-per-node 2 two_processes.py ddp|fsdp WEIGHTS ACTIVATIONS FOLDER
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

import lowbit

HOW, WEIGHTS, ACTIVATIONS = sys.argv[1:4]
FOLDER = Path(sys.argv[4])
STEPS = 6
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 4


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.prepare(net, {"weights": WEIGHTS, "activations": ACTIVATIONS}, keep_ends=False, steps=STEPS)
    net(X)  # learned scales begin with all examples, in one process and in two
    return net


def train(net: Any, optimizer: Any, steps: range, backward: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    for _ in steps:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        backward(loss)
        lowbit.add_penalty_gradients(net)
        optimizer.step()
        lowbit.step(net)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 0.01)


class DataParallel:
    """Through accelerate: every process has the whole network."""

    def __init__(self) -> None:
        self.acc = Accelerator(cpu=True)

    def ready(self) -> tuple[Any, Any]:
        self.acc._models.clear(), self.acc._optimizers.clear()
        net = network()
        return self.acc.prepare(net, adamw(net))

    def backward(self, loss: torch.Tensor) -> None:
        self.acc.backward(loss)

    def save(self, net: Any, optimizer: Any) -> None:
        self.acc.save_state(str(FOLDER))

    def load(self, net: Any, optimizer: Any) -> None:
        self.acc.load_state(str(FOLDER))

    def whole(self, net: Any) -> dict[str, torch.Tensor]:
        return {k: v.detach().clone() for k, v in self.acc.get_state_dict(net).items()}


class FullySharded:
    """What accelerate's FSDP calls (its own wrapper is for GPUs only): each process holds half of every weight."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        torch.distributed.init_process_group("gloo")
        self.mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        self.options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def ready(self) -> tuple[Any, Any]:
        from torch.distributed.fsdp import fully_shard

        net = network()
        for layer in net:
            if hasattr(layer, "parametrizations"):
                fully_shard(layer, mesh=self.mesh)
        fully_shard(net, mesh=self.mesh)
        return net, adamw(net)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def save(self, net: Any, optimizer: Any) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        self.kept = copy.deepcopy(get_state_dict(net, optimizer, options=self.options))

    def load(self, net: Any, optimizer: Any) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, state = self.kept
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state, options=self.options)

    def whole(self, net: Any) -> dict[str, torch.Tensor]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return copy.deepcopy(get_model_state_dict(net, options=self.options))


def main() -> None:
    way = DataParallel() if HOW == "ddp" else FullySharded()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = X[rank::world], Y[rank::world]
    net, optimizer = way.ready()
    train(net, optimizer, range(3), way.backward, *mine)
    way.save(net, optimizer)
    train(net, optimizer, range(3), way.backward, *mine)
    found = way.whole(net)
    again, optimizer = way.ready()
    way.load(again, optimizer)
    train(again, optimizer, range(3), way.backward, *mine)
    resumed = way.whole(again)
    if rank == 0:
        compare(found, resumed)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(found: dict[str, torch.Tensor], resumed: dict[str, torch.Tensor]) -> None:
    alone = network()
    train(alone, adamw(alone), range(STEPS), lambda loss: loss.backward(), X, Y)
    wanted = alone.state_dict()
    assert found.keys() == wanted.keys() == resumed.keys()
    for name in wanted:
        assert torch.equal(found[name], resumed[name]), f"{name}: not as without the interruption"
        a, b = found[name].float(), wanted[name].float()
        assert torch.allclose(a, b, atol=5e-5), f"{name}: not as in one process, {(a - b).abs().max():.1e}"
    alone.load_state_dict(found)
    alone.eval()
    with torch.no_grad():
        scores = alone(X)
        assert torch.allclose(lowbit.pack(alone)(X), scores, atol=1e-4)
    print("ALL THE SAME")


if __name__ == "__main__":
    main()
