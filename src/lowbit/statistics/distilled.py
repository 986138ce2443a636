"""Distilled calibration data: inputs made to excite a network as its training data did, from batch-norm statistics.

    minimise over x   sum over batch norms  |mean(u) - mu|^2 / B + |sd(u) - sd_bn|^2 / B     + the same for x, (0, 1)

u: what enters a batch norm; means and deviations over space, one a sample and channel; sd = sqrt(var + 1e-6). Adam on
x from Gaussian noise, the rate lowered tenfold where the loss stalls. For networks whose training data is not at hand;
a language model has no such statistics.
Source: ZeroQ (Cai 2020, arXiv:2001.00281), reference code's constants.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.errors import ModelError

EPS = 1e-6
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def distilled_inputs(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    steps: int = 500,
    rate: float = 0.5,
    patience: int = 100,
    seed: int = 0,
    progress: "Callable[[int, float], None] | None" = None,
) -> Tensor:
    """Inputs of this shape (batch, channels, ...), float32. The network stays as it is.

    progress(step, loss). Raises ModelError for a network without batch norms that keep statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([x], rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=1e-4)
    training = net.training
    net.eval()
    try:
        for step in range(steps):
            loss = statistics_loss(net, x)
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            value = float(loss.detach())
            schedule.step(value)
            if progress is not None:
                progress(step, value)
    finally:
        net.train(training)
    return x.detach()


def statistics_loss(net: nn.Module, x: Tensor) -> Tensor:
    """How far the batch norms' inputs are from what they saw in training, and x from mean 0 and deviation 1."""
    seen: list[tuple[nn.Module, Tensor]] = []
    norms = [m for m in net.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        raise ModelError("this network has no batch norm with running statistics, so no data can be distilled from it.")
    handles = [m.register_forward_pre_hook(lambda m, u: seen.append((m, u[0]))) for m in norms]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    loss = _distance(x, torch.zeros(1), torch.ones(1))
    for m, u in seen:
        loss = loss + _distance(u, m.running_mean, (m.running_var + EPS) ** 0.5)  # type: ignore[arg-type, operator]
    return loss


def _distance(u: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """u (batch, channels, ...): squared distance of each sample's channel statistics, summed, over the batch size."""
    flat = u.flatten(2) if u.ndim > 2 else u.T[None]
    found_mean, found_sd = flat.mean(-1), (flat.var(-1, unbiased=False) + EPS).sqrt()
    return ((found_mean - mean).square().sum() + (found_sd - sd).square().sum()) / len(flat)
