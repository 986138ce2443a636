"""Networks that are not language models: inputs as calibration, biases corrected, batch norms counted again."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import DataError, RecipeError
from lowbit.pipeline.network import batches_of, call_counts, patches, reestimate
from lowbit.train.architectures.lstm import LSTM


class Small(nn.Module):
    """A residual network with batch norms, strides, padding, a dilation, groups and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.one = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 32, 3, stride=2, padding="valid", dilation=(1, 2))
        self.each = nn.Conv2d(32, 32, 3, groups=32, padding=1)
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.norm(self.one(x)).relu()
        x = F.relu(self.each(F.relu(self.two(x))))
        return self.head(self.hidden(x.mean((2, 3))).relu())


@pytest.fixture
def net() -> Small:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(64, 3, 12, 12) * 2 + 1
    net.train()
    for _ in range(30):
        net(x)
    return net.eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 + 1


def error(packed: nn.Module, net: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((packed(x) - net(x)).square().sum() / net(x).square().sum())


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(4, 6, (3, 5), padding="same"),
    nn.Conv2d(4, 6, 2, padding="valid"),
    nn.Linear(9, 6),
])  # fmt: skip
def test_patches_are_what_the_layer_multiplies(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 8, 9)
    y = patches(layer, x) @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    expected = layer(x).detach()
    y = y.reshape(expected.shape) if isinstance(layer, nn.Linear) else y.reshape(2, -1, 6).transpose(1, 2)
    torch.testing.assert_close(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_layers_in_the_order_of_their_calls(net: Small, inputs: Tensor) -> None:
    assert list(call_counts(net, inputs[:2])) == ["first", "one", "two", "each", "hidden", "head"]


def test_inputs_make_it_better_than_rounding_alone(net: Small, inputs: Tensor) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fresh = torch.randn(64, 3, 12, 12) * 2 + 1
    alone = lowbit.compress(net, "rtn", bits=3, group=-1)
    solved = lowbit.compress(net, "gptq", bits=3, group=-1, data=inputs)
    assert error(solved, net, fresh) < 0.5 * error(alone, net, fresh)
    assert error(lowbit.compress(net, "icquant", bits=3, data=inputs), net, fresh) < error(alone, net, fresh)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the network itself stays as it is"
    assert isinstance(solved.first, nn.Conv2d) and isinstance(solved.head, nn.Linear), "first and last stay in float"


def test_biases_and_norms_take_up_the_shift(net: Small, inputs: Tensor) -> None:
    solved = lowbit.compress(net, "rtn", bits=2, group=-1, data=[inputs[:48], inputs[48:]])
    seen: dict[str, list[Tensor]] = {"hidden": []}
    for model in (net, solved):
        model.get_submodule("hidden").register_forward_hook(lambda m, x, y: seen["hidden"].append(y.mean(0)))
        with torch.no_grad():
            model(inputs)
    torch.testing.assert_close(seen["hidden"][1], seen["hidden"][0], rtol=0.02, atol=0.02)
    means = {}
    for name, model in (("float", net), ("rounded", solved)):
        model.norm.register_forward_pre_hook(lambda m, x, name=name: means.__setitem__(name, x[0].mean((0, 2, 3))))
        with torch.no_grad():
            model(inputs)
    shift = means["rounded"] - means["float"]
    assert shift.abs().max() > 1e-3
    torch.testing.assert_close(solved.norm.running_mean, net.norm.running_mean + shift, rtol=1e-3, atol=1e-3)


def test_a_network_without_change_keeps_its_statistics_and_its_mode(net: Small, inputs: Tensor) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert reestimate(net, copy.deepcopy(net), [inputs[:7]]) == 1
    assert not net.training and not net.norm.training and net.norm.momentum == 0.1
    for k, v in net.state_dict().items():
        torch.testing.assert_close(v, before[k])


def test_a_recurrent_network_counts_every_call() -> None:
    torch.manual_seed(0)
    net = LSTM("characters", (), 20, 32, 1).eval()
    ids = torch.randint(20, (24, 12))
    assert call_counts(net, ids)["layers.0.hidden"] == 12
    solved = lowbit.compress(net, "gptq", bits=4, group=-1, data=ids)
    assert error(solved, net, torch.randint(20, (16, 12))) < error(
        lowbit.compress(net, "rtn", bits=4, group=-1), net, ids
    )


def test_what_cannot_be_is_refused(net: Small, inputs: Tensor) -> None:
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        lowbit.compress(net, "gptq", bits=4, group=-1)
    with pytest.raises(RecipeError, match="use gptq or icquant"):
        lowbit.compress(net, "awq", bits=4, group=-1, data=inputs)
    for wrong in ("a text", [], torch.zeros(0, 3, 12, 12), torch.tensor(1.0)):
        with pytest.raises(DataError, match="calibrated on its inputs"):
            batches_of(wrong)
