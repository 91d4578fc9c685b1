"""`LazyTensor`: a tensor that is known by name, codec and shape, and read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.bits import Bytes
from earnest.codecs.panel import PANEL_ROWS, PANELS

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
            (shape `codec.stored_shape(shape)`, dtype `codec.storage`); from panels it is unpacked.
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

    def raw_rows(self, rows: slice | npt.NDArray[np.integer]) -> Raw:
        """Some rows (first axis) of the stored array, without touching the others; of a file of
        panels, those that hold the rows are unpacked."""
        if self.panels is None:
            return self.view()[rows]
        return _unpacked(self.codec, self.shape, self.panels(), rows)

    def read(self) -> Float32:
        """The whole tensor decoded to float32 `shape`."""
        return self.codec.decode(self.view())

    def read_rows(self, rows: slice | npt.NDArray[np.integer]) -> Float32:
        """Some rows (first axis) decoded to float32, without touching the others."""
        return self.codec.decode(self.raw_rows(rows))

    def row_slices(self, max_weights: int = 2**22) -> Iterator[slice]:
        """All rows in order, in slices of about `max_weights` weights and of whole panels: of a
        multiple of 16 rows, but for the last."""
        rows = max_weights // max(1, self.size // max(1, self.shape[0]))
        rows = max(1, rows // PANEL_ROWS) * PANEL_ROWS
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    def row_blocks(self, max_weights: int = 2**22) -> Iterator[tuple[slice, Raw]]:
        """The stored array in contiguous blocks of rows, those of `row_slices`; views of the file
        where it is laid out so."""
        for rows in self.row_slices(max_weights):
            yield rows, contiguous(self.raw_rows(rows))

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return self if name == self.name else replace(self, name=name)


def _unpacked(
    codec: Codec, shape: tuple[int, ...], panels: Bytes, rows: slice | npt.NDArray[np.integer]
) -> Raw:
    """Some rows of a matrix that is stored as panels."""
    layout, (height, columns) = PANELS[codec.name], shape
    if isinstance(rows, slice) and rows.step in (None, 1):
        start, stop, _ = rows.indices(height)
        if start >= stop:
            return np.empty(codec.stored_shape((0, columns)), codec.storage)
        first, last = start // PANEL_ROWS, -(-stop // PANEL_ROWS)
        above = first * PANEL_ROWS
        part = layout.unpack(panels[first:last], min(last * PANEL_ROWS, height) - above, columns)
        return part[start - above : stop - above]
    chosen = np.arange(height)[rows]
    if not chosen.size:
        return np.empty(codec.stored_shape((*chosen.shape, columns)), codec.storage)
    needed, place = np.unique(chosen // PANEL_ROWS, return_inverse=True)
    part = layout.unpack(panels[needed], len(needed) * PANEL_ROWS, columns)
    where = place.reshape(chosen.shape) * PANEL_ROWS + chosen % PANEL_ROWS
    return np.asarray(part[where])
