"""From a checkpoint to what the native step reads: panels, in memory.

A codec that has a panel layout keeps its bits. Others are re-encoded, which a notice says: to q8_0
where rows are whole blocks of 32 weights, else to float32. The router is decoded to float32
whatever it is stored in. Nothing is read until `pack`; what it will take is known before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor, contiguous
from earnest.codecs.base import Codec, Float32
from earnest.codecs.bits import Bytes
from earnest.codecs.panel import PANEL_ROWS, PANELS, Panel
from earnest.errors import TensorsError, UserError
from earnest.log import Progress, silent

# Weights packed at a time; bounds the memory of decoded and re-encoded rows.
_CHUNK_WEIGHTS = 2**22

# Codecs that plain weights may be rounded to when asked.
Plain = Literal["bf16", "f16", "q8_0"]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix as it will be packed.

    Attributes:
        name: its canonical name without `.weight`.
        tensor: where it comes from.
        layout: the panels it becomes.
    """

    name: str
    tensor: LazyTensor
    layout: Panel

    @property
    def codec(self) -> str:
        """Name of the codec of the panels."""
        return self.layout.codec.name

    @property
    def is_reencoded(self) -> bool:
        """Whether the stored bits are not kept."""
        return self.layout.codec.name != self.tensor.codec.name

    @property
    def shape(self) -> tuple[int, int]:
        """`(panels, bytes of a panel)`."""
        return self.layout.shape(*self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
        panels, panel_bytes = self.shape
        return panels * panel_bytes

    def pack(self) -> Bytes:
        """The panels, `uint8` of `shape`, from a 64-byte boundary: a panel's 64 bytes then lie in
        one cache line wherever the codec allows."""
        panels = _aligned(self.shape)
        rows, columns = self.tensor.shape
        step = max(1, _CHUNK_WEIGHTS // (columns * PANEL_ROWS)) * PANEL_ROWS
        stored, codec = self.tensor.raw(), self.layout.codec
        for start in range(0, rows, step):
            part = contiguous(stored[start : start + step])
            if self.is_reencoded:
                assert codec.encode is not None
                part = codec.encode(self.tensor.codec.decode(part))
            packed = self.layout.pack(part, columns)
            panels[start // PANEL_ROWS : start // PANEL_ROWS + len(packed)] = packed
        return panels


@dataclass(frozen=True)
class Packing:
    """A model about to be packed.

    Attributes:
        matrices: every matrix, in the order of the checkpoint.
        vectors: norms (name without `.weight`), biases and correction biases, float32.
    """

    matrices: tuple[PackedMatrix, ...]
    vectors: Mapping[str, Float32]

    @property
    def nbytes(self) -> int:
        """Bytes of all panels."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def notice(self) -> str | None:
        """What is re-encoded, in a sentence; None if nothing is."""
        counts = Counter(
            (matrix.tensor.codec.name, matrix.codec)
            for matrix in self.matrices
            if matrix.is_reencoded and not matrix.name.endswith(".mlp.gate")
        )
        if not counts:
            return None
        what = ", ".join(f"{n:,} from {old} to {new}" for (old, new), n in counts.items())
        return f"matrices without a kernel for their codec are re-encoded: {what}"

    def pack(
        self, threads: int, forget: Callable[[int], None], progress: Progress = silent
    ) -> Iterator[tuple[PackedMatrix, Bytes]]:
        """Pack all matrices, and hand them out in order.

        Args:
            threads: matrices packed at the same time.
            forget: told the stored bytes read, `Checkpoint.forgetter()`.
            progress: told the bytes of panels written.
        """
        done, total = 0, self.nbytes
        waiting = deque[tuple[PackedMatrix, Future[Bytes]]]()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for matrix in (*self.matrices, *[None] * threads):
                    if matrix is not None:
                        waiting.append((matrix, pool.submit(matrix.pack)))
                    if waiting and (matrix is None or len(waiting) > threads):
                        first, future = waiting.popleft()
                        progress(done, total, "packing weights")
                        yield first, future.result()
                        done += first.nbytes
                        forget(first.tensor.nbytes)
            finally:
                for _, future in waiting:
                    future.cancel()
        progress(total, total, "packing weights")


def plan_packing(checkpoint: Checkpoint, *, plain: Plain | None = None) -> Packing:
    """Decide what every tensor of the main model becomes; only vectors are read.

    Args:
        checkpoint: the model; multi-token-prediction tensors are left out.
        plain: round matrices stored as f32, f16 or bf16 to this codec; None keeps their bits.

    Raises:
        UserError: `plain` is not a codec that can be asked for.
    """
    if plain not in (None, "bf16", "f16", "q8_0"):
        raise UserError(
            "plain weights cannot be packed as asked", got=plain, expected="bf16, f16 or q8_0"
        )
    matrices, vectors = [], {}
    tied = checkpoint.config.tie_word_embeddings
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("model.mtp_") or (tied and name == "lm_head.weight"):
            continue
        short = name.removesuffix(".weight")
        if len(tensor.shape) == 1:
            vectors[short] = np.ascontiguousarray(tensor.read(), np.float32)
        else:
            codec = "f32" if name.endswith(".mlp.gate.weight") else _codec_for(tensor, plain)
            matrices.append(PackedMatrix(short, tensor, PANELS[codec]))
    if not matrices:
        raise TensorsError("the checkpoint has no weight matrices")
    return Packing(tuple(matrices), vectors)


def _codec_for(tensor: LazyTensor, plain: Plain | None) -> str:
    codec: Codec = tensor.codec
    if codec.name in ("f32", "f16", "bf16"):
        fits = plain is not None and tensor.shape[1] % PANELS[plain].codec.block_weights == 0
        return plain if plain is not None and fits else codec.name
    if codec.name in PANELS:
        return codec.name
    return "q8_0" if tensor.shape[1] % 32 == 0 else "f32"


def _aligned(shape: tuple[int, int]) -> Bytes:
    size = shape[0] * shape[1]
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)
