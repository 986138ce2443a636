"""Distilled data: the loss falls, activation ranges come near the real ones, the network is untouched."""

import copy

import pytest
import torch
from torch import nn

from lowbit.errors import ModelError
from lowbit.statistics.distilled import distilled_inputs


def small_cnn():
    torch.manual_seed(0)
    layers = [(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8)]
    return nn.Sequential(*(m for three in layers for m in three))


@pytest.fixture(scope="module")
def trained():
    """A network whose batch norms have seen blurred noise of mean 0 and deviation 1."""
    net = small_cnn()
    real = nn.functional.avg_pool2d(torch.randn(256, 3, 14, 14), 3, stride=1)
    real = (real - real.mean()) / real.std()
    for i in range(60):
        net.train()(real[i % 8 * 32 : i % 8 * 32 + 32])
    return net.eval(), real


@pytest.mark.slow
def test_the_loss_falls_tenfold_and_ranges_are_near_the_real_ones(trained):
    net, real = trained
    before, losses = copy.deepcopy(net.state_dict()), []
    x = distilled_inputs(net, (16, 3, 12, 12), steps=150, progress=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] / 10 and x.shape == (16, 3, 12, 12) and not x.requires_grad
    noise = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        wanted, got, plain = (net(t).flatten(2).std(-1).mean(0) for t in (real, x, noise))
    assert float((got - wanted).norm()) < 0.5 * float((plain - wanted).norm())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(x, distilled_inputs(net, (16, 3, 12, 12), steps=150)), "seeded"


def test_networks_without_batch_norm_are_refused():
    with pytest.raises(ModelError, match="no batch norm"):
        distilled_inputs(nn.Linear(3, 3), (2, 3))
