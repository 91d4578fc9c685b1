"""Files whose every byte has its place before the first weight is read: head, then tensors.

Tensors stream straight into their places. A record beside the file says how many of them are on the
disk; the same call, after an interruption, goes on behind the last of these.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from earnest.checkpoint.containers.base import PlannedTensor, stream
from earnest.files import machine_errors
from earnest.log import Progress, silent

# A tensor is entered in the record when it, and all before it, are on the disk. Waiting for the
# disk after every small one would cost more than writing it again.
_SYNC_BYTES = 2**28

RECORD_SUFFIX = ".done"

# The huge page of x86-64 and of most Arm systems.
_HUGE_PAGE = 2**21


def write_sequential(
    path: Path,
    head: bytes,
    tensors: Sequence[PlannedTensor],
    starts: Sequence[int],
    progress: Progress = silent,
) -> bool:
    """Write a file, streaming the tensors' blocks.

    What an earlier call with the same arguments began at `path` is continued, if its record lies
    beside it: `path` must be in a folder that only runs with the same input write to.

    Args:
        path: the file; replaced if it exists and cannot be continued.
        head: everything before the first tensor.
        tensors: what to write, in order.
        starts: where each tensor begins in the file (zeros fill the gaps) and, last, its end.
        progress: told about bytes of data written.

    Returns:
        Whether an earlier call was continued.

    Raises:
        FormatError: the blocks of a tensor do not add up to its size.
        DiskFullError, AccessError, MachineError: it cannot be written.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    record = path.with_name(path.name + RECORD_SUFFIX)
    with machine_errors(path, "writing"):
        finished = _finished(path, record, head, starts)
        with path.open("r+b" if finished else "wb", buffering=0) as raw:
            file = _HugePageWriter(raw, starts[finished] if finished else 0)
            if not finished:
                file.write(head)
                file.write(bytes(starts[0] - len(head)))
            done = sum(tensor.nbytes for tensor in tensors[:finished])
            recorded, number = starts[finished], finished
            for tensor, block in stream(path, tensors[finished:]):
                if block is not None:
                    file.write(block)
                    done += block.nbytes
                    progress(done, total, tensor.name)
                    continue
                number += 1
                file.write(bytes(starts[number] - file.position))
                if starts[number] - recorded >= _SYNC_BYTES:
                    file.sync()
                    record.write_text(str(number), encoding="ascii")
                    recorded = starts[number]
            file.sync()
        record.unlink(missing_ok=True)
    progress(total, total, path.name)
    return finished > 0


class _HugePageWriter:
    """Writes whole huge pages at a time.

    Linux keeps what was written in memory, in pages as large as the pieces that it came in where
    these begin at multiples of their size (ext4 since 6.16, xfs and others before). A file written
    so is mapped in huge pages as long as it stays there, and decoding from it looks up one page
    where it would look up 512 (docs/log.md, 2026-11-29, has what that costs).

    Args:
        file: unbuffered.
        position: where to begin; what lies behind is cut off.
    """

    def __init__(self, file: io.FileIO, position: int) -> None:
        file.truncate(position)
        file.seek(position)
        self._file, self._held = file, bytearray()
        self.position = position  # behind all that was given, held or written

    def write(self, data: bytes | memoryview) -> None:
        """Bytes that come next; those behind the last whole page are held."""
        view = memoryview(data)
        if self._held:
            missing = -self.position % _HUGE_PAGE
            self._held += view[:missing]
            if len(view) >= missing:
                self._put_held()
            self.position += min(missing, len(view))
            view = view[missing:]
        self.position += len(view)
        whole = max(0, len(view) - self.position % _HUGE_PAGE)
        self._put(view[:whole])
        self._held += view[whole:]

    def sync(self) -> None:
        """Have all that was given on the disk."""
        self._put_held()
        os.fsync(self._file.fileno())

    def _put_held(self) -> None:
        held, self._held = self._held, bytearray()
        self._put(memoryview(held))

    def _put(self, view: memoryview) -> None:
        while len(view):
            view = view[self._file.write(view) :]


def _finished(path: Path, record: Path, head: bytes, starts: Sequence[int]) -> int:
    """How many tensors an earlier call has left on the disk."""
    if not (path.is_file() and record.is_file()):
        return 0
    text = record.read_text(encoding="ascii", errors="replace")
    number = int(text) if text.isdigit() and len(text) < 10 else 0
    if not 0 < number < len(starts) or path.stat().st_size < starts[number]:
        return 0
    with path.open("rb") as file:
        return number if file.read(len(head)) == head else 0
