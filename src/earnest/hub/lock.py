"""One process at a time: a lock that the operating system drops when its holder dies."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from earnest.files import machine_errors

if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`, waiting as long as another process does; no trace of it is left.

    Args:
        path: the lock file; its folder is made if it is not there.
        waiting: called once if the lock is taken.

    Raises:
        DiskFullError, AccessError, MachineError: the file cannot be made.
    """
    told = False
    while True:
        with machine_errors(path, "locking"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        with file:
            try:
                _take(file)
                held = _is_at(file, path)
            except OSError:
                held = False
                if not told:
                    waiting()
                    told = True
                time.sleep(0.1)
            if held:
                try:
                    yield
                finally:
                    # Before the lock is given up; who waits for this very file then sees that the
                    # name is gone and takes a new one. (Windows keeps an open file: no matter.)
                    with contextlib.suppress(OSError):
                        path.unlink()
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one of that name: its former holder may have removed it
    between opening and locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
