"""While a prepared network trains: schedules, ranges and grids move with `step`, regularizers add up in `penalty`."""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError
from lowbit.estimators import Scheduled
from lowbit.runtime import swap
from lowbit.training.attach import STEP, latent_of, weight_functions
from lowbit.weights import WeightFunction


def step(net: nn.Module, position: "float | None" = None) -> int:
    """Call it once after every optimizer step; returns how many schedules moved.

    position: how much of the training is done, 0 to 1, e.g. (epoch + batch / batches) / epochs. Without it the steps
        are counted against `prepare(..., steps=N)`; the count is part of the state dict, so that training resumes where
        it stood.

    It moves the schedules of weight functions, input functions and layers, keeps latent weights in the range of methods
    that have one, and fits grids again that are not fitted in every forward pass.
    Raises RecipeError if there are schedules and nothing says where they stand, or if torch's first FSDP hides the
    latents (use_orig_params=False).
    """
    swap.check_module(net, "lowbit.step")
    if any(type(p).__name__ == "FlatParameter" for p in net.parameters()):
        raise RecipeError("FullyShardedDataParallel hides the latent weights: give it use_orig_params=True.")
    if position is None:
        position = _counted(net)
    for _, module, function in weight_functions(net):
        function.after_step(_raw(module))
    moved = [m for m in net.modules() if isinstance(m, Scheduled) and m.schedule is not None]
    if moved and position is None:
        raise RecipeError(
            "a method here has a schedule: say where the training stands, lowbit.step(net, position) with position "
            "from 0 to 1, or give its length, lowbit.prepare(net, ..., steps=N)."
        )
    for m in moved:
        m.move(float(position))  # type: ignore[arg-type]
    return len(moved)


def penalty(net: nn.Module) -> Tensor:
    """The sum of what the methods add to the loss, a scalar with a gradient; 0 where none does.

    loss = task_loss + lowbit.penalty(net)

    Raises RecipeError for fully sharded networks, whose weights are elsewhere when the loss is added up or flat.
    """
    terms = _terms(net)
    if any(hasattr(t, "full_tensor") for t in terms):
        raise RecipeError(
            "the weights of this network are sharded over processes: leave the penalty out of the loss and call "
            "lowbit.add_penalty_gradients(net) between loss.backward() and optimizer.step()."
        )
    if terms:
        return torch.stack(terms).sum()
    first = next(net.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


def add_penalty_gradients(net: nn.Module) -> None:
    """Add the gradient of `penalty(net)` to that of the loss: between backward and the optimizer's step, in loops that
    own the loss, and for fully sharded networks.

    Every process of a data-parallel training computes the same one, so it is added after their gradients were averaged.
    """
    terms, params = _terms(net), [p for p in net.parameters() if p.requires_grad]
    if not any(t.requires_grad for t in terms):
        return
    with torch.no_grad():
        for p, g in zip(params, torch.autograd.grad(terms, params, allow_unused=True)):
            if g is None:
                continue
            if hasattr(p, "placements"):
                g = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]  # each keeps its part
            p.grad = g if p.grad is None else p.grad.add_(g)


def _terms(net: nn.Module) -> list[Any]:
    swap.check_module(net, "lowbit.penalty")
    flat = any(type(m).__name__ == "FullyShardedDataParallel" for m in net.modules())
    if flat and any(type(f).penalty is not WeightFunction.penalty for _, _, f in weight_functions(net)):
        raise RecipeError(
            "torch's first FSDP flattens weights, and the penalty of this method needs them whole. Shard with "
            "torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate), or choose a method without a penalty."
        )
    found = (function.penalty(_input(module)) for _, module, function in weight_functions(net))
    return [t for t in found if t is not None]


def _counted(net: nn.Module) -> "float | None":
    """The next position of the network that was prepared with steps=N, which may be wrapped; None without."""
    owner: Any = next((m for m in net.modules() if STEP in m._buffers), None)
    if owner is None:
        return None
    count = owner.get_buffer(STEP)
    count += 1
    return int(count) / max(owner.lowbit_steps, 1)


def _raw(module: Any) -> Tensor:
    """The latent itself if the function sees it directly, else what reaches the function."""
    chain = module.parametrizations["weight"]
    return chain.original if len(chain) == 1 else latent_of(module)


def _input(module: Any) -> Tensor:
    """What reaches the last weight function, with its gradient."""
    chain = module.parametrizations["weight"]
    w = chain.original
    for function in list(chain)[:-1]:
        w = function(w)
    return w
