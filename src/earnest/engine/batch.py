"""Slices of sequences laid end to end: how a `Batch` is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earnest.runners.base import Batch


@dataclass(frozen=True)
class Slice:
    """New tokens of one sequence.

    Attributes:
        tokens: their ids, at least one.
        start: position of the first.
        blocks: the sequence's KV blocks, in order; enough for the last token's position.
        logits: which of the tokens' logits are wanted: this many of the last ones.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 0


def make_batch(slices: Sequence[Slice], block_size: int) -> Batch:
    """Lay the slices end to end; the logits rows come in the same order."""
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
        logits_rows=np.concatenate(
            [
                np.arange(end - part.logits, end, dtype=np.int32)
                for part, end in zip(slices, starts[1:], strict=True)
            ]
        ),
    )


def blocks_for(positions: int, block_size: int) -> int:
    """KV blocks that so many positions occupy."""
    return -(-positions // block_size)
