"""Guessing several tokens at once, and running them in one step.

A guess costs little where memory is the limit: its row shares the weights that are read anyway. It
is kept only if it is the very token that would have been chosen: every position is sampled from the
logits it would have had alone, with the draw of that position, so the text is the same with and
without guessing, greedy or not.

`PromptLookup` guesses what followed the last time the text ended like this (Saxena 2023). The seam
for a model that drafts (an MTP head) is `Drafter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Protocol

from earnest.engine.sequence import Sequence

# Guesses pay while tokens are few; of many sequences each would bring experts of its own.
_MOST_SEQUENCES = 4
# Steps of each kind before they are compared; after so many trials' time the worse kind gets
# another chance.
_TRIAL = 8
_REST = 16


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def draft(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """At most `count` token ids; none at all where there is nothing to go by."""
        ...

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        ...


class PromptLookup:
    """Finds the latest earlier place where the last tokens stood, and guesses what came after.

    Args:
        longest, shortest: how many last tokens must be the same; the longest match is taken.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        # Per sequence: tokens looked at, and for each run of tokens where it last ended.
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def draft(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """See `Drafter`."""
        tokens = sequence.tokens
        places = self._places(sequence.id, tokens)
        for size in self._sizes:
            place = places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if place is not None:
                return tuple(tokens[place : place + count])
        return ()

    def forget(self, sequence_id: int) -> None:
        """See `Drafter`."""
        self._seen.pop(sequence_id, None)

    def _places(self, sequence_id: int, tokens: Tokens[int]) -> dict[tuple[int, ...], int]:
        """Where each run of tokens ended, but for those that end at the very end."""
        done, places = self._seen.get(sequence_id, (0, {}))
        for end in range(done + 1, len(tokens)):
            for size in self._sizes:
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._seen[sequence_id] = max(done, len(tokens) - 1), places
        return places


class Speculation:
    """Decides when to guess: only while steps with guesses bring more tokens a second.

    Args:
        drafter: who guesses.
        most: guesses of one sequence in a step.
        clock: seconds; replaced by tests only.
        trial: steps with and without guesses before they are compared.

    Attributes:
        proposed, accepted: guesses made so far, and those that were right.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        most: int = 4,
        clock: Callable[[], float] = time.perf_counter,
        trial: int = _TRIAL,
    ) -> None:
        self._drafter, self._most, self._clock, self._trial = drafter, most, clock, trial
        self._rates = {True: _Rate(), False: _Rate()}
        self._begun: float | None = None
        self._with_guesses = False
        self._rest = 0
        self.proposed = self.accepted = 0

    def guesses(self, writing: list[Sequence], room: int) -> dict[int, tuple[int, ...]]:
        """What to try for sequences that are about to run their last token; called once a step.

        Args:
            writing: the sequences of the step, all of them writing.
            room: tokens that the step has left.
        """
        found: dict[int, tuple[int, ...]] = {}
        if 0 < len(writing) <= _MOST_SEQUENCES and self._worth_it():
            for sequence in writing:
                left = sequence.limit - sequence.sampler.count - 1
                count = min(self._most, left, room)
                draft = self._drafter.draft(sequence, count) if count > 0 else ()
                if draft:
                    found[sequence.id] = draft
                    room -= len(draft)
        self._begun, self._with_guesses = self._clock(), bool(found)
        return found

    def checked(self, proposed: int, accepted: int) -> None:
        """So many guesses were made in a step, and so many were right."""
        self.proposed += proposed
        self.accepted += accepted

    def stepped(self, tokens: int) -> None:
        """A step in which all sequences were writing has brought so many tokens."""
        if self._begun is None or tokens == 0:
            return
        self._rates[self._with_guesses].add(tokens, self._clock() - self._begun)
        self._begun = None

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        self._drafter.forget(sequence_id)

    def _worth_it(self) -> bool:
        plain, guessed = self._rates[False], self._rates[True]
        if plain.steps < self._trial:
            return False
        if guessed.steps < self._trial or guessed.value >= plain.value:
            return True
        self._rest += 1
        if self._rest < _REST * self._trial:
            return False
        self._rest = 0
        guessed.steps = plain.steps = 0  # another trial of both: the text may have changed
        return False


class _Rate:
    """Tokens a second, of late."""

    def __init__(self) -> None:
        self.steps, self.value = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-9)
        self.steps += 1
        self.value += (rate - self.value) / min(self.steps, 2 * _TRIAL)
