"""Where a compression keeps what it has finished: in memory, or in a folder so that a killed run goes on.

    OUT.partial/identity.json             what this run is; another run does not go on from it
    OUT.partial/piece-<name>.safetensors  packed and plain tensors of one finished piece; its description in the header
    OUT.partial/hidden-<k>.safetensors    hidden states entering block k; only the newest is kept

Every file is written under another name, flushed, and renamed, and the folder is flushed after it: what is written
later is never there without what was written before. A piece is complete exactly if it is there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import ArtifactError, RecipeError

Entries = dict[str, Any]


class MemoryStore:
    """Pieces kept in memory: for models compressed in place."""

    def __init__(self) -> None:
        self.pieces: dict[str, tuple[dict[str, Tensor], Entries]] = {}

    def has(self, name: str) -> bool:
        return name in self.pieces

    def put(self, name: str, tensors: dict[str, Tensor], entries: Entries) -> None:
        self.pieces[name] = (tensors, entries)

    def entries(self, name: str) -> Entries:
        return self.pieces[name][1]

    def put_hidden(self, k: int, hidden: list[Tensor]) -> None: ...

    def newest_hidden(self) -> "tuple[int, list[Tensor]] | None":
        return None


class FolderStore:
    """Pieces kept in a folder.

    identity: what must be the same for a run to go on
    replace:  throw another run's work away
    Raises RecipeError where the folder holds another run and `replace` is False, and always where it is nobody's run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], replace: bool = False) -> None:
        self.folder = folder
        path = folder / "identity.json"
        _check_ours(path, folder)
        if path.exists() and (changed := _differs(path, identity)):
            if not replace:
                raise RecipeError(_of_another_run(folder, changed))
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        if not path.exists():
            _write(path, json.dumps(identity, sort_keys=True, indent=1).encode())

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def path(self, name: str) -> Path:
        return self.folder / f"piece-{name}.safetensors"

    def put(self, name: str, tensors: dict[str, Tensor], entries: Entries) -> None:
        from safetensors.torch import save

        _write(self.path(name), save(tensors, {"entries": json.dumps(entries)}))

    def entries(self, name: str) -> Entries:
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as f:
            return json.loads(f.metadata()["entries"])

    def put_hidden(self, k: int, hidden: list[Tensor]) -> None:
        from safetensors.torch import save

        _write(self._hidden(k), save({str(i): h for i, h in enumerate(hidden)}))
        for old in self.folder.glob("hidden-*.safetensors"):
            if old != self._hidden(k):
                old.unlink()

    def newest_hidden(self) -> "tuple[int, list[Tensor]] | None":
        """(k, hidden states entering block k), in memory of their own, or None."""
        from safetensors import safe_open

        found = sorted(int(p.stem.split("-")[1]) for p in self.folder.glob("hidden-*.safetensors"))
        if not found:
            return None
        with safe_open(self._hidden(found[-1]), framework="pt") as f:
            return found[-1], [f.get_tensor(str(i)).clone() for i in range(len(f.keys()))]

    def files(self) -> Iterator[Path]:
        """The finished pieces' files."""
        yield from sorted(self.folder.glob("piece-*.safetensors"))

    def discard(self) -> None:
        """Remove the folder: the artifact is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hidden(self, k: int) -> Path:
        return self.folder / f"hidden-{k}.safetensors"


Store = MemoryStore | FolderStore


def _differs(path: Path, identity: dict[str, Any]) -> list[str]:
    """What is not the same in the run found and the run wanted."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    return sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))


def _check_ours(path: Path, folder: Path) -> None:
    """A folder without identity.json is no run of ours, unless it is empty (a run that was killed as it began)."""
    if not folder.exists() or path.exists():
        return
    if not folder.is_dir() or any(p.suffix != ".tmp" for p in folder.iterdir()):
        raise RecipeError(
            f"{folder} is where this run would keep its finished blocks, but it holds something else: "
            "move it away, or choose another -o."
        )


def _of_another_run(folder: Path, changed: list[str]) -> str:
    return (
        f"{folder} holds an unfinished run of something else ({', '.join(changed)} differ): "
        "repeat that run's command to finish it, or add --force to start over."
    )


def _write(path: Path, data: bytes) -> None:
    """Write, flush to disk, rename. Raises ArtifactError when the disk is full."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as e:
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise ArtifactError(
            f"{path.parent} cannot be written ({e.strerror or e}; "
            f"{free / 1e6:.0f} MB free, {len(data) / 1e6:.0f} MB needed): "
            "free some space or choose another -o, then repeat the command; it goes on where it stopped."
        ) from e


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut. Windows cannot open folders and does so by itself."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
