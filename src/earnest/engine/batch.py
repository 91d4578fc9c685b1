"""Slices of sequences laid end to end: how a `Batch` is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earnest.runners.base import Batch, Int32


@dataclass(frozen=True)
class Slice:
    """New tokens of one sequence.

    Attributes:
        tokens: their ids, at least one.
        start: position of the first.
        blocks: the sequence's KV blocks, in order; enough for the last token's position.
        logits: which of the tokens' logits are wanted: this many of the last ones.
        hidden: the same for hidden states.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 0
    hidden: int = 0


def make_batch(slices: Sequence[Slice], block_size: int) -> Batch:
    """Lay the slices end to end; the rows that are wanted come in the same order."""
    lengths = [len(part.tokens) for part in slices]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    needed = [
        blocks_for(part.start + length, block_size)
        for part, length in zip(slices, lengths, strict=True)
    ]
    tables = np.full((len(slices), max(needed)), -1, np.int32)
    for row, part, count in zip(tables, slices, needed, strict=True):
        row[:count] = part.blocks[:count]
    return Batch(
        tokens=np.concatenate([np.asarray(part.tokens, np.int32) for part in slices]),
        positions=np.concatenate(
            [
                np.arange(part.start, part.start + length, dtype=np.int32)
                for part, length in zip(slices, lengths, strict=True)
            ]
        ),
        sequence_starts=starts,
        block_tables=tables,
        logits_rows=_last_rows(starts, [part.logits for part in slices]),
        hidden_rows=_last_rows(starts, [part.hidden for part in slices]),
    )


def _last_rows(starts: Int32, counts: Sequence[int]) -> Int32:
    return np.concatenate(
        [
            np.arange(end - count, end, dtype=np.int32)
            for count, end in zip(counts, starts[1:], strict=True)
        ]
    )


def blocks_for(positions: int, block_size: int) -> int:
    """KV blocks that so many positions occupy."""
    return -(-positions // block_size)
