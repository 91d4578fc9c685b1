"""What Linux control groups leave to this process: containers and services have limits of their
own, below those of the machine. Versions 1 and 2; no limit anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = _GROUPS, root: Path = _ROOT) -> float | None:
    """Processors' worth of time that this process's groups and their parents allow, the least of
    all; None for no limit."""
    found = (_quota(folder) for folder in _folders("cpu", groups, root))
    return min((quota for quota in found if quota is not None), default=None)


def free_memory(groups: Path = _GROUPS, root: Path = _ROOT) -> int | None:
    """Bytes that this process may still take before one of its groups is full, the least of all;
    pages of files count as free, as they can be read again. None for no limit."""
    found = (_room(folder) for folder in _folders("memory", groups, root))
    return min((room for room in found if room is not None), default=None)


def _folders(controller: str, groups: Path, root: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit something, and of their parents."""
    for line in _text(groups).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(base):
                break
            yield each


def _quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
    if len(words) != 2:
        words = (
            _text(folder / "cpu.cfs_quota_us").split() + _text(folder / "cpu.cfs_period_us").split()
        )
    try:
        quota, period = (float(word) for word in words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _room(folder: Path) -> int | None:
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            most, used = int(_text(folder / limit)), int(_text(folder / usage))
            counts = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines())
            names = (f"{prefix}active_file", f"{prefix}inactive_file")
            files = sum(int(counts.get(name, 0)) for name in names)
        except ValueError:  # absent, "max", or nothing that we know
            continue
        return max(0, most - max(0, used - files))
    return None


def _text(path: Path) -> str:
    """The text of a small file; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
