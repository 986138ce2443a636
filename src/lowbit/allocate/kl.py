"""KL of outputs: how far the network's predictions move when one item alone is rounded.

    loss_io = mean over samples of KL( p(x; W) || p(x; only item i at option o) )

Needs no labels. Cost: one forward pass an item and option.
Source: ZeroQ (Cai 2020, arXiv:2001.00281), there on distilled data.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array
from lowbit.allocate._spec import Spec
from lowbit.errors import RecipeError


@torch.no_grad()
def run(probe: Probe) -> Array:
    """(items, options), nats a sample. Raises RecipeError where the probe has no outputs."""
    if probe.outputs is None:
        raise RecipeError("the KL of outputs needs a probe with outputs; use 'measured' where only a loss is known.")
    outputs = probe.outputs
    reference = outputs().log_softmax(-1)

    def moved(name: str, label: str, w_hat: Tensor) -> float:
        with probe.placed({name: w_hat}):
            return divergence(reference, outputs())

    return probe.table(moved)


def divergence(reference_log_p: Tensor, logits: Tensor) -> float:
    """Mean KL over all but the last dimension, at least 0."""
    q = logits.log_softmax(-1).flatten(0, -2)
    return max(0.0, float(F.kl_div(q, reference_log_p.flatten(0, -2), log_target=True, reduction="batchmean")))


SPEC = Spec("kl", "KL of outputs with one item rounded", "ZeroQ, arXiv:2001.00281", run, "sensitivity")
