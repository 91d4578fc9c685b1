"""`Engine`: many requests at once, one mixed batch per step.

A step takes one token of every sequence that is being written and fills the rest of its token
budget with pieces of prompts, so a long prompt never makes the others wait for all of it. Who goes
on when tokens or KV blocks are short is the business of the `Scheduler`; what a sequence brings
forth depends on none of that, because its numbers do not depend on what it shares a step with.

The engine is not thread-safe; whoever drives it takes care of that, and of time limits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from earnest.engine import sequence as sequences
from earnest.engine.batch import blocks_for, make_batch
from earnest.engine.blocks import BlockPool
from earnest.engine.reading import Pooled, PromptLogprobs, Scores, reader_of
from earnest.engine.request import (
    FinishReason,
    Pooling,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from earnest.engine.sampler import Sampler, check_sampling, token_logprobs
from earnest.engine.scheduler import Part, Scheduler
from earnest.engine.speculation import Speculation
from earnest.engine.stop import Detokenizer, TextStream
from earnest.errors import (
    EarnestError,
    MemoryBudgetError,
    PromptError,
    SamplingError,
    UserError,
)
from earnest.runners.base import Float32, Runner

if TYPE_CHECKING:
    from earnest.tokenizer import Tokenizer

# What the reader of a message can change, by the names it has in Python and for every verb.
MAX_CONTEXT = "max_context (--context on the command line)"
# Logits of prompt tokens that one step may ask for: 162 rows of the full vocabulary.
_PROMPT_LOGITS_BYTES = 64 * 2**20

Result = tuple[int, TokenEvent | EarnestError]


@dataclass
class Counters:
    """What an engine has done so far; for metrics.

    Attributes:
        steps: batches run.
        prompt_tokens: of the requests admitted.
        cached_tokens: of those, found in remembered blocks.
        generated_tokens: tokens chosen.
        drafts: times that a sequence's next tokens were guessed.
        drafted_tokens, accepted_tokens: guesses run, and those that were right.
        accepted_at: of those, how many came first, second, ... in their draft.
        preemptions: sequences that had to give their blocks back.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    preemptions: int = 0


class Engine:
    """Turns requests into tokens.

    Args:
        runner: the model; all its KV blocks become the engine's.
        tokenizer: makes the text; None: the events have none, and stop strings are refused.
        eos_ids: the model's own end-of-text ids; those outside the vocabulary are ignored.
        max_context: positions a sequence may have; at most what the model and the blocks allow.
        max_batch_tokens: tokens one step may run.
        max_sequences: sequences that may run beside each other.
        share_prefixes: read the blocks of earlier requests that begin with the same tokens. The
            numbers are the same bits if the runner's do not depend on how prompts are divided.
        speculation: guesses several tokens at once; None: nobody does.

    Attributes:
        max_context: the number in force.
        blocks: who owns which KV block.
        counters: what was done so far.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: Collection[int],
        max_context: int | None = None,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        share_prefixes: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise UserError(
                "max_sequences does not fit max_batch_tokens",
                got=f"max_sequences={max_sequences}, max_batch_tokens={max_batch_tokens}",
                expected="1 <= max_sequences <= max_batch_tokens",
            )
        self._runner = runner
        self._tokenizer = tokenizer
        self._vocab_size = runner.config.vocab_size
        self._eos_ids = frozenset(token for token in eos_ids if 0 <= token < self._vocab_size)
        self._share_prefixes = share_prefixes
        self._speculation = speculation
        self.blocks = BlockPool(runner.num_blocks)
        self._scheduler = Scheduler(
            self.blocks,
            block_size=runner.block_size,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_prompt_logits=max(1, _PROMPT_LOGITS_BYTES // (4 * self._vocab_size)),
            speculation=speculation,
        )
        room = runner.num_blocks * runner.block_size
        limits = [runner.config.max_position_embeddings, room]
        self.max_context = min(limits if max_context is None else [*limits, max_context])
        self.counters = Counters()
        self._next_id = 0
        self._alive: dict[int, sequences.Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        return bool(self._alive)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that do not."""
        return self._scheduler.num_waiting

    def check(self, request: Request) -> None:
        """Refuse a request that this engine could not run.

        Raises:
            PromptError: no tokens, ids outside the vocabulary, or longer than the context.
            SamplingError: a parameter does not fit the model (see `check_sampling`), or what is
                to be read off the prompt.
        """
        params = request.sampling
        check_token_ids(request.prompt_ids, self._vocab_size)
        check_sampling(params, self._vocab_size, self._stop_ids(request))
        _check_reading(request, self._vocab_size)
        length = len(request.prompt_ids)
        if length > self.max_context or (length == self.max_context and params.max_tokens != 0):
            raise PromptError(
                "the prompt leaves no room in the context",
                got=f"{length:,} tokens",
                expected=f"fewer than {self.max_context:,}",
                remedy="shorten the prompt" + self._longer_context(),
            )
        if params.stop and self._tokenizer is None:
            raise PromptError(
                "stop strings need a tokenizer, and this model has none",
                remedy="pass stop_token_ids instead",
            )

    def _longer_context(self) -> str:
        possible = self._runner.config.max_position_embeddings
        if possible == self.max_context:
            return ""
        return f", or open the model (made for {possible:,}) with a larger {MAX_CONTEXT}"

    def _stop_ids(self, request: Request) -> frozenset[int]:
        own = frozenset[int]() if request.sampling.ignore_eos else self._eos_ids
        return own | frozenset(request.sampling.stop_token_ids)

    def add(self, request: Request, *, after: int | None = None) -> int:
        """Queue a request; returns the id under which `step` reports it.

        Args:
            request: what to continue.
            after: the id of a request with the same prompt: this one waits until that prompt is
                computed, and then shares its blocks.

        Raises:
            PromptError, SamplingError: see `check`; nothing was queued.
        """
        self.check(request)
        params, prompt = request.sampling, [int(token) for token in request.prompt_ids]
        room = self.max_context - len(prompt)
        stop_ids = self._stop_ids(request)
        self._next_id += 1
        sequence = sequences.Sequence(
            id=self._next_id,
            request=request,
            sampler=Sampler(params, self._vocab_size, prompt, sorted(stop_ids)),
            text=TextStream(self._detokenizer(prompt, params), params.stop, params.min_tokens),
            stop_ids=stop_ids,
            limit=room if params.max_tokens is None else min(room, params.max_tokens),
            tokens=prompt,
            beginning=self.blocks.beginning(request.salt) if self._share_prefixes else None,
            constraint=None if request.constraint is None else request.constraint(),
            leader=None if after is None else self._alive.get(after),
            reader=reader_of(request),
        )
        self._alive[sequence.id] = sequence
        self._scheduler.add(sequence)
        return sequence.id

    def _detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        # The first token begins a text only if the prompt has none of its own: then a leading space
        # that the vocabulary puts before every word is not part of it.
        is_special = self._tokenizer.is_special
        return self._tokenizer.detokenizer(
            params.skip_special_tokens,
            continuation=not all(is_special(token) for token in reversed(prompt)),
        )

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its blocks; False if it had ended already."""
        if request_id not in self._alive:
            return False
        self._end(self._alive[request_id])
        return True

    @contextmanager
    def borrowed(self, positions: int) -> Iterator[list[int]]:
        """KV blocks for so many positions, for a run of the same runner beside the engine. Requests
        may have to wait for it; what comes out of them does not change.

        Raises:
            MemoryBudgetError: there are not so many blocks in all.
        """
        count = blocks_for(positions, self._runner.block_size)
        blocks = self.blocks.allocate(count) if self._scheduler.make_room(count) else None
        if blocks is None:
            raise MemoryBudgetError(
                "there are not enough KV blocks",
                got=f"{self.blocks.num_free:,} free",
                expected=f"{count:,}",
                remedy=f"pass fewer tokens, or open the model with a larger {MAX_CONTEXT}",
            )
        try:
            yield blocks
        finally:
            self.blocks.free(blocks)

    def step(self) -> list[Result]:
        """Run one batch.

        Returns:
            What happened, as (request id, event). A request ends with an event that has a
            `finish_reason`, or with an error in place of an event; the others are not affected.
        """
        parts = self._scheduler.plan()
        self.counters.preemptions = self._scheduler.preemptions
        running = list(self._scheduler.running)
        for sequence in running:
            self._count_prompt(sequence)
        results: list[Result] = [
            (sequence.id, self._read(sequence)) for sequence in running if sequence.needs_no_step
        ]
        parts = [part for part in parts if part.sequence.id in self._alive]
        if not parts:
            return results
        batch = make_batch([part.slice for part in parts], self._runner.block_size)
        if len(batch.hidden_rows):
            shape = (len(batch.hidden_rows), self._runner.config.hidden_size)
            hidden_HD = np.empty(shape, np.float32)
            logits_RV = self._runner.step(batch, hidden=hidden_HD)
        else:
            hidden_HD = np.empty((0, 0), np.float32)
            logits_RV = self._runner.step(batch)
        self.counters.steps += 1
        first = first_hidden = 0
        for part in parts:
            rows = logits_RV[first : first + part.slice.logits]
            hidden = hidden_HD[first_hidden : first_hidden + part.slice.hidden]
            first += part.slice.logits
            first_hidden += part.slice.hidden
            try:
                events = self._advance(part, rows, hidden)
                results += [(part.sequence.id, event) for event in events]
            except EarnestError as error:
                self._end(part.sequence)
                results.append((part.sequence.id, error))
        if self._speculation is not None:
            self._speculation.stepped()
        return results

    def _count_prompt(self, sequence: sequences.Sequence) -> None:
        """Once for each request, when it is first admitted."""
        if sequence.cached is not None and not sequence.counted:
            sequence.counted = True
            self.counters.prompt_tokens += sequence.prompt_length
            self.counters.cached_tokens += sequence.cached

    def _advance(self, part: Part, rows_RV: Float32, hidden_HD: Float32) -> list[TokenEvent]:
        """Take in what one step computed for one sequence; an event for each token chosen.

        A guess that is the token chosen saves a step: the row after it is what the model expects
        next. What was computed behind a wrong one is never read, and written over.
        """
        sequence, slice_ = part.sequence, part.slice
        if sequence.reader is not None:
            rows = hidden_HD if sequence.reader.hidden else rows_RV
            sequence.reader.read(slice_.start + len(slice_.tokens) - len(rows), rows)
        known = len(slice_.tokens) - len(part.drafts)
        if sequence.pending > known:  # a piece of a prompt
            self._scheduler.computed(sequence, known)
            return []
        if sequence.limit == 0:
            self._scheduler.computed(sequence, known)  # others may begin with the same
            return [self._read(sequence)]
        events: list[TokenEvent] = []
        for guess, logits_V in zip(
            (*part.drafts, None), rows_RV[len(rows_RV) - 1 - len(part.drafts) :], strict=True
        ):
            events.append(self._chosen(sequence, logits_V))
            if events[-1].finish_reason is not None or events[-1].token_id != guess:
                break
        if self._speculation is not None:
            chosen = sequence.tokens[len(sequence.tokens) - len(events) :]
            self._speculation.came(sequence.id, chosen)
            self._count_guesses(part.drafts, chosen)
        self._scheduler.computed(sequence, known + len(events) - 1)
        if events[-1].finish_reason is not None:
            self._end(sequence)
        return events

    def _count_guesses(self, drafts: tuple[int, ...], chosen: list[int]) -> None:
        if not drafts:
            return
        counters = self.counters
        counters.drafts += 1
        counters.drafted_tokens += len(drafts)
        for index, (guess, token) in enumerate(zip(drafts, chosen, strict=False)):
            if guess != token:
                break
            counters.accepted_tokens += 1
            if index == len(counters.accepted_at):
                counters.accepted_at.append(0)
            counters.accepted_at[index] += 1

    def _chosen(self, sequence: sequences.Sequence, logits_V: Float32) -> TokenEvent:
        """Choose the next token of a sequence."""
        params, constraint = sequence.request.sampling, sequence.constraint
        allowed_V = None if constraint is None else constraint.allowed()
        token = sequence.sampler.sample(logits_V, allowed_V)
        if constraint is not None:
            constraint.accept(token)
        logprobs = None
        if params.logprobs is not None:
            logprobs = token_logprobs(logits_V, token, params.logprobs)
        sequence.tokens.append(token)
        self.counters.generated_tokens += 1
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            text, reason = sequence.text.finish(), "stop"
        else:
            text = sequence.text.push(token)
            if sequence.sampler.count == sequence.limit:
                text, reason = text + sequence.text.finish(), "length"
            if sequence.text.found is not None:
                reason = "stop"
        is_first = sequence.sampler.count == 1
        return TokenEvent(
            text=text,
            token_id=token,
            logprobs=logprobs,
            finish_reason=reason,
            prompt_logprobs=_prompt_logprobs(sequence) if is_first else None,
            cached_tokens=sequence.cached if is_first else None,
            admitted_at=sequence.admitted_at if is_first else None,
            stop_string=sequence.text.found,
        )

    def _read(self, sequence: sequences.Sequence) -> TokenEvent:
        """The sole event of a request for no tokens."""
        self._end(sequence)
        reader = sequence.reader
        return TokenEvent(
            text="",
            token_id=None,
            finish_reason="length",
            prompt_logprobs=_prompt_logprobs(sequence),
            cached_tokens=sequence.cached,
            admitted_at=sequence.admitted_at,
            scores=tuple(reader.found) if isinstance(reader, Scores) else None,
            embedding=reader.found if isinstance(reader, Pooled) else None,
        )

    def _end(self, sequence: sequences.Sequence) -> None:
        del self._alive[sequence.id]
        self._scheduler.remove(sequence.id)
        if self._speculation is not None:
            self._speculation.forget(sequence.id)


def _prompt_logprobs(sequence: sequences.Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    reader = sequence.reader
    return tuple(reader.found) if isinstance(reader, PromptLogprobs) else None


def _check_reading(request: Request, vocab_size: int) -> None:
    reading, params = request.reading, request.sampling
    if reading is None:
        return
    if params.max_tokens != 0 or params.prompt_logprobs is not None:
        raise SamplingError(
            "a prompt that is read is not continued",
            got=f"max_tokens={params.max_tokens}, prompt_logprobs={params.prompt_logprobs}",
            expected="max_tokens=0 and no prompt_logprobs",
        )
    if isinstance(reading, Pooling):
        return
    positions = [position for position, _ in reading.targets]
    if (
        not positions
        or positions != sorted(positions)
        or not 1 <= positions[0] <= positions[-1] <= len(request.prompt_ids)
    ):
        raise PromptError(
            "the positions to be scored do not fit the prompt",
            got=positions[:16],
            expected=f"at least one, ascending, from 1 to {len(request.prompt_ids):,}",
        )
    check_token_ids([token for _, token in reading.targets], vocab_size)


def check_token_ids(token_ids: Sequence[int] | npt.NDArray[np.integer], vocab_size: int) -> None:
    """Refuse ids that the model cannot take.

    Raises:
        PromptError: none at all, something that is no integer, or ids outside the vocabulary.
    """
    if len(token_ids) == 0:
        raise PromptError(
            "the prompt is empty",
            remedy="give at least one token; the model continues something, it cannot begin",
        )
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # lists within the list, of different lengths
        ids = np.zeros((0, 0), object)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise PromptError(
            "a prompt of token ids must be a flat list of integers",
            got=f"{ids.ndim} dimensions of {ids.dtype}",
        )
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        raise PromptError(
            f"{len(outside)} of the prompt's token ids are outside the vocabulary",
            got=f"{ids[outside[0]]} at position {outside[0]}",
            expected=f"0 to {vocab_size - 1:,}",
        )
