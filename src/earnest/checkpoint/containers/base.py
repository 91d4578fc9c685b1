"""What every container offers and takes: `StoredFile` is read, `PlannedTensor` is written.

A container knows names, shapes and bytes; what a name means belongs to the dialects above it. All
tensors of a file are views of one read-only memory map: opening a 43 GB file costs its header.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Codec, Raw
from earnest.codecs.panel import Panel
from earnest.env import usable_cores
from earnest.errors import EarnestError, FormatError
from earnest.files import machine_errors


@dataclass(frozen=True)
class StoredFile:
    """One opened file, or several that belong together.

    Attributes:
        path: the file (or folder) it was opened from.
        tensors: stored name to tensor, in the order of the file; views of the memory maps.
        metadata: what the container says beside its tensors.
        maps: the memory maps under the tensors.
        offsets: stored name to the byte of its file at which the tensor begins, where known.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    maps: tuple[mmap.mmap, ...] = ()
    offsets: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        """Give back the pages read so far, so that streaming over a large file stays small.

        The arrays stay valid: what is touched again is read again. Does nothing on systems that
        have no such call.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)


Block = Raw | Callable[[], Raw]
"""A part of a tensor, or work that makes it. Work runs on all cores, ahead of the file."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that a writer will stream.

    Attributes:
        name: the name to store it under.
        codec: what its stored bits mean.
        shape: its shape in weights, as stored (row-major).
        blocks: starts over on each call; yields what the bytes of the tensor are, in order.
        layout: the panels of `codec` that the blocks are made of; None for rows.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Block]]
    layout: Panel | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks must add up to."""
        if self.layout is not None:
            return prod(self.layout.shape(*self.shape))
        return prod(self.shape) // self.codec.block_weights * self.codec.block_bytes


_Pending = tuple[PlannedTensor, Raw | Future[Raw] | None]
"""A block that is made or being made, or the end of its tensor."""


def stream(
    path: Path, tensors: Sequence[PlannedTensor]
) -> Iterator[tuple[PlannedTensor, memoryview | None]]:
    """The bytes of planned tensors, in order, checked against what was planned.

    Blocks that are work are done on all cores that this process may use, a few blocks ahead of the
    one that is handed out, across the borders of tensors.

    Args:
        path: what to call the file in messages.
        tensors: in the order of the file.

    Yields:
        A tensor and some of its bytes, and, after the last of them, the tensor and None.

    Raises:
        FormatError: the blocks are of another type, or do not add up to the tensor's size.
    """
    workers = usable_cores()
    ahead: deque[_Pending] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            written = 0
            for tensor, block in _look_ahead(tensors, pool, ahead, 2 * workers):
                if block is None:
                    if written != tensor.nbytes:
                        raise _wrong_blocks(path, tensor, f"{written:,} bytes")
                    written = 0
                    yield tensor, None
                    continue
                if block.dtype != (tensor.codec.storage if tensor.layout is None else np.uint8):
                    raise _wrong_blocks(path, tensor, f"an array of {block.dtype}")
                written += block.nbytes
                if written > tensor.nbytes:
                    raise _wrong_blocks(path, tensor, f"more than {tensor.nbytes:,} bytes")
                yield tensor, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        finally:
            for _, waiting in ahead:
                if isinstance(waiting, Future):
                    waiting.cancel()


def _look_ahead(
    tensors: Sequence[PlannedTensor],
    pool: ThreadPoolExecutor,
    ahead: deque[_Pending],
    limit: int,
) -> Iterator[tuple[PlannedTensor, Raw | None]]:
    """All blocks in order, None after those of each tensor; work is begun `limit` blocks ahead. An
    error comes in the place of its block, when everything before it is written."""

    def first() -> tuple[PlannedTensor, Raw | None]:
        tensor, block = ahead.popleft()
        return tensor, block.result() if isinstance(block, Future) else block

    def begin() -> Iterator[_Pending]:
        for tensor in tensors:
            try:
                for block in tensor.blocks():
                    yield tensor, pool.submit(block) if callable(block) else block
            except EarnestError as error:
                failed: Future[Raw] = Future()
                failed.set_exception(error)
                yield tensor, failed
                return
            yield tensor, None

    for item in begin():
        ahead.append(item)
        while len(ahead) > limit:
            yield first()
    while ahead:
        yield first()


def _wrong_blocks(path: Path, tensor: PlannedTensor, got: str) -> FormatError:
    return FormatError(
        f"{path}: the blocks of {tensor.name} do not make up the tensor",
        got=got,
        expected=f"{tensor.codec.storage} {list(tensor.shape)}, {tensor.nbytes:,} bytes",
    )


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a whole regular file.

    Raises:
        FormatError: it is empty or not a regular file (a pipe would hang the reader).
        ModelNotFoundError, AccessError, MachineError: it cannot be opened.
    """
    with machine_errors(path, "opening"):
        if path.exists() and not path.is_file():
            raise FormatError(f"{path} is not a regular file", remedy="name a model file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(
                    f"{path} is empty", remedy="download it again; the first attempt was cut off"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # What is not in memory yet comes in huge pages, where kernel and file system have them.
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def mapped_tensor(
    name: str,
    codec: Codec,
    shape: tuple[int, ...],
    data: npt.NDArray[np.uint8],
    offset: int,
    origin: str,
) -> LazyTensor:
    """A tensor that lies at byte `offset` of `data` (the memory map seen as `uint8 [bytes]`).

    The caller has checked that it lies inside and that its rows are whole blocks.
    """
    stored_shape = codec.stored_shape(shape)
    end = offset + prod(stored_shape) * codec.storage.itemsize

    def view() -> Raw:
        return data[offset:end].view(codec.storage).reshape(stored_shape)

    return LazyTensor(name, codec, shape, view, origin)
