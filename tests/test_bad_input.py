"""What people mistype from Python: one sentence that says what to give instead, before anything is lost."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import ArtifactError, DataError, ModelError, RecipeError, ShapeError
from lowbit.report.run_file import read_run
from lowbit.runtime import artifact_write
from tests.cli.helpers import refused


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a
        self.c = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_packed_layers_take_floats_only(dtype: torch.dtype, activations: str) -> None:
    layer = lowbit.compress(mlp(), "rtn", bits=4, activations=activations)[2]
    with pytest.raises(ShapeError, match=r"takes a tensor of floats, not .*: give x.float\(\)"):
        layer(torch.ones(2, 64).to(dtype))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    conv = lowbit.compress(net, "rtn", bits=4, group=-1, activations=activations)[1]
    with pytest.raises(ShapeError, match="takes a tensor of floats"):
        conv(torch.ones(1, 8, 5, 5).to(dtype))


def test_packed_layers_take_tensors_with_features() -> None:
    layer = lowbit.compress(mlp(), "rtn", bits=4)[2]
    with pytest.raises(ShapeError, match="a tensor of floats, not ndarray"):
        layer(np.ones((2, 64), np.float32))
    with pytest.raises(ShapeError, match="no dimension, the layer needs 64 features"):
        layer(torch.ones(()))


@pytest.mark.slow
def test_shapes_are_known_without_values() -> None:
    assert lowbit.compress(mlp(), "rtn", bits=4)[2](torch.ones(2, 64, device="meta")).shape == (2, 64)


def test_a_layer_under_two_names_is_packed_under_both(tmp_path: Path) -> None:
    net = lowbit.prepare(Twice(), "ternary", keep_ends=False)
    x = torch.randn(3, 64)
    wanted = net.eval()(x)
    packed = lowbit.pack(net)
    assert packed.a is packed.b and type(packed.b).__name__ == "PackedLinear"
    lowbit.save(packed, tmp_path / "out")
    assert torch.allclose(lowbit.load(tmp_path / "out", model=Twice())(x), wanted, atol=1e-5)


def test_a_prepared_network_is_not_saved(tmp_path: Path) -> None:
    half = lowbit.compress(mlp(), "rtn", bits=4)
    lowbit.prepare(half[4], "ternary", keep_ends=False)
    with pytest.raises(ArtifactError, match=r"4 is prepared and not packed: call lowbit.pack\(model\) first"):
        lowbit.save(half, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    net = mlp()
    net[2].weight.data[3, 3] = value
    with pytest.raises(ModelError, match="2.weight: 1 of 4096 values are NaN or infinite"):
        lowbit.compress(net, "rtn", bits=4)
    with pytest.raises(ModelError, match="2.weight: 1 of 4096"):
        lowbit.compress(net, "gptq", bits=4, data=torch.randn(8, 64))
    prepared = lowbit.prepare(mlp(), "ternary", keep_ends=False)
    prepared[2].parametrizations.weight.original.data[3, 3] = value
    with pytest.raises(ModelError, match="2: 1 of 4096 weights are NaN or infinite, so the training has diverged"):
        lowbit.pack(prepared)


def test_weights_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="meta device and has no values"):
        lowbit.compress(mlp().to("meta"), "rtn", bits=4)
    with pytest.raises(ModelError, match="meta device and has no values"):
        lowbit.pack(lowbit.prepare(mlp(), "binary", keep_ends=False).to("meta"))


@pytest.mark.parametrize("data", [torch.randn(8, 15), torch.randn(8, 64).double(), torch.ones(8, 64).long()])
def test_data_that_the_network_cannot_read(data: torch.Tensor) -> None:
    with pytest.raises(DataError, match="the network cannot read the data, .* give inputs as you call it with"):
        lowbit.compress(mlp(), "gptq", bits=4, data=data)


@pytest.mark.parametrize("call", [lowbit.prepare, lowbit.pack, lowbit.step, lowbit.penalty, lowbit.bits_per_weight])
def test_what_is_no_network(call, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes a torch module, not a str"):
        call("x")
    with pytest.raises(ModelError, match="lowbit.save takes a torch module"):
        lowbit.save("x", tmp_path / "out")


def test_a_name_to_skip_that_matches_nothing() -> None:
    """Its layer would be quantized without a word."""
    for skip in (["33"], ["0", "x*"], "head"):
        with pytest.raises(RecipeError, match="matches no layer. There are e.g. .*2"):
            lowbit.prepare(mlp(), "ternary", keep_ends=False, skip=skip)
    block = nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)}))
    with pytest.raises(RecipeError, match=r"skip='\*q_prj\*' matches no layer. There are e.g. 0.q_proj"):
        lowbit.prepare(block, "ternary", skip=["*q_prj*"])


def test_networks_that_hold_nothing_to_do() -> None:
    with pytest.raises(ModelError, match=r"no nn.Linear and no nn.Conv2d"):
        lowbit.compress(nn.ReLU(), "rtn", bits=4)
    with pytest.raises(RecipeError, match="packed already"):
        lowbit.prepare(lowbit.compress(mlp(), "rtn", bits=4), "binary")
    with pytest.raises(RecipeError, match="options should be a dict such as"):
        lowbit.compress(mlp(), "rtn", bits=4, options=["a"])
    with pytest.raises(ShapeError, match="^in_features=16"):
        lowbit.compress(nn.Linear(16, 16), "rtn", bits=4)


def test_force_does_not_delete_what_lowbit_did_not_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    net = lowbit.compress(mlp(), "rtn", bits=4)
    lowbit.save(net, out)
    lowbit.save(net, out, force=True)
    (out / "notes").mkdir()
    (out / "notes" / "precious.txt").write_text("x")
    with pytest.raises(ArtifactError, match="also holds 'notes', which lowbit did not write"):
        lowbit.save(net, out, force=True)
    (out / "lowbit.json").write_text("{")
    with pytest.raises(ArtifactError, match="also holds 'notes'"):
        lowbit.save(net, out, force=True)
    assert (out / "notes" / "precious.txt").read_text() == "x"


def test_publishing_keeps_the_old_folder_until_the_new_one_stands(tmp_path: Path, monkeypatch) -> None:
    net, out = lowbit.compress(mlp(), "rtn", bits=4), tmp_path / "out"
    lowbit.save(net, out)
    lowbit.save(net, tmp_path / "new")
    real = artifact_write.os.rename

    def rename(a, b):
        if Path(a) == tmp_path / "new":
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(artifact_write.os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        artifact_write.publish(tmp_path / "new", out, True)
    assert (out / "model.safetensors").is_file()


def test_a_damaged_run_file_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        '{"evaluations": [3], "calibration": 4, "machine": [], "seconds": "x", "peak_memory_bytes": {}, "threads": 2}'
    )
    assert read_run(tmp_path) == {"evaluations": [], "threads": 2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect", "OUT", "--layer", "zzz"], "no layer has 'zzz' in its name"),
        (["compress", "/dev/null", "-o", "NEW", "--method", "rtn"], "is no regular file"),
        (["compress", "SHORT.gguf", "-o", "NEW", "--method", "rtn"], "ends after 8 bytes; download or copy it again"),
        (["train", "EMPTY.yaml"], "should be lines such as `task: digits`"),
        (["train", "BAD.yaml"], "is not YAML: .*, in line 3"),
    ],
)
def test_on_the_command_line(words: "list[str]", says: str, tmp_path: Path) -> None:
    lowbit.save(lowbit.compress(mlp(), "rtn", bits=4), tmp_path / "OUT")
    (tmp_path / "SHORT.gguf").write_bytes(b"GGUF1234")
    (tmp_path / "EMPTY.yaml").write_text("")
    (tmp_path / "BAD.yaml").write_text("task: digits\nx: [1,\n")
    told = refused(*(tmp_path / w if w.isupper() or "." in w else w for w in words))
    assert re.search(says, told), told
