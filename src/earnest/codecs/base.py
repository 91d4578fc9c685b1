"""What stored bits mean: a `Codec` turns the bytes of a weight row into float32 and back.

Two kinds. A *plain* codec stores each weight as one number (`storage` is its numpy dtype; bf16 is
held as `uint16` bit patterns, since numpy has no bfloat16). A *block* codec packs `block_weights`
neighbouring weights of a row into `block_bytes` bytes; `storage` is `uint8`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codec:
    """One way to store weights.

    Attributes:
        name: lower-case name used everywhere, for example "bf16" or "q4_1".
        storage: dtype of the stored array; `uint8` for block codecs.
        block_weights: weights per block along the last axis (1 for plain codecs).
        block_bytes: bytes per block.
        decode: stored array `[..., n]` (plain) or `uint8 [..., n // block_weights * block_bytes]`
            to a new or shared float32 array `[..., n]`.
        encode: float32 `[..., n]` to the stored array, or None where Earnest cannot write it.
    """

    name: str
    storage: np.dtype[np.generic]
    block_weights: int
    block_bytes: int
    decode: Callable[[Raw], Float32]
    encode: Callable[[Float32], Raw] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether each weight is stored as one number (so arrays may be transposed and sliced)."""
        return self.block_weights == 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, block scales included."""
        return 8 * self.block_bytes / self.block_weights

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; `columns` must be a multiple of `block_weights`."""
        return columns // self.block_weights * self.block_bytes

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored array for a tensor of `shape`."""
        return shape if self.is_plain else (*shape[:-1], self.row_bytes(shape[-1]))
