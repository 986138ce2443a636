"""Measured loss: what the loss becomes when one item alone goes to an option.

    loss_io = loss(item i at option o, the others at `base`) - loss(all at `base`)          base: float, or an option

The yardstick of the others. Cost: one forward pass an item and option.
"""

import numpy as np
import torch
from torch import Tensor

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array
from lowbit.allocate._spec import Spec


@torch.no_grad()
def run(probe: Probe, *, base: str = "") -> Array:
    """(items, options); can be negative. base: an option's label, or "" for the float weights."""
    if base and base not in probe.menu:
        raise ValueError(f"base {base!r} is not one of {probe.menu}")
    others = probe.chosen(np.full(len(probe.weights), probe.menu.index(base))) if base else {}
    with probe.placed(others):
        reference = float(probe.loss())

        def risen(name: str, label: str, w_hat: Tensor) -> float:
            with probe.placed({name: w_hat}):
                return float(probe.loss()) - reference

        return probe.table(risen)


SPEC = Spec("measured", "Loss with one item rounded", "-", run, "sensitivity", {"base": ""})
