"""Writing and reading artifacts: the same model comes back, counted to the byte, whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.errors import ArtifactError
from lowbit.formats import Format, quantize
from lowbit.runtime import artifact_write, manifest
from lowbit.runtime.artifact import load, load_manifest, save, verify_artifact, write_artifact
from lowbit.runtime.safetensors_io import merge, read_header
from tests.runtime.tiny_models import MODELS, convnet, files_of, llama, logits, pack_model, packed

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "artifact_v1"


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = packed(name)
    written = save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again) is type(model) and not again.training
    assert torch.equal(logits(again), logits(model))
    size = read_header(tmp_path / "out" / "model.safetensors").data_bytes
    assert written["summary"]["bytes"] == size == verify_artifact(tmp_path / "out")["bytes"]


def test_a_shared_embedding_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    written = save(packed("llama"), tmp_path / "out")
    assert written["tied"] == {"lm_head": "model.embed_tokens"}
    model: Any = load(tmp_path / "out")
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert type(model.lm_head).__name__ == "PackedLinear"
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5 ties again in places: nothing is left to tie
        model.tie_weights()


def test_a_shared_plain_bias_stays_one_parameter(tmp_path: Path) -> None:
    save(packed("bert"), tmp_path / "out")
    head: Any = load(tmp_path / "out").get_submodule("cls.predictions")
    assert head.bias is head.decoder.bias


def test_a_module_of_ones_own_needs_its_architecture(tmp_path: Path) -> None:
    net = convnet()
    net[1].running_mean.uniform_()
    pack_model(net, "ternary-channel")
    written = save(net, tmp_path / "out")
    assert written["kind"] == "module" and written["layers"]["3"]["conv"]["padding"] == "same"
    x = torch.randn(2, 1, 8, 8)
    fresh = convnet()
    again = load(tmp_path / "out", model=fresh)
    assert again is fresh and torch.equal(again(x), net(x))
    with pytest.raises(ArtifactError, match=r"lowbit\.load\(.*model=net\)"):
        load(tmp_path / "out")
    other = convnet()
    other[0] = nn.Conv2d(1, 8, 3, stride=1, padding=1, bias=False)
    with pytest.raises(ArtifactError, match=r"layer '0' has .*'stride': \[1, 1\]"):
        load(tmp_path / "out", model=other)
    with pytest.raises(ArtifactError, match=r"layer '3' does not exist"):
        load(tmp_path / "out", model=convnet()[:2])


def test_an_architecture_with_more_weights_than_the_file_is_refused(tmp_path: Path) -> None:
    net = pack_model(nn.Sequential(nn.Linear(16, 8)))
    save(net, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"needs '1.weight', which the artifact lacks"):
        load(tmp_path / "out", model=nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)))
    with pytest.raises(ArtifactError, match="no layer of this model is packed"):
        save(nn.Sequential(nn.Linear(16, 8)), tmp_path / "float")


def test_activations_are_kept_and_can_be_chosen(tmp_path: Path) -> None:
    save(packed("llama", activations="int8"), tmp_path / "out")
    layer = "model.layers.0.mlp.up_proj"
    assert load(tmp_path / "out").get_submodule(layer).activations == "int8"
    assert load(tmp_path / "out", activations="float").get_submodule(layer).activations == "float"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pack_model(llama(dtype=dtype))
    save(model, tmp_path / "out")
    again: Any = load(tmp_path / "out")
    assert again.model.norm.weight.dtype == dtype and again.model.embed_tokens.dtype == dtype
    assert torch.equal(logits(again), logits(model))


# -- the bytes


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    model = packed("gpt2")
    save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in stored.items())
    header = read_header(path)
    assert header.data_start % 8 == 0
    assert all(e.begin % e.dtype.itemsize == 0 for e in header.entries.values())


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        save(packed("llama"), tmp_path / out, recipe={"bits": 4}, seed=3)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    save(load(tmp_path / "a"), tmp_path / "c", recipe={"bits": 4}, seed=3)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c"), "loading and saving changed something"


def test_blocks_are_streamed_from_their_files(tmp_path: Path) -> None:
    model = packed("llama")
    save(model, tmp_path / "whole")
    whole = load_manifest(tmp_path / "whole")
    state = {n: t.contiguous() for n, t in load_file(tmp_path / "whole" / "model.safetensors").items()}
    names = sorted(state)
    for i, part in enumerate((names[:20], names[20:])):
        save_file({n: state[n] for n in part}, tmp_path / f"block{i}.safetensors")
    parts = [tmp_path / "block1.safetensors", tmp_path / "block0.safetensors"]
    layers = {n: {k: row[k] for k in ("type", "meta", "bias")} for n, row in whole["layers"].items()}
    options = {"tied": whole["tied"], "config": model.config, "auto_class": "AutoModelForCausalLM"}
    write_artifact(
        tmp_path / "streamed", parts, layers, generation_config=model.generation_config, run={"seconds": 1.5}, **options
    )
    assert json.loads((tmp_path / "streamed" / "run.json").read_text()) == {"seconds": 1.5}
    for name in ("model.safetensors", "config.json", "lowbit.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(ArtifactError, match="is given twice"):
        write_artifact(tmp_path / "twice", [parts[0], parts[0]], layers, **options)
    with pytest.raises(ArtifactError, match="tensor 'codes' is missing"):
        write_artifact(tmp_path / "half", parts[:1], layers, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "block0.safetensors",
        "block1.safetensors",
        "streamed",
        "whole",
    ]


def test_golden_artifact_loads_forever() -> None:
    """Written by format version 1; changing these values means that people's files no longer load."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model = load(GOLDEN / "artifact", model=net)
    y = model(torch.tensor([0, 3, 5]))
    assert torch.allclose(y, torch.tensor(expected["y"]), atol=1e-5)
    assert model[0].dequantize().tolist() == expected["embedding"]
    assert model[1].dequantize().tolist() == expected["linear"]
    assert verify_artifact(GOLDEN / "artifact")["format_version"] == 1


# -- whole or not at all


def test_an_existing_folder_is_only_replaced_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(packed("llama"), out)
    before = files_of(out)
    with pytest.raises(ArtifactError, match="exists already.*--force"):
        save(packed("gpt2"), out)
    assert files_of(out) == before
    save(packed("gpt2"), out, force=True)
    assert type(load(out)).__name__ == "GPT2LMHeadModel"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="leaves it alone"):
        save(packed("llama"), tmp_path / "home", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is not a folder"):
        save(packed("llama"), tmp_path / "file", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


def test_an_interrupted_replacement_is_completed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(packed("llama"), out)
    os.rename(out, manifest.aside_of(out))  # as if the power had failed between the two renames
    with pytest.raises(ArtifactError, match="rename it back"):
        load(out)
    save(packed("gpt2"), out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("room", [0, 100, 9_000, 28_000])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(
    room: int, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if force:
        save(packed("gpt2"), out)
    before = files_of(tmp_path / "out") if force else None
    written = 0

    def write(file: Any, block: Any) -> None:
        nonlocal written
        written += len(block)
        if written > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(block)

    monkeypatch.setattr(artifact_write, "write_block", write)
    with pytest.raises(ArtifactError, match=r"the disk is full: .* needs \d+ bytes, \d+ are free .* -o"):
        save(packed("llama_untied"), out, force=force)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if force else [])
    assert not force or files_of(out) == before


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 20_000})
    monkeypatch.setattr(artifact_write.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(artifact_write, "write_block", lambda *_: pytest.fail("wrote"))
    with pytest.raises(ArtifactError, match="20000 are free"):
        save(packed("llama"), tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(packed("llama"), tmp_path / "file" / "out")


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from lowbit.formats import Format, quantize
from lowbit.runtime import artifact_write
from lowbit.runtime.artifact import save
from lowbit.runtime.layers import PackedLinear

at, real = int(sys.argv[2]), artifact_write.write_block
def write(file, block, count=[0]):
    count[0] += 1
    if count[0] == at:
        file.write(bytes(block)[: len(block) // 2]); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, block)
artifact_write.write_block = write
layer = PackedLinear.from_quantized(quantize(torch.ones(8, 16), Format.parse("int4-g16")))
save(torch.nn.Sequential(layer), sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("at", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_no_artifact_and_the_next_one_succeeds(at: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(at)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    save(nn.Sequential(packed_linear()), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def packed_linear() -> nn.Module:
    from lowbit.runtime.layers import PackedLinear

    return PackedLinear.from_quantized(quantize(torch.ones(8, 16), Format.parse("int4-g16")))


# -- the package's front door


def test_public_names_are_lazy_and_versions_agree() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'version = "{lowbit.__version__}"' in project
    assert lowbit.load is load and "save" in dir(lowbit)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lowbit.no_such_name


def test_two_methods_may_not_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    from lowbit._registry import discover

    folder = tmp_path / "methods_of_a_test"
    folder.mkdir()
    spec = "from types import SimpleNamespace\nSPEC = SimpleNamespace(name={!r})\n"
    for file, name in (("__init__", "x"), ("a", "first"), ("b", "second"), ("_hidden", "first")):
        (folder / f"{file}.py").write_text(spec.format(name))
    monkeypatch.syspath_prepend(str(tmp_path))
    package = import_module("methods_of_a_test")
    assert list(discover(package)) == ["first", "second"]
    (folder / "c.py").write_text(spec.format("first"))
    with pytest.raises(RuntimeError, match="call themselves 'first'"):
        discover(package)


def test_merge_refuses_what_no_file_can_hold() -> None:
    with pytest.raises(ArtifactError, match="complex64"):
        merge([("x", torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ArtifactError, match="meta"):
        merge([("x", torch.zeros(2, device="meta"))])
