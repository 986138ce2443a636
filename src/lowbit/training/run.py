"""While a prepared network trains: schedules, ranges and grids move with `step`, regularizers add up in `penalty`."""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError
from lowbit.estimators import Scheduled
from lowbit.training.attach import STEP, latent_of, weight_functions


def step(net: nn.Module, position: "float | None" = None) -> int:
    """Call it once after every optimizer step; returns how many schedules moved.

    position: how much of the training is done, 0 to 1, e.g. (epoch + batch / batches) / epochs. Without it the steps
        are counted against `prepare(..., steps=N)`; the count is part of the state dict, so that training resumes where
        it stood.

    It moves the schedules of weight functions, input functions and layers, keeps latent weights in the range of methods
    that have one, and fits grids again that are not fitted in every forward pass.
    Raises RecipeError if there are schedules and nothing says where they stand.
    """
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
    """
    found = (function.penalty(_input(module)) for _, module, function in weight_functions(net))
    terms = [t for t in found if t is not None]
    if terms:
        return torch.stack(terms).sum()
    first = next(net.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


def _counted(net: nn.Module) -> "float | None":
    steps = getattr(net, "lowbit_steps", None)
    if steps is None:
        return None
    count = net.get_buffer(STEP)
    count += 1
    return int(count) / max(steps, 1)


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
