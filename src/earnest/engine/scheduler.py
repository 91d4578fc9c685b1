"""Which tokens run in the next step: who is admitted, who is put off, who goes on.

Requests are served by level (`Request.priority` less one for every `PATIENCE` steps waited), and of
one level in the order they came. A sequence takes KV blocks as it grows. When none is left, whoever
is last in that order gives its blocks back and waits; what it had computed may still be found among
the remembered blocks when it is taken up again.

Nobody starves: the first in order can take the blocks of all others, so it goes on in every step;
and whoever waits moves up a level again and again, until it is the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from earnest.engine.batch import Slice, blocks_for
from earnest.engine.blocks import BlockPool, Link
from earnest.engine.sequence import Sequence
from earnest.engine.speculation import Speculation

# Steps after which a request that waits counts as one level more urgent.
PATIENCE = 256


@dataclass(frozen=True)
class Part:
    """What one sequence runs in a step.

    Attributes:
        sequence: whose it is.
        slice: tokens, positions and blocks.
        drafts: of its tokens, the last so many are guesses.
    """

    sequence: Sequence
    slice: Slice
    drafts: tuple[int, ...] = ()


class Scheduler:
    """Waiting and running sequences, and who owns the blocks.

    Args:
        blocks: the KV blocks.
        block_size: positions in one.
        max_batch_tokens: tokens of a step.
        max_sequences: sequences that run beside each other.
        max_prompt_logits: logits rows of prompts that a step may ask for.
        speculation: guesses what comes next; None: nobody guesses.

    Attributes:
        preemptions: how often a sequence had to give its blocks back.
    """

    def __init__(
        self,
        blocks: BlockPool,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_sequences: int,
        max_prompt_logits: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_prompt_logits = max_prompt_logits
        self._speculation = speculation
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def running(self) -> Iterator[Sequence]:
        """The sequences that hold blocks."""
        return iter(self._running.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting[sequence.id] = sequence

    def remove(self, sequence_id: int) -> bool:
        """Forget a sequence and free what it holds; False if there is none of this id."""
        sequence = self._running.pop(sequence_id, None)
        if sequence is not None:
            self._give_back(sequence)
            return True
        return self._waiting.pop(sequence_id, None) is not None

    def plan(self) -> list[Part]:
        """The parts of the next step: first those that write, then prompts, in order."""
        self._admit()
        for sequence in self._waiting.values():
            sequence.waited += 1
        order = sorted(self._running.values(), key=_rank)
        parts: list[Part] = []
        guesses = self._guesses(order)
        for sequence in order:
            if sequence.writing and sequence.id in self._running:
                drafts = guesses.get(sequence.id, ())
                positions = sequence.computed + 1 + len(drafts)
                if self._missing(sequence, positions) > self._blocks.num_free:
                    drafts = ()  # nobody is put off for a guess
                tokens = [sequence.tokens[-1], *drafts]
                if self._grow(sequence, sequence.computed + len(tokens)):
                    part = Slice(tokens, sequence.computed, sequence.blocks, len(tokens))
                    parts.append(Part(sequence, part, drafts))
        budget = self._max_batch_tokens - sum(len(part.slice.tokens) for part in parts)
        prompt_logits = self._max_prompt_logits
        for sequence in order:
            if sequence.writing or budget <= 0 or sequence.id not in self._running:
                continue
            start, length = sequence.computed, min(budget, sequence.pending)
            reader, hidden = sequence.reader, 0
            if reader is None or reader.done:
                wanted = int(length == sequence.pending)
            else:
                unread = max(0, reader.next - start)  # in front of what is to be read
                if not reader.hidden:
                    length = min(length, unread + prompt_logits)
                wanted = max(0, length - unread)
                if reader.hidden:
                    wanted, hidden = 0, wanted
                prompt_logits -= wanted
            if length == 0 or not self._grow(sequence, start + length):
                continue
            budget -= length
            tokens = sequence.tokens[start : start + length]
            parts.append(Part(sequence, Slice(tokens, start, sequence.blocks, wanted, hidden)))
        return [part for part in parts if part.sequence.id in self._running]

    def computed(self, sequence: Sequence, count: int) -> None:
        """`count` more positions of a running sequence are stored; full blocks are remembered."""
        sequence.computed += count
        if sequence.beginning is None:
            return
        size = self._block_size
        for index in range(len(sequence.links), sequence.computed // size):
            after = sequence.links[-1] if sequence.links else sequence.beginning
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.links.append(self._blocks.remember(after, sequence.blocks[index], tokens))

    def make_room(self, count: int) -> bool:
        """Have at least `count` blocks free, the last of the running sequences giving theirs back
        if need be; False if there are not so many."""
        while self._blocks.num_free < count and self._running:
            self._preempt(max(self._running.values(), key=_rank))
        return self._blocks.num_free >= count

    # --- admission and preemption ---------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in sorted(self._waiting.values(), key=_rank):
            leader = sequence.leader
            if leader is not None and self._is_ahead(leader):
                continue
            if not self._admitted(sequence):
                return
            del self._waiting[sequence.id]
            self._running[sequence.id] = sequence

    def _is_ahead(self, leader: Sequence) -> bool:
        """Whether a prompt that others share is still being computed."""
        present = leader.id in self._running or leader.id in self._waiting
        return present and leader.computed < leader.prompt_length

    def _admitted(self, sequence: Sequence) -> bool:
        """Take blocks for all tokens known of a sequence, less urgent ones making room; False and
        nothing is taken if there is none."""
        while len(self._running) >= self._max_sequences:
            if not self._put_off(sequence):
                return False
        while True:
            found = [] if sequence.beginning is None else self._found(sequence)
            needed = blocks_for(len(sequence.tokens), self._block_size) - len(found)
            fresh = self._blocks.allocate(needed)
            if fresh is not None:
                break
            self._blocks.free([link.block for link in found])
            if not self._put_off(sequence):
                return False
        sequence.links = list(found)
        sequence.blocks = [link.block for link in found] + fresh
        sequence.computed = len(found) * self._block_size
        if sequence.cached is None:
            sequence.cached, sequence.admitted_at = sequence.computed, time.monotonic()
        return True

    def _found(self, sequence: Sequence) -> list[Link]:
        assert sequence.beginning is not None
        # The last token is always run: its logits are wanted.
        known = sequence.tokens[: len(sequence.tokens) - 1]
        if sequence.reader is not None and not sequence.reader.done:
            known = known[: sequence.reader.next]
        return self._blocks.find(sequence.beginning, known, self._block_size)

    def _put_off(self, newcomer: Sequence) -> bool:
        """Make the last of the running ones wait, if it is of a lower level than `newcomer`."""
        last = max(self._running.values(), key=_rank, default=None)
        if last is None or _level(last) <= _level(newcomer):
            return False
        self._preempt(last)
        return True

    def _grow(self, sequence: Sequence, positions: int) -> bool:
        """Blocks for so many positions, taken from whoever comes last; False if that is itself."""
        missing = self._missing(sequence, positions)
        if missing <= 0:
            return True
        while (fresh := self._blocks.allocate(missing)) is None:
            last = max(self._running.values(), key=_rank)
            self._preempt(last)
            if last is sequence:
                return False
        sequence.blocks.extend(fresh)
        return True

    def _missing(self, sequence: Sequence, positions: int) -> int:
        return blocks_for(positions, self._block_size) - len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._give_back(sequence)
        self._waiting[sequence.id] = sequence
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        blocks, sequence.blocks, sequence.links = sequence.blocks, [], []
        sequence.computed = 0
        self._blocks.free(blocks)

    def _guesses(self, order: list[Sequence]) -> dict[int, tuple[int, ...]]:
        if self._speculation is None:
            return {}
        writing = [sequence for sequence in order if sequence.writing]
        if len(writing) != len(order):
            return {}  # a prompt is being read: it makes better use of the step
        return self._speculation.guesses(writing, self._max_batch_tokens - len(writing))


def _level(sequence: Sequence) -> int:
    return sequence.request.priority - sequence.waited // PATIENCE


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Where it stands in line; the least comes first."""
    return _level(sequence), sequence.id
