"""Weights in RAM: pinned there, and what to say when they do not fit.

Mapped weights are the system's to keep or drop. Nothing fetches them ahead of their use: it did not
make the first token come sooner (docs/log.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable

import numpy as np

from earnest import env
from earnest.codecs.bits import Bytes
from earnest.errors import MachineError
from earnest.log import Progress, silent

Span = tuple[int, int]
"""First address and the one after the last, both at page boundaries."""

_GIB = 2**30
_PIECE = 2**26  # bytes pinned by a call


def zeros(size: int) -> Bytes:
    """Zeros, in huge pages where the system has them: looking up small ones takes a tenth of the
    time of reading. As with `numpy.zeros`, what is never touched takes no memory.

    Args:
        size: bytes, at least one.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area.madvise(mmap.MADV_HUGEPAGE)
            return np.frombuffer(area, np.uint8)
    return np.zeros(size, np.uint8)


def spans(arrays: Iterable[Bytes]) -> list[Span]:
    """The pages under arrays, as few spans as possible, in order."""
    page = mmap.PAGESIZE
    found: list[Span] = []
    for start, nbytes in sorted((a.ctypes.data, a.nbytes) for a in arrays if a.nbytes):
        first, end = start // page * page, -(-(start + nbytes) // page) * page
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


def _pieces(found: list[Span]) -> Iterable[tuple[int, int]]:
    for first, end in found:
        for start in range(first, end, _PIECE):
            yield start, min(_PIECE, end - start)


def lock(arrays: list[Bytes], progress: Progress = silent) -> None:
    """Pin arrays in RAM until they are unmapped; mapped ones are read now.

    Args:
        arrays: they may overlap, and share pages with other memory.
        progress: told the bytes pinned.

    Raises:
        MachineError: this process may not pin so much; nothing stays pinned.
    """
    call = _system_call("mlock", ctypes.c_void_p, ctypes.c_size_t)
    if call is None:
        raise MachineError("this system has no call that pins memory", remedy="run without --lock")
    found = spans(arrays)
    total, done = sum(end - first for first, end in found), 0
    for start, nbytes in _pieces(found):
        progress(done, total, "locking weights")
        if call(start, nbytes):
            code = ctypes.get_errno()
            for first, end in found:
                _unlock(first, end - first)
            raise _refused(total, code)
        done += nbytes
    progress(total, total, "locking weights")


def _unlock(start: int, nbytes: int) -> None:
    call = _system_call("munlock", ctypes.c_void_p, ctypes.c_size_t)
    if call is not None:
        call(start, nbytes)


def _refused(total: int, code: int) -> MachineError:
    limit = _lock_limit()
    if code in (errno.EPERM, errno.ENOMEM, errno.EAGAIN):
        return MachineError(
            "the weights cannot be pinned in RAM: this process may not pin so much",
            got=f"{total / _GIB:.2f} GiB to pin; {os.strerror(code)}",
            expected="a limit (ulimit -l) above that"
            + ("" if limit is None else f"; it is {limit / 2**20:,.0f} MiB"),
            remedy="raise it (`ulimit -l unlimited` as root, or a line `memlock` in "
            "/etc/security/limits.conf), or run without --lock",
        )
    return MachineError("the weights cannot be pinned in RAM", got=os.strerror(code))


def _lock_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def too_large(mapped: int, beside: int) -> str | None:
    """What to tell if mapped weights and what is needed beside them exceed the free memory: it
    works, from the disk. None if they fit."""
    free = max(0, env.free_memory() - beside)
    if mapped <= free:
        return None
    return (
        f"the weights ({mapped / _GIB:.2f} GiB) are larger than the memory left for them "
        f"({free / _GIB:.2f} GiB): parts are read from the disk again at every token, which is "
        "slow; a smaller codec (earnest quantize) or more memory would help"
    )


def _system_call(name: str, *types: type) -> Callable[..., int] | None:
    """A function of the C library, or None where there is none."""
    if os.name != "posix":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.argtypes, function.restype = types, ctypes.c_int
    found: Callable[..., int] = function
    return found
