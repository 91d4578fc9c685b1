"""Weights for the reference runner: float32 on demand, kept while a memory budget lasts.

A checkpoint is usually bfloat16 or packed to a few bits, numpy multiplies float32. Decoded weights
that are used in every step (everything but routed experts) have the first claim on the budget;
routed experts are kept first come, first served, which for the near-uniform routing these models
were trained to is as good as any policy and never thrashes. What is not kept is decoded again each
time, in blocks of rows, so that a 103,424 x 2,560 output projection costs 16 MiB and not 1 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Float32
from earnest.errors import TensorsError

# Weights decoded at a time where a tensor is not kept (16 MiB of float32).
BLOCK_WEIGHTS = 2**22


def decoded_bytes(tensor: LazyTensor) -> int:
    """Memory that keeping `tensor` decoded takes; stored float32 is used where it lies in the file,
    and costs nothing."""
    return 0 if tensor.codec.storage == np.float32 else 4 * tensor.size


class Weights:
    """The tensors of a model, by canonical name, as float32.

    Args:
        tensors: those that will be used (keeping is planned over them, in this order).
        memory_budget: bytes that decoded matrices may take; vectors are small and always kept.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], memory_budget: int) -> None:
        self._tensors = tensors
        self._kept: dict[str, Float32] = {}
        self._to_keep: set[str] = set()
        self._left = memory_budget
        for name, tensor in tensors.items():
            if ".mlp.experts." not in name:
                self._claim(name, tensor)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def kept_bytes(self) -> int:
        """Bytes that decoded weights take now."""
        return sum(decoded_bytes(self._tensors[name]) for name in self._kept)

    def vector(self, name: str) -> Float32:
        """A one-dimensional tensor, float32 `[N]`.

        Raises:
            TensorsError: the checkpoint has no such tensor.
        """
        if name not in self._kept:
            self._kept[name] = self._tensor(name).read()
        return self._kept[name]

    def rows(self, name: str, ids_T: npt.NDArray[np.integer]) -> Float32:
        """Some rows of a matrix, float32 `[T, N]`; the others are not decoded for it."""
        if name in self._kept:
            kept_TN: Float32 = self._kept[name][ids_T]
            return kept_TN
        return self._tensor(name).read_rows(ids_T)

    def matmul(self, x_TN: Float32, name: str) -> Float32:
        """`x W^T` with the matrix `[M, N]` called `name`, float32 `[T, M]`."""
        tensor = self._tensor(name)
        if name not in self._kept and (name in self._to_keep or self._claim(name, tensor)):
            # An unaligned array would be copied by every product.
            self._kept[name] = np.require(tensor.read(), requirements="A")
        if name in self._kept:
            kept_TM: Float32 = x_TN @ self._kept[name].T
            return kept_TM
        y_TM = np.empty((len(x_TN), tensor.shape[0]), np.float32)
        for rows, raw in tensor.row_blocks(BLOCK_WEIGHTS):
            y_TM[:, rows] = x_TN @ tensor.codec.decode(raw).T
        return y_TM

    def _claim(self, name: str, tensor: LazyTensor) -> bool:
        cost = decoded_bytes(tensor)
        if cost > self._left:
            return False
        self._left -= cost
        self._to_keep.add(name)
        return True

    def _tensor(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise TensorsError(
                f"the checkpoint has no tensor {name}",
                remedy="open it with earnest.checkpoint.open_checkpoint, which lists all problems",
            ) from None
