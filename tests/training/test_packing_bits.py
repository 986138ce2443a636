"""Networks of 1-bit weights and 1-bit inputs, packed: the same levels, the same classes, the same file."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import ArtifactError
from lowbit.runtime.binary_layers import PackedBinaryConv2d, PackedBinaryLinear
from lowbit.runtime.conv_layer import PackedConv2d
from lowbit.runtime.fuse import fuse
from lowbit.runtime.layers import PackedLinear
from lowbit.train.networks import resnet

SIGN = {"weights": "binary-channel", "activations": {"method": "sign", "estimator": "approxsign"}}


class Net(nn.Module):
    """A layer of every kind, with what a batch-norm may hold: negative, zero and large gammas."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 10, 1)
        self.linear, self.norm1 = nn.Linear(40, 9, bias=False), nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 4)
        for norm in (self.norm, self.norm1):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            norm.weight.data[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.conv(self.stem(x).relu())))
        return self.head(self.norm1(self.linear(x.flatten(1))))


def prepared(recipe: dict, x: Tensor) -> nn.Module:
    torch.manual_seed(1)
    net = lowbit.prepare(Net(), recipe)
    for m in net.modules():
        if getattr(m, "shift", None) is not None:
            nn.init.normal_(m.shift)
    with torch.no_grad():
        net.eval()(x)  # starts learned scales
    return net


def images() -> Tensor:
    return torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", ["binary-channel", "ternary-channel", "binary-tensor", "bnn", "lsq"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"method": "sign"},
        {"method": "sign", "shift": False, "estimator": "clipped"},
        {"method": "unit"},
        {"method": "lsq", "bits": 1, "signed": True},
        {"method": "pact", "bits": 1, "alpha": 0.7},
    ],
)
def test_packed_and_trained_agree(weights: str, inputs: dict, tmp_path) -> None:
    x = images()
    chosen = {"method": "lsq", "format": "binary-channel"} if weights == "lsq" else weights
    net = prepared({"weights": chosen, "activations": inputs}, x)
    wanted = copy.deepcopy(net).double()(x.double()).detach()
    packed = lowbit.pack(net)
    assert isinstance(packed.conv, PackedBinaryConv2d) and isinstance(packed.linear, PackedBinaryLinear)
    assert isinstance(packed.norm, nn.Identity) and isinstance(packed.norm1, nn.Identity), "folded"
    y = packed(x)
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    lowbit.save(packed, tmp_path / "out")
    loaded = lowbit.load(tmp_path / "out", model=Net())
    assert torch.equal(loaded(x), y)
    cast = copy.deepcopy(loaded.conv).half()
    assert all(torch.equal(t, getattr(loaded.conv, key)) for key, t in cast.named_buffers()), "casts leave bits alone"
    lowbit.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_periodic_sign_and_wide_inputs_stay_as_they_were() -> None:
    x = images()
    for inputs in ({"method": "sign", "estimator": "biper"}, {"method": "lsq", "bits": 2}):
        net = prepared({"weights": "binary-channel", "activations": inputs}, x)
        wanted = net(x).detach()
        packed = lowbit.pack(net)
        assert isinstance(packed.conv, PackedConv2d) and isinstance(packed.norm, nn.BatchNorm2d)
        assert torch.allclose(packed(x), wanted, atol=1e-4)


def test_bytes_are_counted_and_the_rest_is_rounded(tmp_path) -> None:
    net = prepared(SIGN, images())
    packed = lowbit.pack(net, rest="int8-channel")
    assert isinstance(packed.stem, PackedConv2d) and isinstance(packed.head, PackedLinear)
    manifest = lowbit.save(packed, tmp_path / "out")
    assert manifest["summary"]["bytes"] == lowbit.summary(packed).bytes
    row = manifest["layers"]["conv"]
    assert row["type"] == "binary_conv2d" and row["bytes"] == 12 * 4 * 9 // 8 + 4 * 12
    assert row["binary"]["folded"] == ["norm"] and row["binary"]["extras"] == {"high": [8]}
    loaded = lowbit.load(tmp_path / "out", model=Net())
    assert torch.equal(loaded(images()), packed(images()))


def test_a_norm_that_others_use_too_is_not_folded() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.stem(x))
            x = self.point(self.norm(x) + x)
            return self.head(self.norm1(self.linear(x.flatten(1))))

    class Deciding(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) != 0 else x

    for cls, folded in ((Shared, "linear"), (Deciding, None)):
        net = lowbit.prepare(cls().eval(), SIGN)
        wanted = net(images()).detach()
        packed = lowbit.pack(net)
        assert isinstance(packed.norm, nn.BatchNorm2d)
        assert isinstance(packed.norm1, nn.Identity) == (folded == "linear")
        assert torch.allclose(packed(images()), wanted, atol=1e-4)


def change(folder, edit) -> None:
    """Edit lowbit.json and config.json alike, with a right checksum."""
    from lowbit.runtime import manifest as mf
    from lowbit.runtime.strict_json import canonical_json

    manifest = json.loads((folder / "lowbit.json").read_text())
    edit(manifest["layers"])
    config = canonical_json({"quantization_config": mf.quantization_config(manifest)}).encode()
    (folder / "config.json").write_bytes(config)
    manifest["files"]["config.json"] = {"bytes": len(config), "sha256": mf.sha256_file(folder / "config.json")}
    (folder / "lowbit.json").write_bytes(mf.dump_manifest(manifest))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("folded", ["stem"], "was packed as the batch-norm"),
        ("folded", ["../norm"], "no module or tensor name"),
        ("folded", [], "needs 'norm.weight'"),
        ("folded", 3, "binary"),
        ("extras", {"high": [7]}, "is \\(8,\\), not \\(7,\\)"),
        ("extras", {"hihg": [8]}, "impossible extras"),
        ("extras", {"high": [-8]}, "impossible extras"),
        ("extras", {"high": "8"}, "impossible extras"),
        ("extras", {}, "has no place"),
        ("inputs", "analog", "unknown"),
        ("pad", 5, "pad=5"),
    ],
)
def test_a_changed_manifest_is_an_error(key: str, value, message: str, tmp_path) -> None:
    lowbit.save(lowbit.pack(prepared(SIGN, images())), tmp_path / "out")
    change(tmp_path / "out", lambda layers: layers["conv"]["binary"].update({key: value}))
    with pytest.raises(ArtifactError, match=message):
        lowbit.load(tmp_path / "out", model=Net())


FLOAT = {"weights": "float"}
INT8 = {"weights": "int8-channel", "activations": {"method": "lsq", "bits": 7, "signed": True}}
ENDS = SIGN | {"keep_ends": False, "layers": [{"match": name} | INT8 for name in ("stem", "head", "*shortcut*")]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "block, activations, recipe",
    [("single", "signed_rprelu", SIGN), ("single", "signed", ENDS)],
)
def test_a_trained_network_keeps_its_classes(block: str, activations: str, recipe: dict, tmp_path) -> None:
    """Digits, a hundred steps: the same class for 99.9 % of the images, logits within 1 % of the largest."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target).long()
    make = {"depth": 8, "width": 8, "activations": activations, "block": block, "channels": 1, "stem_stride": 2}
    net = lowbit.prepare(resnet(**make), recipe)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(100):
        at = torch.arange(step * 64, step * 64 + 64) % 1500
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        wanted = net(x)
    lowbit.save(lowbit.pack(net), tmp_path / "out")
    inputs = [{"match": r["match"], "activations": r["activations"]} for r in recipe.get("layers", [])]
    empty = lowbit.prepare(resnet(**make), recipe | {"weights": "float", "layers": [r | FLOAT for r in inputs]})
    loaded = lowbit.load(tmp_path / "out", model=empty)
    got, fast = loaded(x), fuse(loaded, x[:2])(x)
    assert (fast.argmax(1) == wanted.argmax(1)).float().mean() >= 0.999
    assert (wanted.argmax(1) == y).float().mean() > 0.7, "it has learned something"
    assert (got.argmax(1) == wanted.argmax(1)).float().mean() >= 0.999
    assert (got - wanted).abs().max() <= 0.01 * wanted.abs().max()
