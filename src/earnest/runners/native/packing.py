"""From a checkpoint to what the native step reads: panels.

A packed file holds them: they are used where they lie, and nothing of them is read. Other files are
packed into memory. A codec that has a panel layout keeps its bits; others are re-encoded, as for a
packed file (`checkpoint.pack.panel_codec`), which a notice says. The router is decoded to float32
whatever it is stored in. Nothing is read until `place`; what it will take is known before.
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
from earnest.checkpoint.pack import panel_codec
from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes
from earnest.codecs.panel import PANEL_ROWS, PANELS, Panel
from earnest.errors import TensorsError, UserError
from earnest.log import Progress, silent

# Weights packed at a time; bounds the memory of decoded and re-encoded rows.
_CHUNK_WEIGHTS = 2**22
_ALIGNMENT = 64

# Codecs that plain weights may be rounded to when asked.
Plain = Literal["bf16", "f16", "q8_0"]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix as the step will read it.

    Attributes:
        name: its canonical name without `.weight`.
        tensor: where it comes from.
        layout: the panels it is or becomes.
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

    @property
    def is_mapped(self) -> bool:
        """Whether the file holds the panels as they are read, so that they are used in place."""
        return self.tensor.panels is not None and not self.is_reencoded

    def slices(self) -> Iterator[slice]:
        """The rows, in pieces of whole panels that are packed at a time."""
        rows, columns = self.tensor.shape
        step = max(1, _CHUNK_WEIGHTS // (columns * PANEL_ROWS)) * PANEL_ROWS
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def pack(self, rows: slice, panels: Bytes) -> None:
        """Write the panels of `rows`, one of `slices()`, to where they belong in `panels`, which
        is `uint8` of `shape`."""
        part = contiguous(self.tensor.raw_rows(rows))
        if self.is_reencoded:
            assert self.layout.codec.encode is not None
            part = self.layout.codec.encode(self.tensor.codec.decode(part))
        first = rows.start // PANEL_ROWS
        count = -(-(rows.stop - rows.start) // PANEL_ROWS)
        self.layout.pack(part, self.tensor.shape[1], out=panels[first : first + count])


@dataclass(frozen=True)
class Packing:
    """A model about to be placed.

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
    def mapped_bytes(self) -> int:
        """Bytes of the panels that are read in the file."""
        return sum(matrix.nbytes for matrix in self.matrices if matrix.is_mapped)

    @property
    def packed_bytes(self) -> int:
        """Bytes of memory for the panels that `place` makes."""
        return sum(_rounded(matrix.nbytes) for matrix in self.matrices if not matrix.is_mapped)

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

    def place(
        self, threads: int, forget: Callable[[int], None], progress: Progress = silent
    ) -> tuple[dict[str, Bytes], Bytes]:
        """Find or make the panels of every matrix.

        All that is made lies in one array. The system backs a large array with huge pages where
        it may (numpy asks it to), while most experts alone would be too small for that.

        Args:
            threads: pieces packed at the same time.
            forget: told the stored bytes read, `Checkpoint.forgetter()`.
            progress: told the bytes of panels that are in place.

        Returns:
            Name to panels `uint8 [panels, bytes of a panel]`, each from a 64-byte boundary (of the
            file, where they are mapped): a panel's 64 bytes then lie in one cache line wherever
            the codec allows. And the array, `uint8 [packed_bytes]`.
        """
        made, at = _aligned(self.packed_bytes), 0
        placed: dict[str, Bytes] = {}
        pieces: list[tuple[PackedMatrix, slice]] = []
        for matrix in self.matrices:
            if matrix.is_mapped:
                assert matrix.tensor.panels is not None
                placed[matrix.name] = matrix.tensor.panels()
                continue
            placed[matrix.name] = made[at : at + matrix.nbytes].reshape(matrix.shape)
            at += _rounded(matrix.nbytes)
            pieces += [(matrix, rows) for rows in matrix.slices()]
        total, done = self.nbytes, self.mapped_bytes
        waiting = deque[tuple[PackedMatrix, slice, Future[None]]]()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for piece in (*pieces, *[None] * 2 * threads):
                    if piece is not None:
                        matrix, rows = piece
                        future = pool.submit(matrix.pack, rows, placed[matrix.name])
                        waiting.append((matrix, rows, future))
                    if waiting and (piece is None or len(waiting) > 2 * threads):
                        progress(done, total, "packing weights")
                        matrix, rows, future = waiting.popleft()
                        future.result()
                        share = (rows.stop - rows.start) / matrix.tensor.shape[0]
                        done += int(matrix.nbytes * share)
                        forget(int(matrix.tensor.nbytes * share))
            finally:
                for _, _, future in waiting:
                    future.cancel()
        progress(total, total, "weights in place")
        return placed, made


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
    if plain is not None and tensor.codec.name in ("f32", "f16", "bf16"):
        fits = tensor.shape[1] % PANELS[plain].codec.block_weights == 0
        return plain if fits else tensor.codec.name
    return panel_codec(tensor).name


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _aligned(nbytes: int) -> Bytes:
    memory = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]
