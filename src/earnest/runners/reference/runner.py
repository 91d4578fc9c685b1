"""`ReferenceRunner`: the numpy model behind the Runner protocol. Checks what comes in, bounds what
is taken, and leaves the arithmetic to `model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from earnest import env
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.config import ErnieConfig
from earnest.errors import MemoryBudgetError, PromptError, UserError
from earnest.runners.base import Batch, Float32, Routing
from earnest.runners.reference.model import Arithmetic, KVCache, Model
from earnest.runners.reference.weights import Weights

# Tokens run at once; activations of the widest layer stay below a few hundred MiB.
PIECE_TOKENS = 2048


class ReferenceRunner:
    """Runs a checkpoint in numpy (a `runners.base.Runner`).

    A batch of more than `PIECE_TOKENS` tokens is run in pieces, first rows first, with the same
    result. A sequence may therefore share blocks that the same batch is still filling only with
    sequences before it.

    Args:
        checkpoint: the model; only its configuration and tensors are used.
        num_blocks: KV blocks; memory for them is taken when they are first written.
        block_size: positions per KV block.
        memory_budget: bytes that decoded weights may take; by default `env.memory_budget()`. Never
            more is taken than what is free beside the KV blocks.
        num_layers: run only the first so many layers, then the final norm and the head; all by
            default.
        arithmetic: deliberate mistakes, for diagnosis; none by default.

    Raises:
        UserError: an argument is out of range.
        MemoryBudgetError: the KV blocks do not fit into the free memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        num_blocks: int,
        block_size: int = 32,
        memory_budget: int | None = None,
        num_layers: int | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        config = checkpoint.config
        layers = config.num_hidden_layers if num_layers is None else num_layers
        budget = env.memory_budget() if memory_budget is None else memory_budget
        _check_at_least("num_blocks", num_blocks, 1)
        _check_at_least("block_size", block_size, 1)
        _check_at_least("memory_budget", budget, 0)
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(
                "num_layers is out of range",
                got=num_layers,
                expected=f"1 to {config.num_hidden_layers}, what the model has",
            )
        self._config, self._block_size, self._num_blocks = config, block_size, num_blocks
        free = env.free_memory() - _kv_bytes(config, layers, num_blocks * block_size)
        if free < 0:
            raise _too_many_blocks(config, layers, num_blocks, block_size)
        try:
            self.cache = KVCache(
                config, num_layers=layers, num_blocks=num_blocks, block_size=block_size
            )
        except MemoryError as error:
            raise _too_many_blocks(config, layers, num_blocks, block_size) from error
        weights = Weights(_used_tensors(checkpoint.tensors, layers), min(budget, free))
        self.model = Model(config, weights, layers, arithmetic or Arithmetic())

    @property
    def config(self) -> ErnieConfig:
        """The model's numbers."""
        return self._config

    @property
    def block_size(self) -> int:
        """Positions per KV block."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """KV blocks there are, in all."""
        return self._num_blocks

    def step(self, batch: Batch, routing: list[Routing] | None = None) -> Float32:
        """Run the batch, store its keys and values, return logits float32 `[R, vocab_size]`.

        Args:
            batch: the new tokens; every position below a token's own must have been stored by an
                earlier step or by this one.
            routing: a list that receives one `Routing` per MoE layer, in order; None to skip.

        Raises:
            PromptError: a token id is outside the vocabulary, or a position outside the context.
            UserError: the batch contradicts itself or the KV blocks; nothing has been stored.
        """
        self._check(batch)
        if len(batch.tokens) <= PIECE_TOKENS:
            return self.model.logits(batch, self.cache, routing)
        logits_RV = np.empty((len(batch.logits_rows), self._config.vocab_size), np.float32)
        parts: list[list[Routing]] = []
        for wanted_R, piece in _pieces(batch, PIECE_TOKENS):
            parts.append([])
            logits_RV[wanted_R] = self.model.logits(piece, self.cache, parts[-1])
        if routing is not None:
            for layers in zip(*parts, strict=True):
                experts = np.concatenate([part.experts for part in layers])
                weights = np.concatenate([part.weights for part in layers])
                routing.append(Routing(layers[0].layer, experts, weights))
        return logits_RV

    def _check(self, batch: Batch) -> None:
        arrays = {
            "tokens": (batch.tokens, 1),
            "positions": (batch.positions, 1),
            "sequence_starts": (batch.sequence_starts, 1),
            "block_tables": (batch.block_tables, 2),
            "logits_rows": (batch.logits_rows, 1),
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
        self._check_inside("Batch.logits_rows", batch.logits_rows, T, "rows", UserError)
        self._check_inside(
            "token id", batch.tokens, self._config.vocab_size, "the vocabulary", PromptError
        )
        self._check_inside(
            "position",
            batch.positions,
            self._config.max_position_embeddings,
            "the context",
            PromptError,
        )
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
            needed = int(positions[-1]) // self._block_size + 1
            table = tables[sequence, :needed]
            if len(table) < needed or np.any((table < 0) | (table >= self._num_blocks)):
                raise UserError(
                    f"the block table of sequence {sequence} does not cover its positions",
                    got=f"{len(tables[sequence])} entries, {table[:16].tolist()} first",
                    expected=f"{needed} block ids from 0 to {self._num_blocks - 1}",
                )
            if len(np.unique(table)) < needed:
                raise UserError(
                    f"the block table of sequence {sequence} names a block twice",
                    got=table[:16].tolist(),
                )
            slots = self.cache.slots(table, int(positions[-1]) + 1)
            written.append(slots[len(slots) - len(positions) :])
        if len(np.unique(np.concatenate(written))) < T:
            raise UserError(
                "two sequences of the batch write to the same KV block position",
                remedy="share only blocks that are already filled",
            )

    @staticmethod
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


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is out of range", got=value, expected=f"at least {least}")


def _kv_bytes(config: ErnieConfig, num_layers: int, positions: int) -> int:
    return 2 * 4 * num_layers * config.kv_size * positions


def _too_many_blocks(
    config: ErnieConfig, num_layers: int, num_blocks: int, block_size: int
) -> MemoryBudgetError:
    free, per_block = env.free_memory(), _kv_bytes(config, num_layers, block_size)
    positions = num_blocks * block_size
    return MemoryBudgetError(
        "keys and values do not fit into memory",
        got=f"{positions:,} positions of {per_block // block_size:,} bytes, "
        f"{num_blocks * per_block / 2**30:.2f} GiB in all",
        expected=f"at most the {free / 2**30:.2f} GiB that are free",
        remedy=f"ask for a context (or num_blocks * block_size) of at most "
        f"{free // per_block * block_size:,} positions, or free memory",
    )


def _used_tensors(tensors: Mapping[str, LazyTensor], num_layers: int) -> dict[str, LazyTensor]:
    def is_used(name: str) -> bool:
        if name.startswith("model.mtp_"):
            return False
        parts = name.split(".", 3)
        return parts[1] != "layers" or int(parts[2]) < num_layers

    return {name: tensor for name, tensor in tensors.items() if is_used(name)}


def _pieces(batch: Batch, size: int) -> Iterator[tuple[npt.NDArray[np.int64], Batch]]:
    """Cut a batch into batches of at most `size` tokens, each with the places that its logits have
    among those asked for. A sequence that is cut continues in the next piece."""
    rows = batch.logits_rows
    for start in range(0, len(batch.tokens), size):
        stop = min(start + size, len(batch.tokens))
        wanted_R = np.nonzero((rows >= start) & (rows < stop))[0]
        yield (
            wanted_R,
            Batch(
                tokens=batch.tokens[start:stop],
                positions=batch.positions[start:stop],
                sequence_starts=np.clip(batch.sequence_starts, start, stop) - np.int32(start),
                block_tables=batch.block_tables,
                logits_rows=rows[wanted_R] - np.int32(start),
            ),
        )
