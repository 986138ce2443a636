"""Damaged and tampered artifacts: each is refused with an ArtifactError, or loads with exactly the weights saved.

Two kinds of artifact (a module, a transformers model), four kinds of damage: bytes, whole files, JSON fields (with and
without the checksums made right again) and the safetensors header. Everything follows from the seed.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.errors import ArtifactError
from lowbit.runtime.artifact import load, save, verify_artifact
from lowbit.runtime.manifest import ZEROS
from tests.runtime.tiny_models import convnet, pack_model, packed

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD = [None, -1, 0, 1, 7, 2**40, 2**63, 10**30, 1e308, 0.5, "", "x", "../x", "/etc/passwd", [], {}, [1], {"a": 1}, True]
ODD += [DEEP, "int4-g16", "nf4-g16", "fp4_e2m1-g16", "uint4-g32", "U8", "F16", "linear", "0" * 64, "x" * 5000, "\ud800"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    save(pack_model(convnet()), root / "module", recipe={"method": "rtn", "bits": 4})
    save(packed("llama"), root / "transformers", recipe={"method": "rtn", "bits": 4})
    return {p.name: p for p in root.iterdir()}


# -- damage: each function changes a copy of the artifact


def flip_a_bit(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.name != "run.json"])
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return f"{path.name} byte {at}"


def cut_or_grow(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.name != "run.json"])
    raw = path.read_bytes()
    n = rng.choice([0, 1, 8, rng.randrange(len(raw)), len(raw) - 1])
    path.write_bytes(raw[:n] if rng.random() < 0.7 else raw + raw[-n - 1 :])
    return f"{path.name} cut at {n}"


def lose_a_file(folder: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.name != "run.json"])
    other = rng.choice([p for p in sorted(folder.iterdir()) if p != path])
    how = rng.choice(["delete", "rename", "replace", "folder"])
    if how == "replace":
        shutil.copy(other, path)
    else:
        path.rename(path.with_suffix(".old"))
        if how == "delete":
            path.with_suffix(".old").unlink()
        if how == "folder":
            path.mkdir()
    return f"{path.name} {how} {other.name}"


def change_a_field(folder: Path, rng: random.Random) -> str:
    manifest = json.loads((folder / "lowbit.json").read_text())
    what = change(manifest, rng)
    (folder / "lowbit.json").write_text(json.dumps(manifest))
    return what


def change_a_field_and_its_checksum(folder: Path, rng: random.Random) -> str:
    manifest = json.loads((folder / "lowbit.json").read_text())
    what = change(manifest, rng)
    sign(folder, manifest)
    return what


def change_the_config_and_its_checksums(folder: Path, rng: random.Random) -> str:
    manifest = json.loads((folder / "lowbit.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    what = change(config, rng)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder, manifest, "config.json")
    return what


def change_the_header_and_its_checksums(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    what = change(header, rng)
    text = json.dumps(header).encode()
    length = rng.choice([len(text)] * 6 + [0, 1, len(text) - 1, len(text) + 1, 2**63])
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    sign(folder, json.loads((folder / "lowbit.json").read_text()), "model.safetensors")
    return f"{what}, header length {length}"


def change_a_weight_and_the_files_checksum(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    at = rng.randrange(8 + int.from_bytes(raw[:8], "little"), len(raw))
    raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    sign(folder, json.loads((folder / "lowbit.json").read_text()), "model.safetensors")
    return f"data byte {at}"


DAMAGE: list[Callable[[Path, random.Random], str]] = [
    flip_a_bit,
    cut_or_grow,
    lose_a_file,
    change_a_field,
    change_a_field_and_its_checksum,
    change_a_field_and_its_checksum,
    change_the_config_and_its_checksums,
    change_the_header_and_its_checksums,
    change_a_weight_and_the_files_checksum,
]
# these leave no way to be right
SURE = {flip_a_bit, cut_or_grow, change_a_field, change_a_weight_and_the_files_checksum}


def change(table: Any, rng: random.Random) -> str:
    """Replace, remove, rename or copy over one value somewhere in a JSON document."""
    node, path = table, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        path.append(str(key))
        child = node[key]
        if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.15:
            break
        node = child
    how = rng.choice(["set", "set", "nudge", "remove", "rename", "copy"])
    if how == "remove":
        del node[key]
    elif how == "rename" and isinstance(node, dict):
        node[str(key) + rng.choice(["x", ".y", "/"])] = node.pop(key)
    elif how == "copy":
        node[key] = node[rng.choice(keys)]
    elif how == "nudge" and type(child) in (int, float):
        node[key] = child + rng.choice([-1, 1, 8, 64])
    elif how == "nudge" and isinstance(child, str) and child:
        at = rng.randrange(len(child))
        node[key] = child[:at] + rng.choice("abz019_-./") + child[at + 1 :]
    else:
        node[key] = rng.choice(ODD)
    return f"{how} {'/'.join(path)}"


def sign(folder: Path, manifest: Any, changed: str = "") -> None:
    """Make the checksums of lowbit.json right again, as a careful forger would."""
    if changed:
        raw = (folder / changed).read_bytes()
        manifest["files"][changed] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    old = manifest.get("checksum") if isinstance(manifest, dict) else None
    if old is not None:
        manifest["checksum"] = ZEROS
    text = json.dumps(manifest)
    if old is not None:
        text = text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest(), 1)
    (folder / "lowbit.json").write_text(text)


def outcome(folder: Path, kind: str, whole: dict[str, torch.Tensor]) -> "str | None":
    """The message of the refusal, or None for a model with exactly the right weights; anything else is a failure."""
    try:
        model = load(folder, model=convnet() if kind == "module" else None)
    except ArtifactError as e:
        assert str(e).count("\n") == 0 and str(e).strip(), repr(str(e))
        return str(e)
    state = model.state_dict()
    assert state.keys() == whole.keys()
    for name, t in whole.items():
        assert torch.equal(state[name], t), f"{name} is silently wrong"
    assert [str(m) for m in model.modules() if hasattr(m, "meta")] == list(whole_layers[kind])
    return None


whole_layers: dict[str, list[str]] = {}


def run(artifacts: dict[str, Path], tmp_path: Path, count: int, seed: int) -> list[tuple[str, str]]:
    whole = {}
    for kind, folder in artifacts.items():
        model = load(folder, model=convnet() if kind == "module" else None)
        whole[kind] = model.state_dict()
        whole_layers[kind] = [str(m) for m in model.modules() if hasattr(m, "meta")]
    loaded = []
    for i in range(count):
        rng = random.Random(f"{seed}-{i}")
        kind = "transformers" if i % 4 == 3 else "module"
        damage = DAMAGE[i % len(DAMAGE)]
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(artifacts[kind], folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        what = damage(folder, rng)
        if before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}:
            continue
        try:
            message = outcome(folder, kind, whole[kind])
        except Exception as e:
            raise AssertionError(f"mutation {i} ({kind}, {damage.__name__}: {what}) was not handled: {e!r}") from e
        assert message or damage not in SURE, f"mutation {i} ({kind}, {damage.__name__}: {what}) was loaded"
        if message is None:
            loaded.append((damage.__name__, what))
    return loaded


def test_sixty_mutations(artifacts: dict[str, Path], tmp_path: Path) -> None:
    assert len(run(artifacts, tmp_path, 60, seed=1)) < 15


@pytest.mark.slow
def test_five_hundred_mutations(artifacts: dict[str, Path], tmp_path: Path) -> None:
    assert len(run(artifacts, tmp_path, 500, seed=2)) < 100


# -- single cases with their messages


def resign(folder: Path, edit: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "lowbit.json").read_text())
    edit(manifest)
    sign(folder, manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=2, lowbit_version="9.1"), r"format 2, .* pip install -U 'lowbit>=9.1'"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ZEROS}}), "'../x' is not a plain file name"),
        (lambda m: m["files"].pop("model.safetensors"), "model.safetensors is not listed"),
        (lambda m: m.update(tied={"3": "9"}), "shares the weights of '9', which is no layer"),
        (lambda m: m["layers"]["0"]["meta"].update(shape=[2**30, 2**30, 3, 3]), "impossible shape"),
        (lambda m: m["layers"]["0"]["meta"]["parts"][0].update(format="uint4-g3"), "its shape needs"),
        (lambda m: m["summary"].update(bytes=1), "the summary does not follow"),
        (lambda m: m.update(seed=True), "'seed' is 'True'"),
        (lambda m: m.update(recipe=DEEP), "nested deeper"),
        (lambda m: m["layers"].update({"5": m["layers"]["5"] | {"type": "embedding"}}), "quantization_config does not"),
    ],
)
def test_a_field_that_cannot_be(edit: Any, message: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts["module"], tmp_path / "copy"))
    resign(folder, edit)
    with pytest.raises(ArtifactError, match=message):
        load(folder, model=convnet())


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 50, "\xff", "", "[]", "7"])
def test_json_that_is_none(text: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts["module"], tmp_path / "copy"))
    (folder / "lowbit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="JSON|not a table"):
        load(folder, model=convnet())


def test_impossible_codes_with_every_checksum_right_are_refused(tmp_path: Path) -> None:
    """A forger can sign anything; NaN scales and codes past the last level still do not get in."""
    torch.manual_seed(0)
    net = pack_model(nn.Sequential(nn.Linear(16, 8)), "ternary-channel")
    net[0].scale[0] = float("nan")
    with pytest.raises(Exception, match="NaN"):
        save(net, tmp_path / "out")
    net[0].scale[0] = 1.0
    net[0].codes[0] = 255  # no five trits
    with pytest.raises(Exception, match="255|242"):
        save(net, tmp_path / "out")


def test_a_pipe_in_place_of_a_file_does_not_block(artifacts: dict[str, Path], tmp_path: Path) -> None:
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    for name in ("lowbit.json", "config.json", "model.safetensors"):
        folder = Path(shutil.copytree(artifacts["module"], tmp_path / name))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ArtifactError, match="is missing|has no"):
            load(folder, model=convnet())


def test_verification_can_be_skipped_but_structure_cannot(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts["module"], tmp_path / "copy"))
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="is damaged"):
        verify_artifact(folder)
    load(folder, model=convnet(), verify=False)
    path.write_bytes(raw[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        load(folder, model=convnet(), verify=False)
