"""One run at a time in a folder.

OUT.partial/lock    held open and locked by the run that goes on; the system lets go of it when that run ends, killed
                    or not, so a lock that lies about stops nobody
"""

import contextlib
import errno
import os
import weakref
from pathlib import Path

from lowbit.errors import RecipeError

NAME = "lock"
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class FolderLock:
    """Held until released, or until nobody knows it any more.

    Raises RecipeError where another run holds it. Where the file system knows no locks it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, handle)
        try:
            _lock(handle)
        except OSError as e:
            self.release()
            if e.errno in HELD:
                raise RecipeError(
                    f"another run is writing {folder} just now: wait until it has ended, or choose another -o."
                ) from None

    def release(self) -> None:
        self._close()

    def remove(self) -> None:
        """The file as well, before anybody else can hold it (Windows removes no open files)."""
        if os.name == "nt":
            self.release()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.release()


def _lock(handle: int) -> None:
    """Lock an open file without waiting. Raises OSError with an errno of HELD when somebody else has."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
