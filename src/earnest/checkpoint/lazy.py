"""`LazyTensor`: a tensor that is known by name, codec and shape, and read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.bits import Bytes

# The origin of a tensor that the files lack and that zeros stand in for.
ABSENT = "absent: zeros"

_STRIP = 256


def contiguous(stored: Raw) -> Raw:
    """The same array in row-major order: itself if it is so already, else a copy.

    Transposed files are copied in strips of 256 columns: the source rows of a strip stay in the
    cache while its columns are gathered, which is three times as fast as numpy's own copy.
    """
    if stored.flags.c_contiguous or stored.ndim != 2:
        return np.ascontiguousarray(stored)
    copy = np.empty(stored.shape, stored.dtype)
    for start in range(0, stored.shape[1], _STRIP):
        copy[:, start : start + _STRIP] = stored[:, start : start + _STRIP]
    return copy


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        name: its canonical name (or, below a dialect, the name in the file).
        codec: what its stored bits mean.
        shape: `[rows, columns]` or `[n]`, as the arithmetic sees it.
        view: returns the stored array, a view of the memory-mapped file wherever the layout allows
            (shape `codec.stored_shape(shape)`, dtype `codec.storage`).
        origin: file and stored name, for messages.
        panels: where the file holds the tensor as panels of its codec (`codecs.panel`): returns
            them as `uint8 [panels, bytes of a panel]`, a view of the file. None elsewhere.
    """

    name: str
    codec: Codec
    shape: tuple[int, ...]
    view: Callable[[], Raw]
    origin: str
    panels: Callable[[], Bytes] | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.size // self.codec.block_weights * self.codec.block_bytes

    @property
    def is_absent(self) -> bool:
        """Whether the files lack it and zeros stand in for it."""
        return self.origin == ABSENT

    def raw(self) -> Raw:
        """The stored array, not decoded; a view of the file where the layout allows."""
        return self.view()

    def read(self) -> Float32:
        """The whole tensor decoded to float32 `shape`."""
        return self.codec.decode(self.view())

    def read_rows(self, rows: slice | npt.NDArray[np.integer]) -> Float32:
        """Some rows (first axis) decoded to float32, without touching the others."""
        return self.codec.decode(self.view()[rows])

    def row_blocks(self, max_weights: int = 2**22) -> Iterator[tuple[slice, Raw]]:
        """The stored array in contiguous blocks of whole rows of about `max_weights` weights, in
        order; views of the file where it is laid out so."""
        stored = self.view()
        rows = max(1, max_weights // max(1, self.size // max(1, self.shape[0])))
        for start in range(0, self.shape[0], rows):
            block = slice(start, min(start + rows, self.shape[0]))
            yield block, contiguous(stored[block])

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return replace(self, name=name)
