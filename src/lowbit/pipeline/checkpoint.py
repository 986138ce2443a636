"""Where a compression keeps what it has finished: in memory, or in a folder so that a killed run goes on.

    OUT.partial/identity.json             what this run is; another run does not go on from it
    OUT.partial/piece-<name>.safetensors  packed and plain tensors of one finished piece; its description in the header
    OUT.partial/hidden-<k>.safetensors    hidden states entering block k; only the newest is kept

    OUT.partial/lock                      held by the run that is going on; the system lets go of it when that run ends

Every file is written under another name, flushed, and renamed, and the folder is flushed after it: what is written
later is never there without what was written before. A piece is complete exactly if it is there. Each holds a SHA-256
of its own, checked by the run that goes on from it: a damaged piece is done again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import ArtifactError, RecipeError
from lowbit.pipeline import lock
from lowbit.runtime.safetensors_io import bytes_of

Entries = dict[str, Any]


class MemoryStore:
    """Pieces kept in memory: for models compressed in place."""

    def __init__(self) -> None:
        self.pieces: dict[str, tuple[dict[str, Tensor], Entries]] = {}
        self.scratch = Scratch(None)

    def has(self, name: str) -> bool:
        return name in self.pieces

    def put(self, name: str, tensors: dict[str, Tensor], entries: Entries) -> None:
        self.pieces[name] = (tensors, entries)

    def entries(self, name: str) -> Entries:
        return self.pieces[name][1]

    def put_hidden(self, k: int, hidden: list[Tensor]) -> None: ...

    def newest_hidden(self) -> "tuple[int, list[Tensor]] | None":
        return None


class Scratch:
    """Tensors put aside for later in the same run: in a folder, or in memory without one. Another run begins anew."""

    def __init__(self, folder: "Path | None") -> None:
        self.folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            self._held[name] = tensors
            return
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / f"{name}.safetensors", save({k: t.contiguous() for k, t in tensors.items()}))

    def take(self, name: str) -> dict[str, Tensor]:
        """What was put there, which is then gone."""
        if self.folder is None:
            return self._held.pop(name)
        from safetensors.torch import load

        path = self.folder / f"{name}.safetensors"
        tensors = load(path.read_bytes())
        path.unlink()
        return tensors


class FolderStore:
    """Pieces kept in a folder.

    identity: what must be the same for a run to go on
    replace:  throw another run's work away
    Raises RecipeError where the folder holds another run and `replace` is False, and always where it is nobody's run
    or where a run is going on in it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], replace: bool = False) -> None:
        self.folder = folder
        self.scratch = Scratch(folder / "scratch")
        self._whole: set[str] = set()
        path = folder / "identity.json"
        _check_ours(path, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock.FolderLock(folder)
        try:
            if path.exists() and (changed := _differs(path, identity)):
                if not replace:
                    raise RecipeError(_of_another_run(folder, changed))
                _empty(folder)
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()
            if not path.exists():
                _write(path, json.dumps(identity, sort_keys=True, indent=1).encode())
        except BaseException:
            self.close()
            raise

    def has(self, name: str) -> bool:
        """Whether the piece is there and whole. A damaged one is removed."""
        path = self.path(name)
        if name not in self._whole and path.exists():
            if _is_whole(path):
                self._whole.add(name)
            else:
                path.unlink()
        return path.exists()

    def path(self, name: str) -> Path:
        return self.folder / f"piece-{name}.safetensors"

    def put(self, name: str, tensors: dict[str, Tensor], entries: Entries) -> None:
        _write(self.path(name), _sealed(tensors, json.dumps(entries)))
        self._whole.add(name)

    def entries(self, name: str) -> Entries:
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as f:
            return json.loads(f.metadata()["entries"])

    def put_hidden(self, k: int, hidden: list[Tensor]) -> None:
        _write(self._hidden(k), _sealed({str(i): h for i, h in enumerate(hidden)}))
        for old in self.folder.glob("hidden-*.safetensors"):
            if old != self._hidden(k):
                old.unlink()

    def newest_hidden(self) -> "tuple[int, list[Tensor]] | None":
        """(k, hidden states entering block k), in memory of their own; None where none are whole."""
        from safetensors import safe_open

        numbers = (p.stem.split("-")[1] for p in self.folder.glob("hidden-*.safetensors"))
        found = sorted(int(k) for k in numbers if k.isdecimal())
        if not found or not _is_whole(self._hidden(found[-1])):
            return None
        with safe_open(self._hidden(found[-1]), framework="pt") as f:
            return found[-1], [f.get_tensor(str(i)).clone() for i in range(len(f.keys()))]

    def files(self) -> Iterator[Path]:
        """The finished pieces' files."""
        yield from sorted(self.folder.glob("piece-*.safetensors"))

    def discard(self) -> None:
        """Remove the folder: the artifact is written."""
        with contextlib.suppress(OSError):
            _empty(self.folder)
            self._lock.remove()
            self.folder.rmdir()

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.release()

    def _hidden(self, k: int) -> Path:
        return self.folder / f"hidden-{k}.safetensors"


Store = MemoryStore | FolderStore


def _sealed(tensors: dict[str, Tensor], entries: str = "") -> bytes:
    """A safetensors file with a SHA-256 of what it holds in its header."""
    from safetensors.torch import save

    in_order = ((name, tensors[name]) for name in sorted(tensors))
    return save(tensors, {"entries": entries, "sha256": _sum_of(in_order, entries)})


def _sum_of(tensors: Iterable[tuple[str, Tensor]], entries: str) -> str:
    digest = hashlib.sha256(entries.encode())
    for name, t in tensors:
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(bytes_of(t.detach().contiguous()))
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            told, names = f.metadata() or {}, sorted(f.keys())
            return told.get("sha256") == _sum_of(((n, f.get_tensor(n)) for n in names), told.get("entries", ""))
    except (SafetensorError, OSError, ValueError):
        return False


def _empty(folder: Path) -> None:
    """Remove everything but the lock."""
    for path in folder.iterdir():
        if path.name != lock.NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _differs(path: Path, identity: dict[str, Any]) -> list[str]:
    """What is not the same in the run found and the run wanted."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    found = found if isinstance(found, dict) else {}
    return sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))


def _check_ours(path: Path, folder: Path) -> None:
    """A folder without identity.json is no run of ours, unless it is empty (a run that was killed as it began)."""
    if not folder.exists() or path.exists():
        return
    if not folder.is_dir() or any(p.suffix != ".tmp" and p.name != lock.NAME for p in folder.iterdir()):
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
