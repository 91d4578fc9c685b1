"""Reading the built-in passages with a checkpoint: text to ids, ids to hidden states and logits.

All passages go through the model as one batch, so that the weights of a model that does not fit
into memory are streamed from the disk once per reading and not once per passage.

Shape suffixes: T tokens of all sequences, D hidden size, V vocabulary, R rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.errors import TokenizerError
from earnest.log import Progress, silent
from earnest.runners.base import Batch, Float32, Routing
from earnest.runners.reference import Arithmetic, Model, ReferenceRunner
from earnest.verify.passages import PASSAGES, Passage

_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Reading:
    """A passage as a checkpoint's tokenizer sees it.

    Attributes:
        passage: the text.
        prefix: ids that the tokenizer puts before any text (a beginning-of-text token, or none).
        body: ids of the text itself, cut to what was asked for.
        utf8_bytes: UTF-8 bytes per id of the whole passage, times the length of `body`.
    """

    passage: Passage
    prefix: tuple[int, ...]
    body: tuple[int, ...]
    utf8_bytes: float


def encode(checkpoint: Checkpoint, passages: Sequence[Passage], limit: int) -> list[Reading]:
    """The passages as ids, at most `limit` of each, and no more than the context holds.

    Raises:
        TokenizerError: the checkpoint has no usable tokenizer, or one that gives ids the model
            does not have.
    """
    tokenizer = checkpoint.tokenizer
    readings = []
    for passage in passages:
        body = tokenizer.encode(passage.text)
        whole = tokenizer.encode(passage.text, add_special_tokens=True)
        prefix = whole[: len(whole) - len(body)] if whole[-len(body) :] == body else []
        if worst := [i for i in (*prefix, *body) if not 0 <= i < checkpoint.config.vocab_size]:
            raise TokenizerError(
                "the tokenizer gives ids that the model does not have",
                got=worst[0],
                expected=f"0 to {checkpoint.config.vocab_size - 1}",
                remedy="the folder's tokenizer belongs to another model; take the model's own",
            )
        room = checkpoint.config.max_position_embeddings - len(prefix)
        kept = body[: max(0, min(limit, room))]
        share = len(kept) / max(len(body), 1)
        readings.append(Reading(passage, tuple(prefix), tuple(kept), share * passage.utf8_bytes))
    return readings


def sequences_of(
    checkpoint: Checkpoint, limit: int
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """The built-in passages as ids, at most `limit` of each, and notes for the reader; fixed
    pseudo-random ids where there is no tokenizer for the text."""
    context = checkpoint.config.max_position_embeddings
    try:
        readings = encode(checkpoint, PASSAGES, limit)
        return [(reading.prefix + reading.body)[:context] for reading in readings], ()
    except TokenizerError as error:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, checkpoint.config.vocab_size, (len(PASSAGES), min(context, 64)))
        note = f"pseudo-random token ids took the place of the text: {error.problem}"
        return [tuple(row.tolist()) for row in ids], (note,)


def layer_sizes(checkpoint: Checkpoint, size: Callable[[LazyTensor], int]) -> list[int]:
    """`size` summed over the tensors of each layer."""
    sums = [0] * checkpoint.config.num_hidden_layers
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("model.layers."):
            sums[int(name.split(".", 3)[2])] += size(tensor)
    return sums


class Reader:
    """Runs a fixed set of sequences through a checkpoint, with one arithmetic or another.

    Decoded weights are shared between the runs.

    Args:
        checkpoint: the model.
        sequences: token ids of each sequence, none empty.
        num_layers: only the first so many layers; all by default.
        memory_budget: bytes that decoded weights may take; see `ReferenceRunner`.

    Attributes:
        model: the reference's.
        batch: the tokens of all sequences, logits wanted of every one.
        num_blocks, block_size: KV blocks that the batch uses, and positions in each.
        rows: which tokens of the batch each sequence is.

    Raises:
        MemoryBudgetError: keys and values do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        *,
        num_layers: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        blocks = [-(-len(ids) // _BLOCK_SIZE) for ids in sequences]
        self.num_blocks, self.block_size = sum(blocks), _BLOCK_SIZE
        self._runner = ReferenceRunner(
            checkpoint,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            memory_budget=memory_budget,
            num_layers=num_layers,
        )
        self.model = self._runner.model
        self.num_layers = self.model.num_layers
        layers = layer_sizes(checkpoint, lambda tensor: tensor.nbytes)[: self.num_layers]
        self._bytes_read = (0, *accumulate(layers))
        starts = np.array([0, *accumulate(len(ids) for ids in sequences)], np.int32)
        tables = np.full((len(sequences), max(blocks)), -1, np.int32)
        for row, (first, stop) in enumerate(pairwise((0, *accumulate(blocks)))):
            tables[row, : stop - first] = np.arange(first, stop)
        self.batch = Batch(
            tokens=np.array([token for ids in sequences for token in ids], np.int32),
            positions=np.concatenate([np.arange(len(ids), dtype=np.int32) for ids in sequences]),
            sequence_starts=starts,
            block_tables=tables,
            logits_rows=np.arange(starts[-1], dtype=np.int32),
        )
        self.rows = [slice(first, stop) for first, stop in pairwise(starts.tolist())]

    def hidden_states(
        self,
        *,
        model: Model | None = None,
        arithmetic: Arithmetic | None = None,
        routing: list[Routing] | None = None,
        progress: Progress = silent,
        what: str = "reading",
    ) -> Iterator[Float32]:
        """Yield the residual stream float32 `[T, D]`: the embeddings, then after each layer.

        `progress` counts stored bytes of the layers. `routing` receives the router's decisions of
        each MoE layer. `model` takes the place of the reference's own.
        """
        model = replace(model or self.model, arithmetic=arithmetic or Arithmetic())
        states = model.hidden_states(self.batch, self._runner.cache, routing)
        for layer, x_TD in enumerate(states):
            progress(self._bytes_read[layer], self._bytes_read[-1], what)
            yield x_TD

    def logits(self, x_RD: Float32) -> Float32:
        """Logits float32 `[R, V]` of rows of the last hidden state."""
        return self.model.head(x_RD)
