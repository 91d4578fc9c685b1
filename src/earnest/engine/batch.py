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
        hidden: the same for hidden states.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 0
    hidden: int = 0


def make_batch(slices: Sequence[Slice], block_size: int) -> Batch:
    """Lay the slices end to end; the rows that are wanted come in the same order."""
    # Lists, made arrays once: most steps are short, and a call of numpy costs more than a row.
    tokens: list[int] = []
    positions: list[int] = []
    starts = [0]
    logits: list[int] = []
    hidden: list[int] = []
    tables: list[list[int]] = []
    for part in slices:
        tokens.extend(part.tokens)
        end, length = len(tokens), len(part.tokens)
        positions.extend(range(part.start, part.start + length))
        starts.append(end)
        logits.extend(range(end - part.logits, end))
        hidden.extend(range(end - part.hidden, end))
        tables.append(list(part.blocks[: blocks_for(part.start + length, block_size)]))
    widest = max(map(len, tables))
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        sequence_starts=np.array(starts, np.int32),
        block_tables=np.array([row + [-1] * (widest - len(row)) for row in tables], np.int32),
        logits_rows=np.array(logits, np.int32),
        hidden_rows=np.array(hidden, np.int32),
    )


def blocks_for(positions: int, block_size: int) -> int:
    """KV blocks that so many positions occupy."""
    return -(-positions // block_size)
