"""A model without weights: its logits are a hash of all tokens it finds stored for a sequence.

So any slip in block tables, positions or chunks changes what comes out, and what comes out for a
sequence is known without an engine.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from earnest.config import ErnieConfig
from earnest.runners.base import Batch, Float32, Routing

# Token 0 is special and ends texts, 1 is special and begins them; 9 to 11 are a euro sign in parts.
PIECES = (
    *(b"", b"", b"a", b"b", b"ab", b"ba", b"c", b"abc", b" "),
    *(b"\xe2", b"\x82", b"\xac", b"aab", b"\xe4\xbd\xa0", b"bca", b"cc"),
)
VOCAB = len(PIECES)
EOS, BOS = 0, 1


def tiny_config(vocab_size: int = VOCAB, context: int = 64, experts: int = 0) -> ErnieConfig:
    return ErnieConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=context,
        eos_token_ids=(EOS,),
        moe_num_experts=experts,
        moe_k=min(experts, 2),
        moe_intermediate_size=8 if experts else 0,
    )


def hashed_logits(history: Sequence[int], vocab_size: int = VOCAB) -> Float32:
    """What the fake model expects after `history`."""
    key = zlib.crc32(np.asarray(history, np.int32).tobytes())
    return (3 * np.random.default_rng(key).standard_normal(vocab_size)).astype(np.float32)


class FakeRunner:
    """A `Runner` that also checks everything the protocol promises it."""

    def __init__(
        self,
        *,
        config: ErnieConfig | None = None,
        num_blocks: int = 32,
        block_size: int = 4,
        logits: Callable[[Sequence[int], int], Float32] = hashed_logits,
    ) -> None:
        self.config = config or tiny_config()
        self.num_blocks, self.block_size = num_blocks, block_size
        self._logits = logits
        self._stored = np.full((num_blocks, block_size), -1, np.int32)
        self.batches: list[Batch] = []

    def step(
        self,
        batch: Batch,
        routing: list[Routing] | None = None,
        hidden: Float32 | None = None,
    ) -> Float32:
        self.batches.append(batch)
        T = len(batch.tokens)
        assert T > 0
        assert batch.tokens.dtype == batch.positions.dtype == np.int32
        assert batch.block_tables.dtype == batch.logits_rows.dtype == np.int32
        assert len(batch.positions) == T and batch.sequence_starts[-1] == T
        written: dict[int, int] = {}
        read: list[list[int]] = []
        histories: dict[int, list[int]] = {}
        for s, table in enumerate(batch.block_tables):
            rows = range(batch.sequence_starts[s], batch.sequence_starts[s + 1])
            assert len(rows) > 0
            for row in rows:
                position = int(batch.positions[row])
                assert position == batch.positions[rows[0]] + row - rows[0]
                block = table[position // self.block_size]
                assert 0 <= block < self.num_blocks
                assert written.setdefault(int(block), s) == s, "two sequences write one block"
                self._stored[block, position % self.block_size] = batch.tokens[row]
            end = int(batch.positions[rows[-1]]) + 1
            needed = -(-end // self.block_size)
            read.append(table[:needed].tolist())
            assert (table[needed:] == -1).all()
            history = self._stored[table[:needed]].reshape(-1)[:end].tolist()
            for row in rows:
                histories[row] = history[: int(batch.positions[row]) + 1]
        for s, blocks in enumerate(read):
            assert len(set(blocks)) == len(blocks)
            assert all(written.get(block, s) == s for block in blocks), "read while written"
        if routing is not None and self.config.is_moe:
            experts = np.array([[h[-1] % 2, 2 + h[-1] % 2] for h in histories.values()], np.int32)
            routing.append(Routing(0, experts, np.full(experts.shape, 0.5, np.float32)))
        assert (0 if hidden is None else len(hidden)) == len(batch.hidden_rows)
        for at, row in enumerate(batch.hidden_rows):
            hidden[at] = hashed_logits(histories[int(row)], self.config.hidden_size)
        V = self.config.vocab_size
        rows = [self._logits(histories[int(row)], V) for row in batch.logits_rows]
        return np.array(rows, np.float32).reshape(len(rows), V)


class FakeDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(PIECES[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    """Knows `PIECES`; encodes byte by byte where it can."""

    vocab_size = VOCAB
    bos_id: int | None = BOS
    eos_ids = (EOS,)
    chat_template: object | None = None

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int]:
        return [PIECES.index(bytes([byte])) for byte in text.encode()]

    def is_special(self, token_id: int) -> bool:
        return token_id in (EOS, BOS)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(PIECES[token] for token in ids).decode("utf-8", "replace")

    def detokenizer(
        self, skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> FakeDetokenizer:
        return FakeDetokenizer()

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **variables: object) -> str:
        return "".join(message["content"] for message in messages)
