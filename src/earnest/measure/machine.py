"""What this machine is, what it was measured to do, and which models have room on it.

Two rates bound every runner: the bytes a second that all usable threads read from memory, which
bounds decoding, and the 8-bit integer operations a second, which bound prefill. Both are measured
by the kernels' own loops, so that a share of them says what the runner leaves unused, and not what
another program's loop would have reached.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from earnest import control_groups, env
from earnest.codecs.registry import codec
from earnest.config import PRESETS, Accounting, ErnieConfig
from earnest.errors import MemoryBudgetError
from earnest.runners.native import isa, memory, ops

# The published members, and the ways of storing them, of the table of what fits.
MEMBERS = ("0.3b", "21b-a3b", "300b-a47b")
TYPES = ("q4_0", "q8_0", "bf16")
CONTEXT = 4096

# The memory read must dwarf the caches; what is less than this says nothing.
_LEAST_READ = 64 * 2**20
_READ = 512 * 2**20
_REPEATS = 5

# Of the free memory, what keys and values get beside mapped weights that fill it: an eighth
# (`engine.load`).
_FOR_KEYS_VALUES = 8


@dataclass(frozen=True)
class Cache:
    """A cache that holds data: its level, its bytes, and how many processors share it."""

    level: int
    nbytes: int
    shared_by: int


@dataclass(frozen=True)
class Machine:
    """What the system says of itself.

    Attributes:
        processor: its name.
        cores: logical processors.
        allowed: those in this process's affinity mask.
        quota: processors' worth of time that the control group may use; None for no limit.
        threads: what follows: threads worth using.
        caches: data caches of a processor, smallest first; empty where the system does not say.
        free_memory: bytes that can be taken now.
        tier: the instruction-set tier in use; None without compiled kernels, as are the next two.
        available_tiers: those that can be used here, lowest first.
        compiled_tiers: those of this build.
    """

    processor: str
    cores: int
    allowed: int
    quota: float | None
    threads: int
    caches: tuple[Cache, ...]
    free_memory: int
    tier: str | None
    available_tiers: tuple[str, ...] | None
    compiled_tiers: tuple[str, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Rates:
    """Measured limits of some threads in one tier.

    Attributes:
        tier: the instruction-set tier.
        threads: the threads that ran.
        read: bytes a second read from memory by all together.
        integer: 8-bit integer operations a second (a product and its sum are two).
    """

    tier: str
    threads: int
    read: float
    integer: float

    def to_dict(self) -> dict[str, Any]:
        """`tier`, `threads`, `read_gb_s` (10^9 bytes a second), `int8_tops` (10^12 a second)."""
        return {
            "tier": self.tier,
            "threads": self.threads,
            "read_gb_s": self.read / 1e9,
            "int8_tops": self.integer / 1e12,
        }


def look() -> Machine:
    """What the system says; nothing is measured.

    Raises:
        UserError: `EARNEST_ISA` names a tier that cannot be used here.
    """
    cores = os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(cores))
    kernels = isa.installed()
    return Machine(
        processor=_processor(),
        cores=cores,
        allowed=len(allowed),
        quota=control_groups.cpu_quota(),
        threads=ops.usable_threads() if kernels else env.usable_cores(),
        caches=_caches(Path(f"/sys/devices/system/cpu/cpu{allowed[0]}/cache")),
        free_memory=env.free_memory(),
        tier=isa.tier() if kernels else None,
        available_tiers=tuple(isa.available_tiers()) if kernels else None,
        compiled_tiers=tuple(isa.compiled_tiers()) if kernels else None,
    )


def measure_rates(threads: int | None = None) -> Rates:
    """Read bandwidth and integer rate of `threads` threads (by default all usable) in the tier in
    use: medians, of the best number of read streams. Takes a second or two.

    Raises:
        MissingPackageError: there are no compiled kernels.
        MemoryBudgetError: not enough memory is free to read anything but caches.
        UserError: not a number of threads, or `EARNEST_ISA` cannot be used here.
    """
    pool, tier = ops.thread_pool(threads), isa.tier()
    data = memory.zeros(_read_bytes())  # huge pages: looking up others would be measured, too
    data[:] = 1  # else every page is the system's one page of zeros
    read = max(
        statistics.median(ops.read_rate(pool, data, streams, tier=tier) for _ in range(_REPEATS))
        for streams in (1, 2, 4)
    )
    ops.integer_rate(pool, 10**5, tier=tier)  # wakes the clocks that wide units need
    integer = statistics.median(ops.integer_rate(pool, 10**6, tier=tier) for _ in range(_REPEATS))
    return Rates(tier, pool.workers, read, integer)


def try_rates(threads: int | None = None) -> tuple[Rates | None, str | None]:
    """What `measure_rates` measures and None; or None and, in words, why it could not.

    Raises:
        UserError: not a number of threads, or `EARNEST_ISA` cannot be used here.
    """
    if not isa.installed():
        return None, "there are no compiled kernels"
    try:
        return measure_rates(threads), None
    except MemoryBudgetError as error:
        return None, f"{error.problem} ({error.got}; {error.expected})"


def fits(
    free_memory: int, read: float | None = None, configs: dict[str, ErnieConfig] | None = None
) -> list[dict[str, Any]]:
    """What has room in `free_memory` bytes, by accounting: the published members in some types.

    Args:
        free_memory: bytes.
        read: bytes a second of read bandwidth, if known.
        configs: models by name; the published members by default.

    Returns:
        For each model and type: `model`, `type`, `weight_bytes`, `kv_bytes` (bf16, `CONTEXT`
        tokens), `fits`, `from_disk` (it does not fit, but a packed file of it is mapped, and what
        has no room is read from the disk, at the disk's speed), and `most_tok_s`: tokens a second
        that `read` allows one sequence at that context, if it fits, since a token reads its active
        weights and all its keys and values; None if `read` is not known.
    """
    rows = []
    for name, config in (configs or {name: PRESETS[name] for name in MEMBERS}).items():
        counted = Accounting(config)
        keys_values = counted.kv_bytes_per_token(2) * min(CONTEXT, config.max_position_embeddings)
        for kind in TYPES:
            bits = counted.uniform(codec(kind).bits_per_weight) | {"norms": 32}
            weights = counted.weight_bytes(bits)
            token = keys_values + active_bytes(counted, bits)
            fit = weights + keys_values <= free_memory
            rows.append(
                {
                    "model": name,
                    "type": kind,
                    "weight_bytes": weights,
                    "kv_bytes": keys_values,
                    "fits": fit,
                    "from_disk": not fit and keys_values <= free_memory // _FOR_KEYS_VALUES,
                    "most_tok_s": None if read is None else read / token,
                }
            )
    return rows


def active_bytes(counted: Accounting, bits: dict[str, float]) -> float:
    """Bytes of weights that one decoded token reads: everything but the experts it was not sent
    to, and but the embedding where that is not also the head."""
    config = counted.config
    share = {"routed_experts": config.moe_k / config.moe_num_experts} if config.is_moe else {}
    if not config.tie_word_embeddings:
        share["embedding"] = 0
    return sum(n * bits[part] / 8 * share.get(part, 1) for part, n in counted.parts.items() if n)


def peak_memory() -> int | None:
    """Most bytes of memory this process has held, mapped files included; None if unknown."""
    if sys.platform == "win32":
        return None
    # Linux's `ru_maxrss` is never less than what the process that started this one held.
    for line in _text(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource  # of Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def huge_page_share(least: int = 2**28) -> float | None:
    """Which part of the mapped files in memory this process reaches through huge pages, 0 to 1.

    None where the system does not tell (it is Linux that does: `FilePmdMapped` of
    /proc/self/smaps_rollup) or less than `least` bytes are mapped.
    """
    sizes = {
        name: 1024 * int(rest.split()[0])
        for name, _, rest in (
            line.partition(":") for line in _text(Path("/proc/self/smaps_rollup")).splitlines()
        )
        if rest.endswith(" kB")
    }
    if not {"Rss", "Anonymous", "FilePmdMapped"} <= sizes.keys():
        return None
    mapped = sizes["Rss"] - sizes["Anonymous"]
    return None if mapped < least else min(1.0, sizes["FilePmdMapped"] / mapped)


def _caches(folder: Path) -> tuple[Cache, ...]:
    found = []
    for index in folder.glob("index*"):
        size, level = _text(index / "size"), _text(index / "level")
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        if _text(index / "type") == "Instruction" or size[-1:] not in units or not level:
            continue
        shared = _text(index / "shared_cpu_list")
        found.append(Cache(int(level), int(size[:-1]) * units[size[-1]], _count(shared)))
    return tuple(sorted(found, key=lambda cache: cache.level))


def _count(ranges: str) -> int:
    """How many numbers a list like "0-3,8" names."""
    ends = [part.split("-") for part in ranges.split(",") if part]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _processor() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(path: Path) -> str:
    """A small file of the system; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_bytes() -> int:
    """How much to read: several times the largest cache, a quarter of what is free at most."""
    largest = max((cache.nbytes for cache in look().caches), default=0)
    free = env.free_memory()
    size = min(max(_READ, 4 * largest), free // 4) // 4096 * 4096
    if size < _LEAST_READ:
        raise MemoryBudgetError(
            "too little memory is free to measure how fast it is read",
            got=f"{free / 2**20:.0f} MiB",
            expected=f"at least {4 * _LEAST_READ / 2**20:.0f} MiB",
            remedy="close other programs",
        )
    return size
