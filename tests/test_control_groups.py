"""Limits of control groups, versions 1 and 2, on files made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from earnest import control_groups, env


def told(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """What the system tells: the file that names the groups, and the folder of all groups."""
    root = folder / "root"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (folder / "groups").write_text(groups)
    return folder / "groups", root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "nonsense"}, None),
        ("0::/", {}, None),
        ("nonsense", {}, None),
        ("", {}, None),
        (
            "4:cpu,cpuacct:/c",
            {"cpu/c/cpu.cfs_quota_us": "300000", "cpu/c/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpu:/c",
            {"cpu/c/cpu.cfs_quota_us": "-1", "cpu/c/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("5:memory:/m", {"cpu/m/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_tightest_quota_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float | None
) -> None:
    assert control_groups.cpu_quota(*told(tmp_path, groups, files)) == expected


STAT = "anon 700\ninactive_file 200\nactive_file 50\nfile 300\n"
STAT_1 = "cache 9\ntotal_inactive_file 30\ntotal_active_file 10\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param(
            "0::/a",
            {"a/memory.max": "1000", "a/memory.current": "900", "a/memory.stat": STAT},
            1000 - (900 - 250),
            id="pages of files are free",
        ),
        pytest.param(
            "0::/a/b",
            {
                "a/b/memory.max": "max",
                "a/b/memory.current": "10",
                "a/memory.max": "100",
                "a/memory.current": "40",
            },
            60,
            id="a parent's limit",
        ),
        pytest.param(
            "0::/a", {"a/memory.max": "100", "a/memory.current": "170"}, 0, id="over its limit"
        ),
        pytest.param(
            "0::/a", {"a/memory.max": "max", "a/memory.current": "10"}, None, id="no limit"
        ),
        pytest.param("0::/a", {"a/memory.max": "100"}, None, id="usage is not told"),
        pytest.param(
            "0::/a",
            {"a/memory.max": "100", "a/memory.current": "10", "a/memory.stat": "nonsense"},
            None,
            id="counts that nobody knows",
        ),
        pytest.param(
            "9:memory:/docker/c\n3:cpu:/x",
            {
                "memory/memory.limit_in_bytes": "100",
                "memory/memory.usage_in_bytes": "80",
                "memory/memory.stat": STAT_1,
            },
            60,
            id="version 1, seen from within a container",
        ),
        pytest.param("", {}, None, id="no groups"),
    ],
)
def test_what_the_tightest_group_leaves(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int | None
) -> None:
    assert control_groups.free_memory(*told(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 3), (0.5, 1), (1.5, 2), (2, 2), (64.0, 3)])
def test_usable_cores_are_the_lesser_of_mask_and_quota(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 9}, raising=False)
    monkeypatch.setattr(control_groups, "cpu_quota", lambda: quota)
    assert env.usable_cores() == expected


def test_free_memory_is_the_lesser_of_machine_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "free_memory", lambda: 12345)
    assert env.free_memory() == 12345
    monkeypatch.setattr(control_groups, "free_memory", lambda: 2**60)
    assert 0 < env.free_memory() < 2**60
    monkeypatch.setattr(control_groups, "free_memory", lambda: None)
    assert 0 < env.free_memory() < 2**60
