"""Public residual networks: the checkpoint's names, its network, and a row of the table."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.bench import resnet as bench
from lowbit.train.images import Images
from lowbit.train.networks import resnet


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A network of eight layers under the public names."""
    torch.manual_seed(0)
    net = resnet(depth=8).eval()
    theirs = {}
    for name, t in net.state_dict().items():
        parts = name.split(".")
        ends = {"stem": "conv1", "bn": "bn1", "head": "linear"}
        if parts[0] == "blocks":
            unit = "1" if parts[2] == "first" else "2"
            parts = [f"layer{int(parts[1]) + 1}", "0", parts[3] + unit, *parts[4:]]
        theirs[".".join(["module", ends.get(parts[0], parts[0]), *parts[1:]])] = t
    save_file(theirs, tmp_path / "net.safetensors")
    return net, tmp_path / "net.safetensors"


def test_a_public_checkpoint_is_the_network_it_was(checkpoint) -> None:
    net, path = checkpoint
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bench.load_resnet(path)(x), net(x))


def test_a_row_and_what_is_no_network(checkpoint, tmp_path: Path, monkeypatch, capsys) -> None:
    _, path = checkpoint
    images = Images(torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (16,)))
    monkeypatch.setattr(bench, "read_images", lambda source: (images, images))
    assert bench.main([str(path), "--data", "x", "--method", "rtn", "--bits", "3", "--images", "8"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[0] == "| rtn" and 3.0 < float(row[2]) < 3.4 and 0 <= float(row[3]) <= 100 and 0 <= float(row[4]) <= 100
    save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert bench.main([str(tmp_path / "other.safetensors"), "--data", "x"]) == 1
    assert "is no residual network" in capsys.readouterr().err
