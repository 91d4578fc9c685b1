"""What a runner owes: `step(batch)` turns a batch of tokens into logits. The only seam between the
engine and a machine; `reference` (numpy) implements it now, faster ones will.

Keys and values of past tokens live with the runner in `num_blocks` blocks of `block_size`
positions. Who owns which block is the engine's business: it passes a block table per sequence.
Position p of a sequence is stored in block `block_table[p // block_size]`, slot `p % block_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from earnest.config import ErnieConfig

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """The new tokens of S sequences, T in all, laid end to end. Sequences may bring any number of
    new tokens (a prompt chunk, or one token while decoding) and have any length so far.

    Attributes:
        tokens: int32 `[T]` token ids.
        positions: int32 `[T]` position of each token in its own sequence; consecutive within one.
        sequence_starts: int32 `[S + 1]`; sequence s owns rows `[starts[s], starts[s + 1])`.
        block_tables: int32 `[S, B]` KV block ids in order; entries beyond what is needed are -1.
        logits_rows: int32 `[R]` the rows of T whose logits are wanted.
        hidden_rows: int32 `[H]` the rows of T whose hidden states are wanted.
    """

    tokens: Int32
    positions: Int32
    sequence_starts: Int32
    block_tables: Int32
    logits_rows: Int32
    hidden_rows: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True)
class Routing:
    """The router's decisions of one MoE layer for the T tokens of a batch.

    Attributes:
        layer: index of the layer in the model.
        experts: int32 `[T, k]`, best selection score first.
        weights: float32 `[T, k]`, what each expert's output is multiplied with.
    """

    layer: int
    experts: Int32
    weights: Float32


class Runner(Protocol):
    """A model on a machine."""

    @property
    def config(self) -> ErnieConfig:
        """The model's numbers."""
        ...

    @property
    def block_size(self) -> int:
        """Positions per KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks there are, in all."""
        ...

    def step(
        self,
        batch: Batch,
        routing: list[Routing] | None = None,
        hidden: Float32 | None = None,
    ) -> Float32:
        """Run the batch, store its keys and values, return logits float32 `[R, vocab_size]`.

        Args:
            batch: the new tokens; every position below a token's own must have been stored by an
                earlier step or by this one.
            routing: a list that receives one `Routing` per MoE layer, in order; None to skip.
            hidden: float32 `[H, hidden_size]`, which receives the last layer's output, after the
                final norm, of the `hidden_rows`; None if there are none.
        """
        ...
