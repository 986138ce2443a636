"""Mean Hessian trace times squared error: the second-order loss of rounding, averaged over directions.

    Tr(H_i) ~ mean_k v_k^T H v_k   (Hutchinson, v = +-1)        loss_io = Tr(H_i) / n_i * |W^ - W|^2 / 2

One double backward pass a draw serves all items: with independent signs the cross terms between items have mean 0.
(The published form leaves the factor 1/2 out; it changes no choice.)
Source: HAWQ-V2 (Dong 2019, arXiv:1911.03852).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.allocate._probe import Probe
from lowbit.allocate._problem import Array
from lowbit.allocate._spec import Spec


def run(probe: Probe, *, draws: int = 16, seed: int = 0) -> Array:
    """(items, options): Tr(H_i) / n_i * |W^ - W|^2 / 2; negative traces (the loss is no minimum) count as 0."""
    trace = traces(probe, draws, seed)
    return trace_times_error(probe, {n: float(t.mean()) for n, t in trace.items()})


def traces(probe: Probe, draws: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Item -> (draws,) estimates of Tr(H_i); their mean is the estimate, their spread its error."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {n: [] for n in probe.weights}
    for _ in range(draws):
        signs = {n: (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w) for n, w in probe.weights.items()}
        for n, hv in probe.hessian_times(signs).items():
            found[n].append(float((hv * signs[n]).sum()))
    return {n: torch.tensor(t) for n, t in found.items()}


def trace_times_error(probe: Probe, trace: Mapping[str, float]) -> Array:
    """The loss table for known traces."""
    return probe.table(
        lambda n, _, w_hat: (
            0.5 * max(trace[n], 0.0) / w_hat.numel() * float((w_hat - probe.weights[n].detach()).square().sum())
        )
    )


SPEC = Spec(
    "hessian_trace",
    "Mean Hessian trace (Hutchinson) times squared error",
    "HAWQ-V2, arXiv:1911.03852",
    run,
    "sensitivity",
    {"draws": 16, "seed": 0},
)
