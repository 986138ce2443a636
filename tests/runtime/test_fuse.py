"""A fused network gives what its modules give, bit for bit, in fewer calls."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import KernelError
from lowbit.runtime.fuse import FusedBinaryConv2d, FusedConv2d, fuse
from lowbit.train.networks import resnet

SIGN = {"weights": "binary-channel", "activations": "sign"}


def started(net: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
        for key in ("before", "after", "slope", "shift"):
            if isinstance(getattr(m, key, None), nn.Parameter):
                nn.init.normal_(getattr(m, key), std=0.3)
    return net.eval()


@pytest.mark.parametrize("block, activations", [("single", "signed_rprelu"), ("single", "signed"), ("pair", "signed")])
@pytest.mark.parametrize("rest", [None, "int8-channel"])
def test_a_residual_network(block: str, activations: str, rest: "str | None") -> None:
    net = lowbit.prepare(resnet(depth=8, width=8, activations=activations, block=block), SIGN)
    packed = lowbit.pack(started(net), rest=rest).eval()
    fused, x = fuse(packed, torch.randn(2, 3, 8, 8)), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x)), "the example's sizes are not built in"
    made = [m for m in fused.modules() if isinstance(m, FusedBinaryConv2d)]
    assert sum(m.next_high is not None for m in made) >= len(made) - 3, "bits are passed on"
    assert not any(type(m).__name__ == "RPReLU" for m in fused.modules())
    assert any(not m.want_y for m in made) == (block == "pair"), "without a skip no float is written"


@pytest.mark.parametrize("weights, bits", [("int4-channel", 4), ("ternary-channel", 2)])
def test_a_network_of_few_bits_stays_in_few_bits(weights: str, bits: int) -> None:
    inputs = {"method": "lsq", "bits": bits}
    net = started(lowbit.prepare(resnet(depth=8, width=8), {"weights": weights, "activations": inputs}))
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        net(x)  # starts the inputs' scales
        packed = lowbit.pack(net)
        fused, wanted = fuse(packed, x), packed(x)
        assert (fused(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    made = [m for m in fused.modules() if isinstance(m, FusedConv2d)]
    assert len(made) == 6 and sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 1, "the stem's"
    assert sum(m.next_grid is not None for m in made) == 5 and sum(not m.want_y for m in made) == 3
    assert all(m.relu for m in made), "ReLU, too"


def test_first_and_last_layers_in_int8() -> None:
    net = started(lowbit.prepare(resnet(depth=8, width=8, activations="signed", block="single"), SIGN))
    packed, x = lowbit.pack(net, "int8", rest="int8-channel").eval(), torch.randn(2, 3, 16, 16)
    fused = fuse(packed, x)
    with torch.no_grad():
        assert torch.allclose(fused.fused0(x), packed.bn(packed.stem(x)), atol=1e-4), "the stem with its norm"
        assert torch.isfinite(fused(x)).all()


class Odd(nn.Module):
    """Additions that are none, activations of every kind, a value that two layers of other thresholds read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.prelu, self.relu, self.clamp = nn.PReLU(), nn.ReLU(), nn.Hardtanh()
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 4)
        self.row = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x))
        x = self.relu(self.a(x) + self.row)
        x = self.prelu(self.b(x))
        y = self.c(x)
        z = self.d(self.clamp(y)) + self.e(y) + 1.0
        return self.head((z + z).mean((2, 3)))


def test_what_does_not_fit_is_left_alone() -> None:
    packed = lowbit.pack(started(lowbit.prepare(Odd(), SIGN))).eval()
    x = torch.randn(2, 3, 7, 9)
    fused = fuse(packed, x)
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x))
        assert torch.equal(fused(x[:1, :, :5]), packed(x[:1, :, :5]))


def test_errors() -> None:
    packed = lowbit.pack(started(lowbit.prepare(Odd(), SIGN)))
    with pytest.raises(KernelError, match="eval"):
        fuse(packed.train(), torch.randn(1, 3, 7, 7))
    with pytest.raises(KernelError, match="no convolution to fuse"):
        fuse(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), torch.randn(1, 1, 5, 5))

    class Deciding(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) else x

    with pytest.raises(KernelError, match="cannot follow"):
        fuse(Deciding().eval(), torch.randn(1, 3, 7, 7))
