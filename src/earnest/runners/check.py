"""Whether a batch makes sense, for every runner: what it is checked for, and how it is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from earnest.config import ErnieConfig
from earnest.errors import PromptError, UserError
from earnest.runners.base import Batch, Float32


def check_batch(
    batch: Batch,
    config: ErnieConfig,
    block_size: int,
    num_blocks: int,
    hidden: Float32 | None = None,
) -> None:
    """Refuse a batch that contradicts itself, the model or the KV blocks, and a `hidden` that does
    not fit its rows.

    Raises:
        PromptError: a token id is outside the vocabulary, or a position outside the context.
        UserError: anything else.
    """
    arrays = {
        "tokens": (batch.tokens, 1),
        "positions": (batch.positions, 1),
        "sequence_starts": (batch.sequence_starts, 1),
        "block_tables": (batch.block_tables, 2),
        "logits_rows": (batch.logits_rows, 1),
        "hidden_rows": (batch.hidden_rows, 1),
    }
    for name, (array, dimensions) in arrays.items():
        if array.ndim != dimensions or not np.issubdtype(array.dtype, np.integer):
            raise UserError(
                f"Batch.{name} has the wrong kind of array",
                got=f"{array.dtype} {list(array.shape)}",
                expected=f"int32 of {dimensions} dimension{'s' * (dimensions > 1)}",
            )
    T, starts, tables = len(batch.tokens), batch.sequence_starts, batch.block_tables
    if T == 0:
        raise PromptError("the batch has no tokens", expected="at least one")
    if len(batch.positions) != T:
        raise UserError(
            "Batch.positions must have one entry per token",
            got=len(batch.positions),
            expected=T,
        )
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != T or np.any(np.diff(starts) < 0):
        raise UserError(
            "Batch.sequence_starts does not divide the tokens into sequences",
            got=starts.tolist(),
            expected=f"0, ..., {T}, never decreasing",
        )
    if len(tables) != len(starts) - 1:
        raise UserError(
            "Batch.block_tables must have one row per sequence",
            got=len(tables),
            expected=len(starts) - 1,
        )
    _check_inside("Batch.logits_rows", batch.logits_rows, T, "rows", UserError)
    _check_inside("Batch.hidden_rows", batch.hidden_rows, T, "rows", UserError)
    _check_inside("token id", batch.tokens, config.vocab_size, "the vocabulary", PromptError)
    _check_inside(
        "position", batch.positions, config.max_position_embeddings, "the context", PromptError
    )
    _check_hidden(hidden, (len(batch.hidden_rows), config.hidden_size))
    if not _is_sound(batch, block_size, num_blocks):
        _name_the_fault(batch, block_size, num_blocks)


def _is_sound(batch: Batch, block_size: int, num_blocks: int) -> bool:
    """Whether positions and KV blocks make sense: all sequences at once, in a few calls."""
    starts, tables = batch.sequence_starts.astype(np.int64), batch.block_tables
    lengths = np.diff(starts)
    if not lengths.all():
        return False  # rare: one by one
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    positions = batch.positions.astype(np.int64)
    within = np.arange(len(positions)) - starts[sequences]
    needed = positions[starts[1:] - 1] // block_size + 1
    if (positions - within != positions[starts[sequences]]).any() or needed.max() > tables.shape[1]:
        return False
    is_used = np.arange(tables.shape[1]) < needed[:, None]
    used = tables[is_used].astype(np.int64)
    if (used < 0).any() or (used >= num_blocks).any():
        return False
    owned = np.sort(np.repeat(np.arange(len(needed)), needed) * num_blocks + used)
    places = tables[sequences, positions // block_size].astype(np.int64) * block_size
    written = np.sort(places + positions % block_size)
    return bool((np.diff(owned) > 0).all() and (np.diff(written) > 0).all())


def _name_the_fault(batch: Batch, block_size: int, num_blocks: int) -> None:
    T, starts, tables = len(batch.tokens), batch.sequence_starts, batch.block_tables
    written: list[npt.NDArray[np.int64]] = []
    for sequence, (start, stop) in enumerate(pairwise(starts.tolist())):
        if start == stop:
            continue
        positions = batch.positions[start:stop].astype(np.int64)
        if np.any(np.diff(positions) != 1):
            raise UserError(
                f"the positions of sequence {sequence} are not consecutive",
                got=positions[:16].tolist(),
                expected="each one more than the one before",
            )
        needed = int(positions[-1]) // block_size + 1
        table = tables[sequence, :needed]
        if len(table) < needed or np.any((table < 0) | (table >= num_blocks)):
            raise UserError(
                f"the block table of sequence {sequence} does not cover its positions",
                got=f"{len(tables[sequence])} entries, {table[:16].tolist()} first",
                expected=f"{needed} block ids from 0 to {num_blocks - 1}",
            )
        if len(np.unique(table)) < needed:
            raise UserError(
                f"the block table of sequence {sequence} names a block twice",
                got=table[:16].tolist(),
            )
        block = table[positions // block_size].astype(np.int64)
        written.append(block * block_size + positions % block_size)
    if len(np.unique(np.concatenate(written))) < T:
        raise UserError(
            "two sequences of the batch write to the same KV block position",
            remedy="share only blocks that are already filled",
        )


def _check_hidden(hidden: Float32 | None, shape: tuple[int, int]) -> None:
    if hidden is None and shape[0] == 0:
        return
    if hidden is None or hidden.dtype != np.float32 or hidden.shape != shape:
        raise UserError(
            "there is no room for the hidden states of Batch.hidden_rows",
            got=None if hidden is None else f"{hidden.dtype} {list(hidden.shape)}",
            expected=f"float32 {list(shape)}",
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse an argument below `least`.

    Raises:
        UserError: it is.
    """
    if value < least:
        raise UserError(f"{name} is out of range", got=value, expected=f"at least {least}")


def _check_inside(
    what: str,
    values: npt.NDArray[np.integer],
    limit: int,
    where: str,
    error: type[UserError],
) -> None:
    outside = values[(values < 0) | (values >= limit)]
    if len(outside):
        raise error(
            f"{what} outside {where}",
            got=f"{outside[0]}" + (f" and {len(outside) - 1} more" * (len(outside) > 1)),
            expected=f"0 to {limit - 1}",
        )
