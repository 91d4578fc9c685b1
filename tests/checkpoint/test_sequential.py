"""Pieces in which files are written and mapped: decoding reads them in huge pages."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from earnest import codecs, control_groups
from earnest.checkpoint.containers import sequential
from earnest.checkpoint.containers.base import PlannedTensor, map_file, stream

PAGE = 16


class Recorded(io.FileIO):
    """A file that remembers where each piece was written, and takes some only in part."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.pieces: list[tuple[int, int]] = []
        self.random = random.Random(0)

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        """As a file on a slow disk may do."""
        begin = self.tell()
        self.pieces.append((begin, begin + len(data)))
        short = len(data) > 1 and self.random.random() < 0.1
        count = super().write(data[: len(data) // 2] if short else data)
        assert count is not None
        return count


@pytest.mark.parametrize("seed", range(200))
def test_what_is_written_is_what_was_given(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "_HUGE_PAGE", PAGE)
    rng, path = random.Random(seed), tmp_path / "file"
    expected = bytearray(rng.randbytes(rng.randrange(50)))
    path.write_bytes(expected + b"left by an earlier run")
    with Recorded(path, "rb+") as raw:
        file = sequential._HugePageWriter(raw, len(expected))
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.2:
                file.sync()
                assert path.read_bytes() == expected
            piece = rng.randbytes(rng.randrange(45))
            file.write(memoryview(piece))
            expected += piece
            assert file.position == len(expected)
        file.sync()
    assert path.read_bytes() == expected


def test_pieces_are_whole_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_HUGE_PAGE", PAGE)
    with Recorded(tmp_path / "file", "wb") as raw:
        raw.random.random = lambda: 1.0  # type: ignore[method-assign]
        file = sequential._HugePageWriter(raw, 0)
        for size in (3, 5, 100, 1, 16, 2, 40, 13):
            file.write(bytes(size))
        assert len(raw.pieces) > 3
        assert all(begin % PAGE == 0 and end % PAGE == 0 for begin, end in raw.pieces)
        file.sync()
        assert raw.pieces[-1] == (176, 180)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has huge pages of files")
def test_huge_pages_are_asked_for_and_come_where_the_system_has_them(tmp_path: Path) -> None:
    page, path = sequential._HUGE_PAGE, tmp_path / "file"
    with path.open("wb", buffering=0) as raw:
        file = sequential._HugePageWriter(raw, 0)
        for _ in range(8):
            file.write(bytes(page // 2 + 12345))
        file.sync()
    mapped = map_file(path)
    assert sum(mapped[:: os.sysconf("SC_PAGESIZE")]) == 0  # touched
    smaps = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    flags = re.search(r"^VmFlags: (.*)$", smaps, re.M)
    if flags is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel does not tell, or has no huge pages")
    assert "hg" in flags[1].split()
    found = re.search(r"^FilePmdMapped:\s+(\d+) kB$", smaps, re.M)
    if found is None or not _has_huge_files(tmp_path):
        pytest.skip("this file system keeps files in small pages")
    assert int(found[1]) * 1024 >= page


def _has_huge_files(folder: Path) -> bool:
    """Whether what is written in huge pages is mapped in huge pages at all."""
    path, page = folder / "probe", sequential._HUGE_PAGE
    with path.open("wb", buffering=0) as file:
        for _ in range(4):
            file.write(bytes(page))
    mapped = map_file(path)
    assert sum(mapped[:: os.sysconf("SC_PAGESIZE")]) == 0
    smaps = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    found = re.search(r"^FilePmdMapped:\s+(\d+) kB$", smaps, re.M)
    return found is not None and int(found[1]) > 0


@pytest.mark.parametrize(("quota", "threads"), [(None, 3), (1.5, 2), (0.2, 1)])
def test_blocks_are_made_by_as_many_threads_as_may_run(
    quota: float | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: quota)
    together, seen = threading.Barrier(threads), set()

    def block() -> np.ndarray:
        together.wait(60)  # nobody goes on before all are here
        seen.add(threading.get_ident())
        return np.zeros(1, np.float32)

    tensor = PlannedTensor("w", codecs.codec("f32"), (12,), lambda: iter([block] * 12))
    assert sum(1 for _ in stream(tmp_path, [tensor])) == 13
    assert len(seen) == threads
