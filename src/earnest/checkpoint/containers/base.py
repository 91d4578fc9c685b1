"""What every container offers and takes: `StoredFile` is read, `PlannedTensor` is written.

A container knows names, shapes and bytes; what a name means belongs to the dialects above it. All
tensors of a file are views of one read-only memory map: opening a 43 GB file costs its header.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Codec, Raw
from earnest.errors import FormatError
from earnest.files import machine_errors


@dataclass(frozen=True)
class StoredFile:
    """One opened file, or several that belong together.

    Attributes:
        path: the file (or folder) it was opened from.
        tensors: stored name to tensor, in the order of the file; views of the memory maps.
        metadata: what the container says beside its tensors.
        maps: the memory maps under the tensors.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    maps: tuple[mmap.mmap, ...] = ()

    def forget(self) -> None:
        """Give back the pages read so far, so that streaming over a large file stays small.

        The arrays stay valid: what is touched again is read again. Does nothing on systems that
        have no such call.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that a writer will stream.

    Attributes:
        name: the name to store it under.
        codec: what its stored bits mean.
        shape: its shape in weights, as stored (row-major).
        blocks: starts over on each call; yields arrays whose bytes, in order, are the tensor.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Raw]]

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks must add up to."""
        return prod(self.shape) // self.codec.block_weights * self.codec.block_bytes


def stream(path: Path, tensor: PlannedTensor) -> Iterator[memoryview]:
    """The bytes of a planned tensor, in order, checked against what was planned.

    Raises:
        FormatError: the blocks are of another type, or do not add up to the tensor's size.
    """
    written = 0
    for block in tensor.blocks():
        if block.dtype != tensor.codec.storage:
            raise _wrong_blocks(path, tensor, f"an array of {block.dtype}")
        written += block.nbytes
        if written > tensor.nbytes:
            break
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    if written != tensor.nbytes:
        raise _wrong_blocks(path, tensor, f"{written:,} bytes")


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
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
