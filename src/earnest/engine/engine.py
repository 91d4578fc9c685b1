"""`Engine`: many requests at once, one mixed batch per step.

A step takes one token of every sequence that is being written and fills the rest of its token
budget with pieces of prompts, so a long prompt never makes the others wait for all of it.

Requests are admitted in the order they came, as soon as the KV blocks that they can need at most
are free. A request keeps what it was given until it ends; so those that run can always go on to
their end, and the first of those that wait is always next: no deadlock and no starvation.

The engine is not thread-safe and measures no time; whoever drives it does both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from earnest.engine.batch import Slice, blocks_for, make_batch
from earnest.engine.blocks import BlockPool
from earnest.engine.request import FinishReason, Request, TokenEvent, TokenLogprobs
from earnest.engine.sampler import Sampler, check_sampling, token_logprobs
from earnest.engine.stop import Detokenizer, TextStream
from earnest.errors import EarnestError, PromptError, UserError
from earnest.runners.base import Float32, Runner

if TYPE_CHECKING:
    from earnest.tokenizer import Tokenizer

# Logits of prompt tokens that one step may ask for: 162 rows of the full vocabulary.
_PROMPT_LOGITS_BYTES = 64 * 2**20


@dataclass(eq=False)
class _Sequence:
    """A request on its way. Positions below `computed` have their keys and values stored."""

    id: int
    request: Request
    sampler: Sampler
    text: TextStream
    stop_ids: frozenset[int]
    limit: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def writing(self) -> bool:
        """Whether the prompt is behind it."""
        return self.computed >= self.prompt_length

    @property
    def positions(self) -> int:
        """Positions it occupies at most; the last token of all is never run itself."""
        return self.prompt_length + max(0, self.limit - 1)


class Engine:
    """Turns requests into tokens.

    Args:
        runner: the model; all its KV blocks become the engine's.
        tokenizer: makes the text; None: the events have none, and stop strings are refused.
        eos_ids: the model's own end-of-text ids; those outside the vocabulary are ignored.
        max_context: positions a sequence may have; at most what the model and the blocks allow.
        max_batch_tokens: tokens one step may run.
        max_sequences: sequences that may run beside each other.

    Attributes:
        max_context: the number in force.
        blocks: the KV blocks, for whoever else runs the same runner.
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
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_prompt_logits = max(1, _PROMPT_LOGITS_BYTES // (4 * self._vocab_size))
        self.blocks = BlockPool(runner.num_blocks)
        room = runner.num_blocks * runner.block_size
        limits = [runner.config.max_position_embeddings, room]
        self.max_context = min(limits if max_context is None else [*limits, max_context])
        self._next_id = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        return bool(self._waiting or self._running)

    def check(self, request: Request) -> None:
        """Refuse a request that this engine could not run.

        Raises:
            PromptError: no tokens, ids outside the vocabulary, or longer than the context.
            SamplingError: a parameter does not fit the model (see `check_sampling`).
        """
        params = request.sampling
        check_token_ids(request.prompt_ids, self._vocab_size)
        check_sampling(params, self._vocab_size, self._stop_ids(request))
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
        return f", or open the model with a larger max_context (it was made for {possible:,})"

    def _stop_ids(self, request: Request) -> frozenset[int]:
        own = frozenset[int]() if request.sampling.ignore_eos else self._eos_ids
        return own | frozenset(request.sampling.stop_token_ids)

    def add(self, request: Request) -> int:
        """Queue a request; returns the id under which `step` reports it.

        Raises:
            PromptError, SamplingError: see `check`; nothing was queued.
        """
        self.check(request)
        params, prompt = request.sampling, [int(token) for token in request.prompt_ids]
        room = self.max_context - len(prompt)
        stop_ids = self._stop_ids(request)
        self._next_id += 1
        sequence = _Sequence(
            id=self._next_id,
            request=request,
            sampler=Sampler(params, self._vocab_size, prompt, sorted(stop_ids)),
            text=TextStream(self._detokenizer(prompt), params.stop, params.min_tokens),
            stop_ids=stop_ids,
            limit=room if params.max_tokens is None else min(room, params.max_tokens),
            tokens=prompt,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        self._waiting.append(sequence)
        return sequence.id

    def _detokenizer(self, prompt: Sequence[int]) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        # The first token begins a text only if the prompt has none of its own: then a leading space
        # that the vocabulary puts before every word is not part of it.
        is_special = self._tokenizer.is_special
        return self._tokenizer.detokenizer(
            continuation=not all(is_special(token) for token in reversed(prompt))
        )

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its blocks; False if it had ended already."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._release(sequence)
            return True
        for waiting in self._waiting:
            if waiting.id == request_id:
                self._waiting.remove(waiting)
                return True
        return False

    def step(self) -> list[tuple[int, TokenEvent | EarnestError]]:
        """Run one batch.

        Returns:
            What happened, as (request id, event). A request ends with an event that has a
            `finish_reason`, or with an error in place of an event; the others are not affected.
        """
        self._admit()
        idle = [sequence for sequence in self._running.values() if self._needs_nothing(sequence)]
        results: list[tuple[int, TokenEvent | EarnestError]] = [
            (sequence.id, self._scored(sequence)) for sequence in idle
        ]
        plan = self._plan()
        if not plan:
            return results
        logits = self._runner.step(make_batch([part for _, part in plan], self._runner.block_size))
        first = 0
        for sequence, part in plan:
            rows_RV = logits[first : first + part.logits]
            first += part.logits
            try:
                event = self._advance(sequence, part, rows_RV)
            except EarnestError as error:
                self._release(sequence)
                results.append((sequence.id, error))
            else:
                if event is not None:
                    results.append((sequence.id, event))
        return results

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            needed = blocks_for(sequence.positions, self._runner.block_size)
            blocks = self.blocks.allocate(needed)
            if blocks is None:
                return
            sequence.blocks = blocks
            self._running[sequence.id] = sequence
            self._waiting.popleft()

    @staticmethod
    def _needs_nothing(sequence: _Sequence) -> bool:
        """No tokens were asked for, and no log-probabilities that a step would have to find."""
        done = sequence.prompt_logprobs
        return sequence.limit == 0 and (done is None or len(done) == sequence.prompt_length)

    def _plan(self) -> list[tuple[_Sequence, Slice]]:
        """Choose the tokens of the next step: those being written first, then prompts in order."""
        plan = [
            (sequence, Slice([sequence.tokens[-1]], sequence.computed, sequence.blocks, 1))
            for sequence in self._running.values()
            if sequence.writing
        ]
        budget, prompt_logits = self._max_batch_tokens - len(plan), self._max_prompt_logits
        for sequence in self._running.values():
            if sequence.writing or budget == 0:
                continue
            start, length = (
                sequence.computed,
                min(budget, sequence.prompt_length - sequence.computed),
            )
            if sequence.prompt_logprobs is None:
                wanted = int(start + length == sequence.prompt_length)
            else:
                length = wanted = min(length, prompt_logits)
                prompt_logits -= wanted
            if length == 0:
                continue
            budget -= length
            tokens = sequence.tokens[start : start + length]
            plan.append((sequence, Slice(tokens, start, sequence.blocks, wanted)))
        return plan

    def _advance(self, sequence: _Sequence, part: Slice, rows_RV: Float32) -> TokenEvent | None:
        """Take in what one step computed for one sequence; an event if a token was chosen."""
        params = sequence.request.sampling
        if sequence.prompt_logprobs is not None and not sequence.writing:
            self._score_prompt(sequence, part, rows_RV)
        sequence.computed += len(part.tokens)
        if not sequence.writing:
            return None
        if sequence.limit == 0:
            return self._scored(sequence)
        logits_V = rows_RV[-1]
        token = sequence.sampler.sample(logits_V)
        logprobs = None
        if params.logprobs is not None:
            logprobs = token_logprobs(logits_V, token, params.logprobs)
        sequence.tokens.append(token)
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            text, reason = sequence.text.finish(), "stop"
        else:
            text = sequence.text.push(token)
            if sequence.sampler.count == sequence.limit:
                text, reason = text + sequence.text.finish(), "length"
            if sequence.text.stopped:
                reason = "stop"
        if reason is not None:
            self._release(sequence)
        of_prompt = sequence.prompt_logprobs if sequence.sampler.count == 1 else None
        return TokenEvent(
            text=text,
            token_id=token,
            logprobs=logprobs,
            finish_reason=reason,
            prompt_logprobs=None if of_prompt is None else tuple(of_prompt),
        )

    def _scored(self, sequence: _Sequence) -> TokenEvent:
        """The sole event of a request for no tokens."""
        self._release(sequence)
        of_prompt = sequence.prompt_logprobs
        return TokenEvent(
            text="",
            token_id=None,
            finish_reason="length",
            prompt_logprobs=None if of_prompt is None else tuple(of_prompt),
        )

    def _score_prompt(self, sequence: _Sequence, part: Slice, rows_RV: Float32) -> None:
        """Row i of a prompt is what the model expected at i + 1."""
        params, found = sequence.request.sampling, sequence.prompt_logprobs
        if found is None or params.prompt_logprobs is None:
            return
        following = sequence.tokens[part.start + 1 : part.start + 1 + len(part.tokens)]
        for token, logits_V in zip(following, rows_RV, strict=False):
            found.append(token_logprobs(logits_V, token, params.prompt_logprobs))

    def _release(self, sequence: _Sequence) -> None:
        del self._running[sequence.id]
        blocks, sequence.blocks = sequence.blocks, []
        self.blocks.free(blocks)


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
