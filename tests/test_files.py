"""Staged writes leave either everything or nothing; bounded reads refuse what cannot be sane."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from earnest.errors import (
    AccessError,
    DiskFullError,
    EarnestError,
    FormatError,
    MachineError,
    ModelNotFoundError,
    UserError,
)
from earnest.files import (
    StagedFolder,
    machine_errors,
    parse_json_object,
    read_bytes,
    read_json,
    require_space,
    staged_file,
    write_json,
)


def test_a_staged_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    with staged_file(target) as file:
        file.write(b"half")
        assert not target.exists()
        file.write(b"whole")
    assert target.read_bytes() == b"halfwhole"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), staged_file(target) as file:
        file.write(b"new")
        raise RuntimeError("the source broke")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EFBIG, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EACCES, AccessError),
        (errno.EROFS, AccessError),
        (errno.ENOENT, ModelNotFoundError),
        (errno.EISDIR, FormatError),
        (errno.EIO, MachineError),
    ],
)
def test_system_errors_become_typed_ones(number: int, kind: type[EarnestError]) -> None:
    with pytest.raises(kind) as caught, machine_errors(Path("/x"), "reading"):
        raise OSError(number, os.strerror(number))
    assert "/x" in str(caught.value)


def test_typed_errors_pass_through_unchanged() -> None:
    with pytest.raises(UserError, match="mine"), machine_errors(Path("/x"), "reading"):
        raise UserError("mine")


def test_a_staged_folder_is_committed_whole(tmp_path: Path) -> None:
    folder = StagedFolder(tmp_path / "out", {"seed": 1})
    assert not folder.resumed
    write_json(folder.path / "a.json", {"x": 1})
    assert not (tmp_path / "out").exists()
    folder.commit()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_staged_folder_resumes_only_its_own_kind(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", {"seed": 1, "shape": (2, 3)}) as first:
        (first.path / "done").write_text("kept")
        (first.path / ".half.99.part").write_text("not kept")
    with StagedFolder(tmp_path / "out", {"seed": 1, "shape": (2, 3)}) as second:
        assert second.resumed
        assert (second.path / "done").read_text() == "kept"
        assert not (second.path / ".half.99.part").exists()
    with StagedFolder(tmp_path / "out", {"seed": 2, "shape": (2, 3)}) as third:
        assert not third.resumed
        assert not (third.path / "done").exists()


def test_two_runs_never_write_to_one_destination(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", {"seed": 1}) as first:
        (first.path / "done").write_text("kept")
        for seed in (1, 2):
            with pytest.raises(UserError, match="another run"):
                StagedFolder(tmp_path / "out", {"seed": seed})
        assert (first.path / "done").read_text() == "kept"
        first.commit()
    assert StagedFolder(tmp_path / "out", {"seed": 2}, force=True).path.exists()


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_staged_folder_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        StagedFolder(Path(name), {}, force=True)


def test_what_a_killed_commit_left_behind_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("x")
    (tmp_path / "out").mkdir()
    with StagedFolder(tmp_path / "out", {}, force=True) as folder:
        folder.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_staged_folder_with_a_broken_note_starts_over(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", {"seed": 1}) as first:
        (first.path / ".earnest-run.json").write_text("{")
    assert not StagedFolder(tmp_path / "out", {"seed": 1}).resumed


def test_an_existing_destination_is_replaced_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists"):
        StagedFolder(tmp_path / "out", {})
    folder = StagedFolder(tmp_path / "out", {}, force=True)
    assert (tmp_path / "out" / "mine").exists(), "nothing is replaced before the commit"
    (folder.path / "new").write_text("y")
    folder.commit()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "data",
    [b"", b"[1]", b"{", b"\xff\xfe", b'{"a": ' * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "array", "cut", "not utf-8", "deep", "long number"],
)
def test_bad_json_is_a_format_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_json(path)


@given(
    st.binary(max_size=200)
    | st.text(alphabet='{}[]":,.0123456789eE+-\\u tfn', max_size=200).map(str.encode)
)
@example(b'{"a": 1e999999999}')
@example(b'{"a": NaN}')
@example(b'{"\\ud800": 1}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_an_object_or_a_format_error(data: bytes) -> None:
    try:
        assert isinstance(parse_json_object(data, "x.json"), dict)
    except FormatError as error:
        assert "x.json" in str(error)


def test_reads_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, 100) == b"x" * 100
    with pytest.raises(FormatError, match="too large"):
        read_bytes(path, 99)


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FormatError, match="regular file"):
        read_bytes(pipe, 100)


def test_space_is_asked_for_before_it_is_taken(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(DiskFullError) as caught:
        require_space(tmp_path, 10**18)
    assert "free" in str(caught.value)


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"名": "文心", "n": [1, 2.5, None]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "文心" in json.dumps(value, ensure_ascii=False)
