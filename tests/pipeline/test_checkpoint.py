"""The folder of finished pieces: what is there is whole, and nothing that is not ours is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.errors import ArtifactError, RecipeError
from lowbit.pipeline.checkpoint import FolderStore

RUN = {"recipe": 1}


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "out.partial", RUN)


def test_a_piece_comes_back_as_it_was_put(store: FolderStore) -> None:
    store.put("x", {"a": torch.arange(3), "b": torch.ones(2, 2)}, {"layers": {"a": {"error": 0.25}}, "plain": ["b"]})
    store.close()
    again = FolderStore(store.folder, RUN)
    assert again.has("x") and not again.has("y")
    assert again.entries("x") == {"layers": {"a": {"error": 0.25}}, "plain": ["b"]}
    assert list(again.files()) == [store.path("x")]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(store: FolderStore, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    store.put("old", {"a": torch.zeros(1)}, {"n": 1})
    monkeypatch.setattr(os, fails, full)
    for name in ("old", "new"):
        with pytest.raises(ArtifactError, match="free some space"):
            store.put(name, {"a": torch.ones(1)}, {"n": 2})
    monkeypatch.undo()
    assert store.entries("old") == {"n": 1} and not store.has("new")
    assert sorted(p.name for p in store.folder.iterdir()) == ["identity.json", "lock", "piece-old.safetensors"]


def test_hidden_states_only_the_newest_is_kept_and_used(store: FolderStore) -> None:
    assert store.newest_hidden() is None
    for k in (0, 9, 10):
        before = [p.read_bytes() for p in store.folder.glob("hidden-*")]
        store.put_hidden(k, [torch.full((1, 2, 3), float(k)), torch.zeros(1, 2, 3)])
        assert [p.name for p in store.folder.glob("hidden-*")] == [f"hidden-{k}.safetensors"]
    (store.folder / "hidden-9.safetensors").write_bytes(before[0])  # killed before the old one was removed
    found = store.newest_hidden()
    assert found is not None and found[0] == 10
    assert [h.shape for h in found[1]] == [(1, 2, 3)] * 2
    assert found[1][0].eq(10).all() and found[1][1].eq(0).all()


def test_files_of_a_write_that_was_cut_off_are_removed(store: FolderStore) -> None:
    (store.folder / "piece-x.safetensors.tmp").write_bytes(b"half")
    store.close()
    assert not FolderStore(store.folder, RUN).has("x")
    assert sorted(p.name for p in store.folder.iterdir()) == ["identity.json", "lock"]


def test_a_run_killed_before_its_identity_was_written_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "identity.json.tmp").write_text("{")
    assert FolderStore(tmp_path / "p", RUN).newest_hidden() is None
    assert (tmp_path / "p" / "identity.json").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, replace: bool) -> None:
    thesis = tmp_path / "out.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(RecipeError, match="holds something else.*-o"):
        FolderStore(thesis.parent, RUN, replace=replace)
    with pytest.raises(RecipeError, match="holds something else"):
        FolderStore(thesis, RUN, replace=replace)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("damage", ["one bit", "cut off", "empty", "of another release"])
def test_a_damaged_piece_is_removed_and_done_again(store: FolderStore, damage: str) -> None:
    """A power cut or a bad disk: otherwise a run stops with a traceback each time, or ends with wrong weights."""
    store.put("x", {"a": torch.arange(300)}, {"layers": {}, "plain": ["a"]})
    store.put("y", {"a": torch.arange(300)}, {"layers": {}, "plain": ["a"]})
    store.put_hidden(1, [torch.ones(1, 2, 3)])
    store.close()
    for path in (store.path("x"), *store.folder.glob("hidden-*")):
        data = bytearray(path.read_bytes())
        data[-2] ^= 4
        old = path.read_bytes().replace(b'"sha256"', b'"sha-25"')
        path.write_bytes({"one bit": data, "cut off": data[:-9], "empty": b"", "of another release": old}[damage])
    again = FolderStore(store.folder, RUN)
    assert again.newest_hidden() is None
    assert not again.has("x") and not again.path("x").exists() and again.has("y")
    again.put("x", {"a": torch.arange(2)}, {})
    assert again.has("x")


def test_names_and_descriptions_are_part_of_a_pieces_checksum(store: FolderStore) -> None:
    store.put("x", {"weight": torch.arange(3)}, {"layers": {}, "plain": ["weight"]})
    store.close()
    data = store.path("x").read_bytes()
    store.path("x").write_bytes(data.replace(b'\\"weight\\"', b'\\"veight\\"'))
    assert store.path("x").read_bytes() != data
    assert not FolderStore(store.folder, RUN).has("x")


@pytest.mark.parametrize("text", ["[1]", "{", "", "3"])
def test_a_damaged_identity_is_another_run(store: FolderStore, text: str) -> None:
    store.close()
    (store.folder / "identity.json").write_text(text)
    with pytest.raises(RecipeError, match="--force"):
        FolderStore(store.folder, RUN)
    FolderStore(store.folder, RUN, replace=True)


@pytest.mark.parametrize("replace", [False, True])
def test_two_runs_do_not_write_one_folder(store: FolderStore, replace: bool) -> None:
    part = store.folder / "piece-x.safetensors.tmp"
    part.write_bytes(b"being written")
    for run in (RUN, {"recipe": 2}):
        with pytest.raises(RecipeError, match="another run is writing.*choose another -o"):
            FolderStore(store.folder, run, replace=replace)
    assert part.exists()
    store.close()
    FolderStore(store.folder, RUN)


def test_a_lock_dies_with_its_process_and_goes_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    code = (
        "import sys; from pathlib import Path; from lowbit.pipeline.checkpoint import FolderStore\n"
        "store = FolderStore(Path(sys.argv[1]), {'recipe': 1}); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == b"held"
        with pytest.raises(RecipeError, match="another run"):
            FolderStore(folder, RUN)
        other.kill()
    store = FolderStore(folder, RUN)
    store.discard()
    assert not folder.exists()
