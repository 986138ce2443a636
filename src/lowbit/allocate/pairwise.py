"""Second-order sensitivity augmented by what items do to each other.

    E_ij = loss(i and j at the lowest option) - loss(i) - loss(j) + loss(neither)
    loss_io = Omega_io + share_io * sum_j E_ij / 2          Omega: hessian_trace;  share: |dW_io|^2 / |dW_i,lowest|^2

Two items whose errors cancel are cheaper together than alone, which no sum of single losses can say.
Cost: items^2 / 2 forward passes; with `among` only the pairs of so many items of largest Omega.
Source: Schaefer 2023 (arXiv:2306.04879); its exact augmentation was not verified, this form is derived.
"""

import numpy as np
import torch

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array
from lowbit.allocate._spec import Spec
from lowbit.allocate.hessian_trace import trace_times_error, traces


def run(probe: Probe, *, draws: int = 16, among: int = 64, seed: int = 0) -> Array:
    """(items, options). The lowest option is each item's with the largest squared error."""
    omega = trace_times_error(probe, {n: float(t.mean()) for n, t in traces(probe, draws, seed).items()})
    error = probe.table(lambda n, _, w_hat: float((w_hat - probe.weights[n].detach()).square().sum()))
    worst = np.where(np.isfinite(error), error, -np.inf).argmax(1)
    rows = np.arange(len(worst))
    chosen = np.argsort(-omega[rows, worst], kind="stable")[:among]
    together = np.zeros(len(worst))
    together[chosen] = interactions(probe, worst, sorted(chosen.tolist())).sum(1)[np.argsort(np.argsort(chosen))]
    share = error / np.maximum(error[rows, worst], 1e-300)[:, None]
    return omega + np.where(np.isfinite(share), share * together[:, None] / 2, np.inf)


@torch.no_grad()
def interactions(probe: Probe, lowest: "np.ndarray", items: "list[int]") -> Array:
    """E (m, m) symmetric, 0 on the diagonal, for the items of these numbers."""
    hats = [(probe.names[i], probe.rounded(probe.names[i], probe.menu[lowest[i]])) for i in items]
    base = float(probe.loss())

    def loss(*members: int) -> float:
        with probe.placed({hats[m][0]: hats[m][1] for m in members}):  # type: ignore[misc]
            return float(probe.loss())

    alone = [loss(m) for m in range(len(hats))]
    e = np.zeros((len(hats), len(hats)))
    for a in range(len(hats)):
        for b in range(a + 1, len(hats)):
            e[a, b] = e[b, a] = loss(a, b) - alone[a] - alone[b] + base
    return e


SPEC = Spec(
    "pairwise",
    "Hessian trace augmented by inter-layer terms",
    "Schaefer 2023, arXiv:2306.04879",
    run,
    "sensitivity",
    {"draws": 16, "among": 64, "seed": 0},
)
