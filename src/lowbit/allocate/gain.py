"""First-order gain at the quantized point: what moving one item from where it is to another option will bring.

    g = grad loss at W~ = Q(W; choice)          loss_io = -< g_i, W~_i - Q_o(W_i) >

At the float optimum gradients are nearly 0 and first-order scores are noise; at the quantized weights they are not.
The table is relative to the point it was taken at (0 for the option an item has) and valid near it only.
signed=False sums |g * (W~ - Q_o)| instead: sign-free, with the sign of the change in squared error.
Cost: one backward pass for all. Source: ScaleBITS (Li 2026, arXiv:2602.17698); formula derived.
"""

import numpy as np

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array, Choice
from lowbit.allocate._spec import Spec


def run(probe: Probe, *, choice: "Choice | None" = None, signed: bool = True) -> Array:
    """(items, options). choice: the options items have now; None takes the menu's last for all."""
    choice = np.full(len(probe.weights), len(probe.menu) - 1) if choice is None else choice
    here = probe.chosen(choice)
    with probe.placed(here):
        g = probe.gradients()

    def change(name: str, label: str, w_hat):  # type: ignore[no-untyped-def]
        product = g[name] * (w_hat - here[name])
        if signed:
            return float(product.sum())
        w = probe.weights[name].detach()
        better = (w_hat - w).square().sum() < (here[name] - w).square().sum()
        return float(product.abs().sum()) * (-1.0 if better else 1.0)

    return probe.table(change)


SPEC = Spec(
    "gain",
    "First-order gain at the quantized point",
    "ScaleBITS, arXiv:2602.17698",
    run,
    "sensitivity",
    {"choice": None, "signed": True},
)
