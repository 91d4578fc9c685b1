"""Bounded reads and staged writes: no input can exhaust memory, no output is ever half there.

A file is written under a temporary name beside its destination and renamed when it is whole. A
folder is built as `.NAME.partial` and renamed when the last file is in it; what an interrupted run
left in there can be taken up again by the next one (`StagedFolder.resumed`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from earnest.errors import (
    AccessError,
    DiskFullError,
    EarnestError,
    FormatError,
    MachineError,
    ModelNotFoundError,
    UserError,
)

# A real tokenizer.json is 11 MB and the index of the 300B model 3 MB; nothing sane is 256 MB.
MAX_JSON_BYTES = 256 * 2**20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ABSENT = {errno.ENOENT, errno.ENOTDIR}


@contextlib.contextmanager
def machine_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's errors about `path` into typed ones that name a remedy.

    Raises:
        DiskFullError, AccessError, ModelNotFoundError, MachineError: by what the system said.
    """
    try:
        yield
    except EarnestError:
        raise
    except OSError as error:
        raise _typed(error, path, doing) from error


def _typed(error: OSError, path: Path, doing: str) -> EarnestError:
    problem = f"{path}: {doing} failed: {error.strerror or error}"
    if error.errno in _FULL:
        return DiskFullError(
            problem, remedy="free some space or choose another destination; nothing was replaced"
        )
    if error.errno in _DENIED:
        return AccessError(problem, remedy="check the permissions of this path and its folder")
    if error.errno in _ABSENT:
        return ModelNotFoundError(problem, remedy="check the spelling of the path")
    if error.errno == errno.EISDIR:
        return FormatError(f"{path} is a folder where a file belongs")
    return MachineError(problem, remedy="check the disk and the mount this path lies on")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes.

    Raises:
        FormatError: the file is larger, or is not a regular file (a pipe would hang the reader).
        ModelNotFoundError, AccessError, MachineError: it cannot be read.
    """
    with machine_errors(path, "reading"):
        if path.exists() and not path.is_file():
            raise FormatError(f"{path} is not a regular file", remedy="replace it by a plain file")
        size = path.stat().st_size
        if size > limit:
            raise FormatError(
                f"{path} is too large", got=f"{size:,} bytes", expected=f"<= {limit:,}"
            )
        return path.read_bytes()


def parse_json_object(data: bytes, origin: str, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from bytes.

    Args:
        data: UTF-8 text.
        origin: what to call it in messages.
        unique: refuse a key that comes twice in one object (JSON itself lets the last one win).

    Raises:
        FormatError: not UTF-8, not JSON, nested beyond reason, a number too long, no object, or a
            key that comes twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(
            f"{origin} is not valid JSON: {reason}",
            remedy="download the file again; it may be cut off or a web page saved by mistake",
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"{origin} is not a JSON object", got=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} comes twice")
    return found


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; see `read_bytes` and `parse_json_object` for the errors."""
    return parse_json_object(read_bytes(path, limit), str(path))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON, staged."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with staged_file(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def staged_file(destination: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `destination` only when it is complete and on disk.

    Raises:
        DiskFullError, AccessError, MachineError: it cannot be written; no trace is left.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    with machine_errors(destination, "writing"):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(destination)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


class StagedFolder:
    """A folder built as `.NAME.partial` beside its destination and renamed when it is complete.

    Args:
        destination: where the folder shall appear; must not exist, or be an empty folder.
        fingerprint: what the content depends on (JSON-able). A partial folder left by an earlier
            run is continued if it has the same fingerprint, and thrown away if not.
            It is locked: two runs never write to the same destination at once.
        force: replace a destination that exists.

    Attributes:
        path: the partial folder; files are to be written here with `staged_file`.
        resumed: whether files of an earlier, interrupted run may be in it.

    Raises:
        UserError: the destination exists, is no name for a folder, or is being written by another
            run.
        DiskFullError, AccessError, MachineError: the partial folder cannot be made.
    """

    _FINGERPRINT = ".earnest-run.json"

    def __init__(self, destination: Path, fingerprint: dict[str, Any], *, force: bool = False):
        self.path = self.partial_path(destination)
        self.destination, self.force = destination.absolute(), force
        if destination.exists() and not force and not _is_empty_folder(destination):
            raise UserError(
                f"{destination} exists already",
                remedy="choose another destination, or pass --force to replace it",
            )
        note = self.path / self._FINGERPRINT
        with machine_errors(self.path, "creating"):
            self.path.mkdir(parents=True, exist_ok=True)
            # Let go by `commit`, at the end of a `with` block, or with the object.
            self._unlock = weakref.finalize(self, os.close, _locked(self.path))
            self.resumed = self._belongs_to(note, fingerprint)
            for left in self.path.iterdir():
                if not self.resumed or left.name.endswith(".part"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not self.resumed:
            write_json(note, fingerprint)

    @staticmethod
    def partial_path(destination: Path) -> Path:
        """Where the folder is built before it appears at `destination`.

        Raises:
            UserError: `destination` has no name of its own (`.`, `..` or a root).
        """
        if destination.name in ("", ".."):
            raise UserError(f"{destination} cannot be the name of a new folder")
        return destination.absolute().with_name(f".{destination.name}.partial")

    @staticmethod
    def _belongs_to(note: Path, fingerprint: dict[str, Any]) -> bool:
        try:
            found = read_json(note)
        except EarnestError:
            return False
        expected: dict[str, Any] = json.loads(json.dumps(fingerprint))
        return found == expected

    def commit(self) -> None:
        """Rename the finished folder to its destination; what was there goes only after that."""
        replaced = self.destination.with_name(f".{self.destination.name}.replaced")
        with machine_errors(self.destination, "renaming to"):
            (self.path / self._FINGERPRINT).unlink(missing_ok=True)
            if self.destination.exists():
                _remove(replaced)  # left by a run that was killed right here
                self.destination.rename(replaced)
            self.path.rename(self.destination)
            _remove(replaced)
        self._unlock()

    def commit_file(self, name: str) -> None:
        """Rename one finished file out of the folder to the destination, and drop the folder."""
        with machine_errors(self.destination, "renaming to"):
            if self.destination.is_dir():
                _remove(self.destination)
            (self.path / name).replace(self.destination)
            _remove(self.path)
        self._unlock()

    def __enter__(self) -> StagedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(folder: Path) -> int:
    """An open descriptor of `folder` that holds its lock until it is closed or the process ends.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another run is writing {folder} at this moment", remedy="wait for it, or stop it"
        ) from error
    return descriptor


def _is_empty_folder(path: Path) -> bool:
    with machine_errors(path, "reading"):
        return path.is_dir() and not any(path.iterdir())


def require_space(destination: Path, needed: int) -> None:
    """Refuse to start what cannot fit.

    Raises:
        DiskFullError: fewer than `needed` bytes are free where `destination` lies.
    """
    folder = destination.absolute()
    while not folder.exists():
        folder = folder.parent
    with machine_errors(folder, "measuring free space"):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{destination} would not fit on its disk",
            got=f"{free / 1e9:,.1f} GB free",
            expected=f"{needed / 1e9:,.1f} GB",
            remedy="free some space or choose a destination on another disk",
        )
