"""Conversions that are killed, limited or refused: nothing is ever half there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conversions import assert_same_files

from earnest.checkpoint import open_checkpoint, synth
from earnest.checkpoint.convert import convert
from earnest.config import preset
from earnest.errors import (
    DiskFullError,
)

_CHILD = """
import os, resource, signal, sys
from pathlib import Path
from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.convert import convert
from earnest.errors import EarnestError

source, destination, to, shard_bytes, kill_at, limit = sys.argv[1:]

def progress(done, total, what):
    if int(kill_at) and done > int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    opened = open_checkpoint(source)
    convert(opened, Path(destination), to, shard_bytes=int(shard_bytes), progress=progress)
except EarnestError as error:
    print(f"{type(error).__name__}: {error}")
"""


def run_child(
    source: Path, destination: Path, to: str, shard_bytes: int, kill_at: int = 0, limit: int = 0
) -> subprocess.CompletedProcess[str]:
    arguments = [source, destination, to, shard_bytes, kill_at, limit]
    return subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    synth.synth(folder, preset("small-moe"), seed=2, mtp=True)
    return folder


@pytest.mark.parametrize("kill_at", [1, 7_000_000, 21_000_000], ids=["start", "middle", "end"])
def test_a_killed_run_leaves_nothing_at_the_destination_and_is_taken_up_again(
    kill_at: int, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = run_child(small, out, "paddle", 3_000_000, kill_at=kill_at)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not out.exists()
    finished = {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in (tmp_path / ".out.partial").glob("model-*.safetensors")
    }
    assert len(finished) == {1: 0, 7_000_000: 2, 21_000_000: 7}[kill_at]
    report = convert(open_checkpoint(small), out, "paddle", shard_bytes=3_000_000)
    assert report.resumed
    kept = {n: ((out / n).stat().st_ino, (out / n).stat().st_mtime_ns) for n in finished}
    assert kept == finished, "finished files are kept, not written again"
    convert(open_checkpoint(small), tmp_path / "whole", "paddle", shard_bytes=3_000_000)
    assert_same_files(out, tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("change", ["source", "layout", "shards", "type"])
def test_a_killed_run_of_other_options_or_another_source_starts_over(
    change: str, small: Path, tmp_path: Path
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(small, source)
    out = tmp_path / "out"
    run = run_child(source, out, "paddle", 3_000_000, kill_at=7_000_000)
    assert run.returncode == -signal.SIGKILL
    options: dict[str, Any] = {"to": "paddle", "shard_bytes": 3_000_000}
    if change == "source":
        shutil.rmtree(source)
        synth.synth(source, preset("small-moe"), seed=3, mtp=True)
    options |= {
        "layout": {"to": "hf"}, "shards": {"shard_bytes": 2_000_000}, "type": {"dtype": "f32"}
    }.get(change, {})  # fmt: skip
    report = convert(open_checkpoint(source), out, **options)
    assert not report.resumed
    convert(open_checkpoint(source), tmp_path / "whole", **options)
    assert_same_files(out, tmp_path / "whole")


def test_a_file_size_limit_gives_a_typed_error_and_no_destination(
    small: Path, tmp_path: Path
) -> None:
    run = run_child(small, tmp_path / "out", "paddle", 3_000_000, limit=2_000_000)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("DiskFullError")
    assert ".out.partial" in run.stdout, "says where the finished part is"
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").glob("*.part"))
    report = convert(open_checkpoint(small), tmp_path / "out", "paddle", shard_bytes=3_000_000)
    assert report.resumed


def test_a_file_size_limit_does_not_harm_a_destination_to_be_replaced(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskFullError):
            convert(open_checkpoint(small), tmp_path / "out", "paddle", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    yield folder
    folder.chmod(0o700)


def test_a_folder_without_permission_gives_a_typed_error(small: Path, unwritable: Path) -> None:
    run = run_child(small, unwritable / "out", "paddle", 3_000_000)
    assert run.stdout.startswith("AccessError")


def test_progress_ends_at_the_total_and_never_goes_back(small: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(
        open_checkpoint(small),
        tmp_path / "out",
        "paddle",
        shard_bytes=3_000_000,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(seen)
    assert json.loads(json.dumps(report.to_dict()))["nbytes"] == report.nbytes
