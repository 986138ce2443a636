"""Largest Hessian eigenvalue: how sharply the loss can rise when one item's weights move.

    v <- H v / |H v|   (power iteration on the item's own diagonal block)      loss_io = lambda_i * |W^ - W|^2 / 2

An upper bound of the second-order loss of rounding item i alone. HAWQ orders layers by lambda_i / n_i for their width
and by lambda_i * |dW|^2 for fine-tuning; `eigenvalues` gives lambda_i for either.
Cost: `steps` double backward passes an item. Source: HAWQ (Dong 2019, arXiv:1905.03696).
"""

import torch

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array
from lowbit.allocate._spec import Spec


def run(probe: Probe, *, steps: int = 20, tolerance: float = 1e-3, seed: int = 0) -> Array:
    """(items, options): lambda_i |W^ - W|^2 / 2."""
    sharpness = eigenvalues(probe, steps, tolerance, seed)
    return probe.table(
        lambda n, _, w_hat: 0.5 * abs(sharpness[n]) * float((w_hat - probe.weights[n].detach()).square().sum())
    )


def eigenvalues(probe: Probe, steps: int = 20, tolerance: float = 1e-3, seed: int = 0) -> dict[str, float]:
    """The eigenvalue of largest magnitude of each item's block of the Hessian, with its sign (Rayleigh quotient)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, w in probe.weights.items():
        v = torch.randn(w.shape, generator=generator)
        v = (v / v.norm()).to(w)
        value = 0.0
        for _ in range(steps):
            hv = probe.hessian_times({name: v})[name]
            before, value = value, float((v * hv).sum())
            norm = float(hv.norm())
            if norm == 0 or abs(value - before) <= tolerance * abs(value):
                break
            v = hv / norm
        found[name] = value
    return found


SPEC = Spec(
    "hessian_eigenvalue",
    "Largest Hessian eigenvalue times squared error",
    "HAWQ, arXiv:1905.03696",
    run,
    "sensitivity",
    {"steps": 20, "tolerance": 1e-3, "seed": 0},
)
