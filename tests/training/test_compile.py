"""torch.compile on prepared networks: one graph, no break from ours, and schedules that move without a new compile."""

from typing import Any

import pytest
import torch
from torch import nn

from lowbit.training import prepare, step
from lowbit.weights import weight_methods

# torch's own, while it traces an autograd.Function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
QUICK = ("reste", "denseshift", "lsq")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in weight_methods()]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    )


def gradients(n: nn.Module, f: Any, x: torch.Tensor) -> list[torch.Tensor]:
    n.zero_grad()
    f(x).square().sum().backward()
    return [p.grad.clone() for p in n.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_that_follows_the_schedule(name: str) -> None:
    torch._dynamo.reset()
    n, graphs = prepare(net(), name), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(n, fullgraph=True, backend=backend)
    for position in (0.1, 0.6, 0.9):
        if any(m.schedule is not None for m in n.modules() if hasattr(m, "schedule")):
            step(n, position)
        x = torch.randn(3, 2, 8, 8)
        torch.manual_seed(1)
        wanted = gradients(n, n, x)
        torch.manual_seed(1)
        for a, b in zip(wanted, gradients(n, compiled, x)):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1, "compiled again"


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["sign", "pact", "unit", "token", {"method": "lsq", "bits": 2}])
def test_input_functions_are_in_the_graph(activations: Any) -> None:
    torch._dynamo.reset()
    n, x = prepare(net(), {"weights": "xnor", "activations": activations}), torch.randn(3, 2, 8, 8)
    n(x)  # the first batch starts learned scales
    wanted = gradients(n, n, x)
    compiled = torch.compile(n, fullgraph=True, backend="eager")
    for a, b in zip(wanted, gradients(n, compiled, x)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
