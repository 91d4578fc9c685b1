"""Every environment variable that Earnest reads: name, meaning, default, in this one place.

A variable that does not parse is an error, never a silent default.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from earnest import control_groups
from earnest.errors import UserError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default in words, what it does."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("EARNEST_API_KEY", "none", "key that clients of `earnest serve` must show"),
    Variable("EARNEST_CACHE", "~/.cache/earnest", "folder for fetched models"),
    Variable("EARNEST_ISA", "the best", "instruction-set tier of the kernels; can only lower it"),
    Variable(
        "EARNEST_MEMORY_GIB",
        "half of the free memory",
        "GiB that the reference runner's decoded weights may take, and half of it the keys and "
        "values of either runner",
    ),
    Variable("EARNEST_NO_NATIVE", "not set", "1, while Earnest is installed: without the kernels"),
    Variable("EARNEST_OFFLINE", "0", "1: never use the network; fail instead of fetching"),
)


def cache_dir() -> Path:
    """Folder for fetched models (`EARNEST_CACHE`); may not exist yet."""
    if value := os.environ.get("EARNEST_CACHE"):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "earnest"


def offline() -> bool:
    """Whether the network must not be used (`EARNEST_OFFLINE`).

    Raises:
        UserError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("EARNEST_OFFLINE", "0")
    if value not in ("", "0", "1"):
        raise UserError("EARNEST_OFFLINE is not a switch", got=value, expected="0 or 1")
    return value == "1"


def api_keys() -> tuple[str, ...]:
    """The key that clients of the server must show (`EARNEST_API_KEY`), if there is one."""
    key = os.environ.get("EARNEST_API_KEY")
    return (key,) if key else ()


def traces_endpoint() -> str | None:
    """Where OpenTelemetry's own variables say that traces go; None: nowhere."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() != "otlp":
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), None)


def service_is_named() -> bool:
    """Whether OpenTelemetry's own variables give this program a name."""
    attributes = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or "service.name=" in attributes


def isa_cap() -> str | None:
    """The instruction-set tier not to go above (`EARNEST_ISA`), or None; the runner checks it."""
    return os.environ.get("EARNEST_ISA") or None


def memory_budget() -> int:
    """Bytes that a model may take beside its files (`EARNEST_MEMORY_GIB`): decoded weights, and
    keys and values up to half of it.

    Raises:
        UserError: the variable is not a positive number.
    """
    value = os.environ.get("EARNEST_MEMORY_GIB")
    if value is None:
        return free_memory() // 2
    try:
        gib = float(value)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 1e6:
        raise UserError(
            "EARNEST_MEMORY_GIB is not an amount of memory",
            got=value,
            expected="GiB as a number, for example 4 or 0.5",
        )
    return int(gib * 2**30)


def usable_cores() -> int:
    """Threads that this process may run at once: its affinity mask, and the processors' worth of
    time that its control groups allow, rounded up; as the kernels count them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = control_groups.cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def free_memory() -> int:
    """Bytes of memory that can be taken now without swapping and within the limits of this
    process's control groups; 4 GiB where that is unknown."""
    machine = _free_memory_of_machine()
    allowed = control_groups.free_memory()
    return machine if allowed is None else min(machine, allowed)


def _free_memory_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30
