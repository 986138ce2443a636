"""A prepared network in mixed precision, and on its way to a GPU and back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowbit.training import pack, penalty, prepare, step
from lowbit.weights import weight_methods

QUICK = ("quantize", "s3", "lsq")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in weight_methods()]
X, Y = torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4


def net(method: str) -> nn.Module:
    torch.manual_seed(0)
    n = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.BatchNorm1d(128),
        nn.Linear(128, 4),
    )  # fmt: skip
    return prepare(n, {"weights": method, "activations": {"method": "pact", "bits": 8}}, skip=["6"], keep_ends=False)


def train(n: nn.Module, device: str, dtype: torch.dtype, steps: int) -> list[float]:
    optimizer, losses = torch.optim.SGD(n.parameters(), 0.05, momentum=0.9), []
    for i in range(steps):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(n(X.to(device)).float(), Y.to(device)) + penalty(n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step(n, (i + 1) / steps)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", NAMES)
def test_bfloat16_trains_float_latents(method: str) -> None:
    n = net(method)
    losses = train(n, "cpu", torch.bfloat16, 20)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in n.parameters())
    n.eval()
    with torch.no_grad():
        wanted = n(X)
        assert torch.allclose(pack(n)(X), wanted, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("method", weight_methods())
def test_to_a_gpu_and_back(method: str) -> None:
    n = net(method).to("cuda")
    losses = train(n, "cuda", torch.float32, 12)
    assert sum(losses[-3:]) < sum(losses[:3])
    n.eval()
    with torch.no_grad():
        there = n(X.to("cuda")).cpu()
        n.to("cpu")
        assert torch.allclose(n(X), there, atol=1e-2)
        assert torch.allclose(pack(n)(X), n(X), atol=1e-4)
    train(net(method).to("cuda").to("cpu"), "cpu", torch.float32, 1)
