"""`ReferenceRunner`: the numpy model behind the Runner protocol. Checks what comes in, bounds what
is taken, and leaves the arithmetic to `model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from earnest import env
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.config import ErnieConfig
from earnest.errors import MemoryBudgetError, UserError
from earnest.runners.base import Batch, Float32, Routing
from earnest.runners.check import check_at_least, check_batch
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

    Attributes:
        config, block_size, num_blocks: what the protocol asks for.

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
        check_at_least("num_blocks", num_blocks, 1)
        check_at_least("block_size", block_size, 1)
        check_at_least("memory_budget", budget, 0)
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(
                "num_layers is out of range",
                got=num_layers,
                expected=f"1 to {config.num_hidden_layers}, what the model has",
            )
        self.config, self.block_size, self.num_blocks = config, block_size, num_blocks
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

        Raises:
            PromptError: a token id is outside the vocabulary, or a position outside the context.
            UserError: the batch contradicts itself or the KV blocks; nothing has been stored.
        """
        check_batch(batch, self.config, self.block_size, self.num_blocks, hidden)
        logits_RV = np.empty((len(batch.logits_rows), self.config.vocab_size), np.float32)
        parts: list[list[Routing]] = []
        for wanted_R, wanted_H, piece in _pieces(batch, PIECE_TOKENS):
            parts.append([])
            logits_RV[wanted_R], found_HD = self.model.run(piece, self.cache, parts[-1])
            if hidden is not None:
                hidden[wanted_H] = found_HD
        if routing is not None:
            for layers in zip(*parts, strict=True):
                experts = np.concatenate([part.experts for part in layers])
                weights = np.concatenate([part.weights for part in layers])
                routing.append(Routing(layers[0].layer, experts, weights))
        return logits_RV


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


def _pieces(
    batch: Batch, size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Batch]]:
    """Cut a batch into batches of at most `size` tokens, each with the places that its logits and
    its hidden states have among those asked for. A sequence that is cut continues in the next
    piece."""

    def within(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        return np.nonzero((rows >= start) & (rows < stop))[0]

    for start in range(0, len(batch.tokens), size):
        stop = min(start + size, len(batch.tokens))
        wanted_R, wanted_H = within(batch.logits_rows), within(batch.hidden_rows)
        yield (
            wanted_R,
            wanted_H,
            Batch(
                tokens=batch.tokens[start:stop],
                positions=batch.positions[start:stop],
                sequence_starts=np.clip(batch.sequence_starts, start, stop) - np.int32(start),
                block_tables=batch.block_tables,
                logits_rows=batch.logits_rows[wanted_R] - np.int32(start),
                hidden_rows=batch.hidden_rows[wanted_H] - np.int32(start),
            ),
        )
