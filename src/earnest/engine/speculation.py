"""Guessing several tokens at once, and running them in one step.

A guess costs little where memory is the limit: its row shares the weights that are read anyway. It
is kept only if it is the very token that would have been chosen: every position is sampled from the
logits it would have had alone, with the draw of that position, so the text is the same with and
without guessing, greedy or not.

Who guesses is a `Drafter`: `PromptLookup`, which finds what followed the last time the text ended
like this (Saxena 2023), or a model that drafts. How much is guessed is decided by `Speculation`,
before every step, from how often guesses were right and what steps have taken.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from typing import Literal, Protocol, get_args

from earnest.engine.sequence import Sequence
from earnest.errors import UserError

SpeculationName = Literal["prompt"]

# Of more sequences each guess would take a row that computing, not memory, has to pay for.
_MOST_SEQUENCES, _MOST_GUESSES = 8, 16
# What a step took is believed for so many steps, and is the median of so many.
_FRESH, _RECENT = 256, 5
# A drafter that costs something and was given up is asked again after so many steps.
_RETRY = 64
# How much of what was learnt about a sequence's guesses each later guess leaves.
_MEMORY = 0.9
# Text further back is not looked through.
_WINDOW = 2**15
# Places that ended like the text, of which the one with the longest match is taken.
_PLACES = 32


class Drafter(Protocol):
    """Guesses how sequences go on. Called on the engine's thread, between steps.

    The seam for a model that drafts, as the MTP head of ERNIE 4.5 will. It is asked about all
    sequences of a step at once, so that it can run them as one batch; keeps what it knows of each
    (keys and values of its own, hidden states that it has its runner leave) by `Sequence.id` until
    `forget`; and compares `Sequence.tokens` with what it has seen to learn which of its guesses
    were taken. A wrong guess costs time and never changes a text.

    Attributes:
        is_free: guessing costs next to nothing. Then it is asked before every step, whether its
            guesses are run or not, and noticed when it begins to be right.
    """

    is_free: bool

    def draft(self, wanted: Tokens[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """For each sequence at most so many ids of the vocabulary, those that follow its last
        token; none at all where there is nothing to go by."""
        ...

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        ...


class PromptLookup:
    """Finds the earlier place that ended most like the text ends now, and guesses what came after.

    Args:
        shortest: last tokens that must be the same.
        longest: tokens beyond which a longer match is not better, and the latest one is taken.
    """

    is_free = True

    def __init__(self, shortest: int = 2, longest: int = 8) -> None:
        self._shortest, self._longest = shortest, longest
        # Per sequence: tokens looked at, and for each run of `shortest` tokens where it ended.
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], deque[int]]]] = {}

    def draft(self, wanted: Tokens[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """See `Drafter`."""
        return [self._draft(sequence, count) for sequence, count in wanted]

    def forget(self, sequence_id: int) -> None:
        """See `Drafter`."""
        self._seen.pop(sequence_id, None)

    def _draft(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        tokens = sequence.tokens
        places = self._places(sequence.id, tokens).get(tuple(tokens[-self._shortest :]))
        if not places:
            return ()
        _, start = max((self._match(tokens, place), place) for place in places)
        # A text that repeats itself goes on repeating itself: guesses follow upon guesses.
        period = len(tokens) - start
        return tuple(tokens[start + i % period] for i in range(count))

    def _match(self, tokens: Tokens[int], place: int) -> int:
        """How many tokens before `place` are those at the end."""
        size, most = self._shortest, min(self._longest, place)
        while size < most and tokens[place - size - 1] == tokens[-size - 1]:
            size += 1
        return size

    def _places(self, sequence_id: int, tokens: Tokens[int]) -> dict[tuple[int, ...], deque[int]]:
        """Where each run of tokens ended, but for the one at the very end."""
        size = self._shortest
        done, places = self._seen.get(sequence_id, (max(size, len(tokens) - _WINDOW) - 1, {}))
        for end in range(done + 1, len(tokens)):
            run = tuple(tokens[end - size : end])
            places.setdefault(run, deque(maxlen=_PLACES)).append(end)
        self._seen[sequence_id] = max(done, len(tokens) - 1), places
        return places


class Speculation:
    """Decides how much is guessed: as much as brings most tokens a second, often nothing.

    Args:
        drafter: who guesses.
        most: guesses of one sequence in a step.
        clock: seconds; replaced by tests only.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        most: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafter, self._most, self._clock = drafter, most, clock
        self._costs: dict[int, _Costs] = {}  # by the number of sequences
        self._chances: dict[int, _Chance] = {}
        self._usual = _Chance(0.5)  # of all sequences: what a new one is thought to be
        self._proposed: Mapping[int, tuple[int, ...]] = {}
        self._begun: tuple[float, _Costs, int] | None = None
        self._idle = 0

    def guesses(self, writing: list[Sequence], room: int) -> dict[int, tuple[int, ...]]:
        """What to try for sequences that are about to run their last token; called once a step.

        Args:
            writing: the sequences of the step, all of them writing.
            room: tokens that the step has left.
        """
        self._begun, self._proposed = None, {}
        rows = len(writing)
        if not 0 < rows <= _MOST_SEQUENCES:
            return {}
        begun, costs = self._clock(), self._costs.setdefault(rows, _Costs())
        most = max(1, min(self._most, _MOST_GUESSES // rows))
        wanted = [
            (sequence, count)
            for sequence in writing
            if (count := min(most, sequence.limit - sequence.sampler.count - 1)) > 0
        ]
        found: dict[int, tuple[int, ...]] = {}
        if wanted and self._ask({sequence.id: count for sequence, count in wanted}, rows, room):
            drafts = zip(wanted, self._drafter.draft(wanted), strict=True)
            self._proposed = {sequence.id: draft for (sequence, _), draft in drafts if draft}
            counts = {number: len(draft) for number, draft in self._proposed.items()}
            lengths = self._worth(counts, rows, room)
            found = {number: self._proposed[number][:count] for number, count in lengths.items()}
        self._begun = begun, costs, rows + sum(map(len, found.values()))
        return found

    def came(self, sequence_id: int, tokens: Tokens[int]) -> None:
        """These were chosen in this step; guesses are held against them, even those not run."""
        guesses = self._proposed.get(sequence_id)
        if not guesses:
            return
        chance = self._chance(sequence_id)
        for guess, token in zip(guesses, tokens, strict=False):
            chance.learn(guess == token)
            self._usual.learn(guess == token)
            if guess != token:
                break

    def stepped(self) -> None:
        """The step is over."""
        if self._begun is not None:
            begun, costs, rows = self._begun
            costs.add(rows, self._clock() - begun)
        self._begun, self._proposed = None, {}

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        self._chances.pop(sequence_id, None)
        self._drafter.forget(sequence_id)

    def _chance(self, sequence_id: int) -> _Chance:
        return self._chances.setdefault(sequence_id, _Chance(self._usual.value))

    def _ask(self, counts: Mapping[int, int], rows: int, room: int) -> bool:
        """Whether to ask the drafter for so many guesses."""
        if self._drafter.is_free or self._worth(counts, rows, room):
            return True
        self._idle = (self._idle + 1) % _RETRY
        return self._idle == 0

    def _worth(self, counts: Mapping[int, int], rows: int, room: int) -> dict[int, int]:
        """How many of so many guesses to run for each sequence; those with none are left out.

        The likeliest are added first, as long as the step brings more tokens a second with them.
        """
        costs = self._costs[rows]
        plain = costs.seconds(rows)
        if plain is None or not counts:
            return {}  # first see what a step takes without guesses
        ranked = sorted(
            (-(self._chance(number).value ** (index + 1)), number)
            for number, count in counts.items()
            for index in range(count)
        )[: max(0, room)]
        expected, best, chosen = float(rows), rows / plain, 0
        for index, (negative, _) in enumerate(ranked, 1):
            expected -= negative
            rate = expected / (costs.seconds(rows + index) or plain)
            if rate > best:
                best, chosen = rate, index
        lengths: dict[int, int] = {}
        for _, number in ranked[:chosen]:
            lengths[number] = lengths.get(number, 0) + 1
        return lengths


def speculation_of(name: SpeculationName | None) -> Speculation | None:
    """The speculation of a name; None for none.

    Raises:
        UserError: there is no such speculation.
    """
    if name is None:
        return None
    if name not in get_args(SpeculationName):
        raise UserError("there is no such speculation", got=name, expected='"prompt" or None')
    return Speculation(PromptLookup())


class _Chance:
    """How likely a guess is right whose predecessors were."""

    def __init__(self, value: float) -> None:
        self._right, self._tried = value, 1.0

    @property
    def value(self) -> float:
        return self._right / self._tried

    def learn(self, right: bool) -> None:
        self._right = _MEMORY * self._right + right
        self._tried = _MEMORY * self._tried + 1


class _Costs:
    """What steps of so many rows took, of late, with one number of sequences."""

    def __init__(self) -> None:
        self._taken: dict[int, deque[float]] = {}
        self._when: dict[int, int] = {}
        self._medians: dict[int, float] = {}
        self._known: list[tuple[int, float]] = []  # those that are believed, by rows
        self._steps = 0

    def add(self, rows: int, seconds: float) -> None:
        self._steps += 1
        if self._steps - self._when.get(rows, self._steps) > _FRESH:
            self._taken[rows].clear()
        self._taken.setdefault(rows, deque(maxlen=_RECENT)).append(max(seconds, 1e-9))
        self._when[rows] = self._steps
        self._medians[rows] = statistics.median(self._taken[rows])
        self._known = sorted(
            (n, median)
            for n, median in self._medians.items()
            if self._steps - self._when[n] <= _FRESH
        )

    def seconds(self, rows: int) -> float | None:
        """Between known numbers of rows a straight line; beyond the largest as there, so that it is
        tried; None below the smallest."""
        at = bisect(self._known, (rows, math.inf))
        if at == 0:
            return None
        low, base = self._known[at - 1]
        if low == rows or at == len(self._known):
            return base
        high, above = self._known[at]
        return base + (above - base) * (rows - low) / (high - low)
