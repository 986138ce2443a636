"""prepare, pack, summary: what is attached, what is left alone, and that packing changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.errors import FormatError, RecipeError, ShapeError
from lowbit.runtime.artifact import load, save
from lowbit.train.networks import resnet
from lowbit.training import (
    add_penalty_gradients,
    bits_per_weight,
    input_functions,
    pack,
    penalty,
    prepare,
    step,
    summary,
    weight_functions,
)  # fmt: skip


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


X = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8)


def trained(fmt: str) -> nn.Module:
    """A prepared net after one real step."""
    n = prepare(net(), fmt)
    optimizer = torch.optim.SGD(n.parameters(), 0.05)
    n(X).square().mean().backward()
    optimizer.step()
    return n


@pytest.mark.parametrize(
    "fmt", ["int8-channel", "uint4-g12", "int3-channel", "ternary", "binary", "pot3nz", "nf4-g12", "kmeans2"]
)
def test_packed_and_dequantized_paths_agree(fmt: str, tmp_path) -> None:
    n = trained(fmt)
    with torch.no_grad():
        wanted = n(X)
        weights = {name: m.weight.clone() for name, m, _ in weight_functions(n)}
        packed = pack(n)
        got = packed(X)
    for name, w in weights.items():
        assert torch.equal(packed.get_submodule(name).dequantize(), w), "packing changed a weight"
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    save(packed, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", model=net())(X), got)


def test_first_convolution_and_last_linear_stay_float() -> None:
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary"))] == ["3", "6"]
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary", keep_ends=False))] == ["0", "3", "6", "8"]
    assert [name for name, _, _ in weight_functions(prepare(net(), "ternary", skip=["3"]))] == ["6"]
    rules = [{"match": ["3", "none*"], "weights": "int4"}, {"match": "6", "weights": "float"}]
    found = list(weight_functions(prepare(net(), {"weights": "ternary", "layers": rules})))
    assert [name for name, _, _ in found] == ["3"] and found[0][2].format.levels.bits == 4


def test_a_layer_that_stays_float_is_rounded_only_where_a_rule_names_it() -> None:
    def prepared(rules: list) -> list[str]:
        net = resnet(depth=8, width=4, activations="signed", block="single")
        return [n for n, _, _ in weight_functions(prepare(net, {"weights": "binary", "layers": rules}))]

    shortcuts = ["blocks.1.shortcut.conv", "blocks.2.shortcut.conv"]
    assert not set(shortcuts) & set(prepared([]))
    assert set(prepared([{"match": "*shortcut*", "weights": "int8-channel"}])) == {*prepared([]), *shortcuts}


def test_a_single_layer_is_returned_packed() -> None:
    layer = prepare(nn.Linear(16, 4), "int4-channel", keep_ends=False)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.allclose(layer(x), pack(layer)(x), atol=1e-6)


def test_other_parametrizations_come_first() -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    layer = nn.Linear(16, 4)
    parametrize.register_parametrization(layer, "weight", Double())
    n = nn.Sequential(layer, nn.Linear(4, 2))
    assert [name for name, _, _ in weight_functions(prepare(n, "int8-channel"))] == ["0"]
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = n(x)
        assert torch.allclose(pack(n)(x), wanted, atol=1e-6)


def test_bits_are_those_of_the_file(tmp_path) -> None:
    n = prepare(net(), "ternary")
    before = bits_per_weight(n)
    packed = pack(copy.deepcopy(n))
    manifest = save(packed, tmp_path / "out")
    assert bits_per_weight(packed) == before == manifest["summary"]["bits_per_weight"]
    s = summary(packed)
    assert (s.bytes, s.weights) == (manifest["summary"]["bytes"], manifest["summary"]["weights"])
    assert s.bytes == summary(n).bytes and s.bits_per_weight_file == manifest["summary"]["bits_per_weight_file"]
    assert "ternary-channel" in str(s) and bits_per_weight(net()) > 31.9


def test_step_moves_schedules() -> None:
    assert step(prepare(net(), "ternary")) == 0
    n = prepare(net(), {"weights": {"estimator": "reste"}, "activations": {"method": "sign", "estimator": "ede"}})
    assert step(n, 0.5) == 4 == step(n, 1.0)
    assert [float(f.t) for _, _, f in weight_functions(n)] == [3, 3]
    assert [float(f.t) for _, _, f in input_functions(n)] == pytest.approx([10, 10])
    with pytest.raises(RecipeError, match=r"lowbit\.step\(net, position\)"):
        step(n)


def test_counted_steps_are_part_of_the_state() -> None:
    a, b = (prepare(net(), "binary", estimator="reste", steps=10) for _ in range(2))
    for _ in range(4):
        step(a)
    b.load_state_dict(a.state_dict())
    step(a), step(b)
    assert [float(f.t) for _, _, f in weight_functions(a)] == [float(f.t) for _, _, f in weight_functions(b)]
    assert float(next(weight_functions(b))[2].t) == pytest.approx(1 + 2 * (1 - 0.5**0.5))
    assert "lowbit_step" not in pack(b).state_dict()


def test_penalty_is_zero_without_a_method_that_has_one() -> None:
    assert float(penalty(prepare(net(), "ternary"))) == 0


def test_choices_by_layer() -> None:
    n = prepare(
        net(),
        {
            "weights": "ternary",
            "activations": "sign",
            "layers": [
                {"match": "3", "weights": "int4-channel", "activations": "float"},
                {"match": "0", "weights": None},
            ],
            "keep_ends": False,
        },
    )
    assert {name: str(f.format) for name, _, f in weight_functions(n)} == {
        "3": "int4-channel", "6": "ternary-channel", "8": "ternary-channel",
    }  # fmt: skip
    assert [name for name, _, _ in input_functions(n)] == ["0", "6", "8"]


@pytest.mark.parametrize("activations", ["sign", "lsq", "pact", "unit", {"method": "lsq", "bits": 1, "signed": True}])
def test_a_net_with_input_functions_trains_and_packs(activations) -> None:
    n = prepare(net(), {"weights": "binary", "activations": activations}).train()
    optimizer = torch.optim.SGD(n.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        n(X).square().mean().backward()
        assert all(p.grad is not None for _, _, f in input_functions(n) for p in f.parameters())
        optimizer.step()
        step(n, 0.5)
    n.eval()
    with torch.no_grad():
        wanted = n(X)
        got = pack(n)(X)
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    bits = activations in ("sign", "unit") or isinstance(activations, dict)
    assert len(list(input_functions(n))) == (0 if bits else 2), "signs become thresholds of the packed layers"


def test_a_packed_net_with_input_functions_comes_back_from_its_file(tmp_path) -> None:
    n = prepare(net(), {"weights": "binary", "activations": "sign"})
    with torch.no_grad():
        n[3].input_function.shift.uniform_(-1, 1)
        packed = pack(n)
        wanted = packed(X)
        save(packed, tmp_path / "out")
        same = prepare(net(), {"weights": "float", "activations": "sign"})
        assert torch.equal(load(tmp_path / "out", model=same)(X), wanted)


def test_a_tied_weight_is_an_error() -> None:
    n = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
    n[2].weight = n[0].weight
    prepare(copy.deepcopy(n), "ternary")  # the tied one is the last layer, which stays
    with pytest.raises(RecipeError, match=r"^2: its weight is tied to 0\.weight.*skip=\['2'\]"):
        prepare(n, "ternary", keep_ends=False)


def test_a_frozen_weight_is_a_warning() -> None:
    n = net()
    n[3].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"will not learn: 3\. Set requires_grad_"):
        prepare(n, "ternary")


def test_unsupported_layers_are_a_warning() -> None:
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    n = nn.ModuleDict({
        "lstm": nn.LSTM(4, 4), "own": Own(4, 4), "attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm1d(4),
        "a": nn.Linear(4, 4), "b": nn.Linear(4, 4),
    })  # fmt: skip
    message = r"lstm \(LSTM\), own \(Own\), attention \(MultiheadAttention\)\. Only nn\.Linear"
    with pytest.warns(UserWarning, match=message):
        prepare(n, "ternary")
    assert [name for name, _, _ in weight_functions(n)] == ["a"]  # nothing inside the attention


def test_unknown_words() -> None:
    for recipe, message in (
        ({"wieghts": "s3"}, "unknown field 'wieghts'.*Did you mean 'weights'"),
        ({"weights": {"method": "quantise"}}, "unknown weights 'quantise'.*Did you mean 'quantize'"),
        ({"weights": {"format": "binary", "estimater": "ede"}}, "no option 'estimater'. Did you mean 'estimator'"),
        ({"weights": "binary", "activations": "sing"}, "unknown activations 'sing'. Did you mean 'sign'"),
        ({"weights": "binary", "activations": {"method": "sign", "bits": 2}}, "'sign' have no option 'bits'"),
        ({"weights": "binary", "layers": [{"weights": "s3"}]}, "an entry of `layers` is"),
        ({"weights": "binary", "layers": [{"match": "3", "weight": "s3"}]}, "'weight'.*Did you mean 'weights'"),
        ({"weights": "int4", "activations": "sign", "layers": [], "skip": "*"}, "there is no layer to quantize"),
    ):
        with pytest.raises(RecipeError, match=message):
            prepare(net(), recipe)
    with pytest.raises(RecipeError, match="^3: estimator 'ede' is made for the two levels"):
        prepare(net(), "ternary", estimator="ede")
    with pytest.raises(FormatError, match="unknown level set.*'quantise'.*Nor is it a method. Did you mean 'quantize'"):
        prepare(net(), "quantise")


def test_messages() -> None:
    with pytest.raises(RecipeError, match=r"call lowbit\.prepare"):
        pack(net())
    with pytest.raises(RecipeError, match="prepared already"):
        prepare(prepare(net(), "ternary"), "binary")
    with pytest.raises(RecipeError, match="keep_ends=False"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "ternary")
    with pytest.raises(ShapeError, match=r"^3: in_features=36 is not a multiple of group=64"):
        prepare(net(), "int4-g64")
    with pytest.raises(FormatError, match="unknown level set"):
        prepare(net(), "ternery")


class FullyShardedDataParallel(nn.Sequential):
    """Goes by the name of torch's first FSDP, which flattens parameters."""


class FlatParameter(nn.Parameter):
    """As torch's, without use_orig_params."""


def test_flattened_weights_have_no_penalty_and_are_not_hidden() -> None:
    wrapped = FullyShardedDataParallel(prepare(net(), "s3"))
    with pytest.raises(RecipeError, match="fully_shard"):
        add_penalty_gradients(wrapped)
    plain = FullyShardedDataParallel(prepare(net(), "twn"))
    assert penalty(plain) == 0 and step(plain) == 0
    plain.flat = FlatParameter(torch.zeros(3))
    with pytest.raises(RecipeError, match="use_orig_params=True"):
        step(plain)
