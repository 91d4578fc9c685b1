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
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from itertools import pairwise
from typing import Literal, Protocol, get_args

from earnest.engine.sequence import Sequence
from earnest.errors import UserError

SpeculationName = Literal["prompt"]

# Of more sequences each guess would take a row that computing, not memory, has to pay for.
_MOST_SEQUENCES, _MOST_GUESSES = 8, 16
# Tokens a second that guesses must bring, of those without: of many estimates the highest is too
# high.
_GAIN = 1.05
# Of the time of steps without guesses, the share that asking for guesses may take that are not run.
# For so many steps after some that were run it is so many times as much: more may follow.
_ASKING, _EAGER = 1 / 400, 8
# Of the time of such a step, what each guess is hoped to take while nothing is known.
_HOPED = 1 / 32
# What a step took is the median of so many, of those without guesses, which are many and what all
# others are held against, of more; and believed for so many steps, longer where it did not pay.
_RECENT, _RECENT_PLAIN = 5, 25
_FRESH, _LONGEST = 256, 4096
# How much of what was learnt about a sequence's guesses each later guess leaves.
_MEMORY = 0.9
# Text further back is not looked through.
_WINDOW = 2**15
# Places that ended like the text, of which the one with the longest match is taken.
_PLACES = 32


class Drafter(Protocol):
    """Guesses how sequences go on. Called on the engine's thread, before some steps.

    The seam for a model that drafts, as the MTP head of ERNIE 4.5 will. It is asked about all
    sequences of a step at once, so that it can run them as one batch; keeps what it knows of each
    (keys and values of its own, hidden states that it has its runner leave) by `Sequence.id` until
    `forget`; and compares `Sequence.tokens` with what it has seen to learn which of its guesses
    were taken. A wrong guess costs time and never changes a text.
    """

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
        start = places[-1]
        size = self._match(tokens, start)
        for place in reversed(places):
            if size >= self._longest:
                break
            if place > size and tokens[place - size - 1] == tokens[-size - 1]:  # perhaps longer
                found = self._match(tokens, place)
                if found > size:
                    size, start = found, place
        # A text that repeats itself goes on repeating itself: guesses follow upon guesses.
        period = len(tokens) - start
        if count <= period:
            return tuple(tokens[start : start + count])
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
            if run in places:
                places[run].append(end)
            else:
                places[run] = deque((end,), _PLACES)
        self._seen[sequence_id] = max(done, len(tokens) - 1), places
        return places


class Speculation:
    """Decides how much is guessed: as much as brings most tokens a second, often nothing.

    The drafter is asked before every step as long as its guesses are run; otherwise only so often
    that asking takes next to nothing of the time. So one that takes long is asked seldom.

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
        self._proposed: dict[int, tuple[int, ...]] = {}  # what has come of them is taken off
        self._begun: tuple[float, _Costs, int] | None = None

    def guesses(self, writing: list[Sequence], room: int) -> dict[int, tuple[int, ...]]:
        """What to try for sequences that are about to run their last token; called once a step.

        Args:
            writing: the sequences of the step, all of them writing.
            room: tokens that the step has left.
        """
        self._begun = None
        rows = len(writing)
        if not 0 < rows <= _MOST_SEQUENCES:
            return {}
        costs = self._costs.get(rows)
        if costs is None:
            costs = self._costs[rows] = _Costs(rows)
        begun = self._clock()
        found: dict[int, tuple[int, ...]] = {}
        if costs.may_ask():
            found = self._ask(writing, costs, room)
            if not found:  # what asking took is no part of a step without guesses
                asked, begun = begun, self._clock()
                costs.asked(begun - asked)
        self._begun = begun, costs, rows + sum(map(len, found.values()))
        return found

    def came(self, sequence_id: int, tokens: Tokens[int]) -> None:
        """These were chosen in this step; guesses are held against them, even those not run."""
        guesses = self._proposed.pop(sequence_id, None)
        if guesses is None:
            return
        chance = self._chance(sequence_id)
        for guess, token in zip(guesses, tokens, strict=False):
            chance.learn(guess == token)
            self._usual.learn(guess == token)
            if guess != token:
                return
        if len(guesses) > len(tokens):  # the next step shows more, whether it asks or not
            self._proposed[sequence_id] = guesses[len(tokens) :]

    def stepped(self) -> None:
        """The step is over."""
        if self._begun is not None:
            begun, costs, rows = self._begun
            costs.add(rows, self._clock() - begun)
        self._begun = None

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        self._chances.pop(sequence_id, None)
        self._proposed.pop(sequence_id, None)
        self._drafter.forget(sequence_id)

    def _chance(self, sequence_id: int) -> _Chance:
        chance = self._chances.get(sequence_id)
        if chance is None:
            chance = self._chances[sequence_id] = _Chance(self._usual.value)
        return chance

    def _ask(self, writing: list[Sequence], costs: _Costs, room: int) -> dict[int, tuple[int, ...]]:
        """The guesses of the drafter that are to be run."""
        most = max(1, min(self._most, _MOST_GUESSES // len(writing)))
        wanted = [
            (sequence, count)
            for sequence in writing
            if (count := min(most, sequence.limit - sequence.sampler.count - 1)) > 0
        ]
        drafts = zip(wanted, self._drafter.draft(wanted) if wanted else (), strict=True)
        self._proposed = {sequence.id: draft for (sequence, _), draft in drafts if draft}
        lengths = self._worth(costs, len(writing), room)
        return {number: self._proposed[number][:count] for number, count in lengths.items()}

    def _worth(self, costs: _Costs, rows: int, room: int) -> dict[int, int]:
        """How many of the proposed guesses to run for each sequence; those with none are left out.

        The likeliest are added first, as long as the step brings more tokens a second with them.
        """
        ranked: list[tuple[float, int]] = []
        for number, draft in self._proposed.items():
            value = chance = self._chance(number).value
            for _ in draft:
                ranked.append((-chance, number))
                chance *= value
        expected = float(rows)
        if expected - sum(negative for negative, _ in ranked) <= _GAIN * expected:
            return {}  # not even if they cost nothing
        ranked = sorted(ranked)[: max(0, room)]
        plain, *prices = costs.prices(rows + len(ranked))
        best, chosen = _GAIN * expected / plain, 0
        for index, ((negative, _), price) in enumerate(zip(ranked, prices, strict=True), 1):
            expected -= negative
            if expected / price > best:
                best, chosen = expected / price, index
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


class _Price:
    """What steps of one number of rows took, of late."""

    def __init__(self, recent: int) -> None:
        self._taken: deque[float] = deque(maxlen=recent)
        self._median: float | None = None
        self._last = 0

    def add(self, step: int, seconds: float, believed: int) -> None:
        """So long took step number `step`."""
        if not self.is_known(step, believed):
            self._taken.clear()
        self._taken.append(max(seconds, 1e-9))
        self._last, self._median = step, None

    def is_known(self, step: int, believed: int) -> bool:
        """Whether there was such a step of late, `believed` steps ago at most."""
        return bool(self._taken) and step - self._last <= believed

    @property
    def seconds(self) -> float:
        """The median; worked out when asked for."""
        if self._median is None:
            self._median = statistics.median(self._taken)
        return self._median


class _Costs:
    """What steps took, of late, with one number of sequences, and what asking took."""

    def __init__(self, sequences: int) -> None:
        self._plain = _Price(_RECENT_PLAIN)  # without guesses
        self._prices = {sequences: self._plain}  # by rows
        # An asking that looks through a prompt takes longer than those to come.
        self._askings: deque[float] = deque([0.0] * (_RECENT // 2 + 1), maxlen=_RECENT)
        self._steps = self._rest = 0
        self._guessed = -_EAGER  # the last step with guesses
        self._believed = _FRESH  # what those take; everything is measured by those without

    def may_ask(self) -> bool:
        """Whether the drafter may be asked before this step; called once a step."""
        if self._rest > 0:
            self._rest -= 1
            return False
        # First see what a step takes without guesses.
        return self._plain.is_known(self._steps, _FRESH)

    def asked(self, seconds: float) -> None:
        """Asking took so long, and no guess is run."""
        self._askings.append(seconds)
        share = _ASKING * (_EAGER if self._steps - self._guessed < _EAGER else 1)
        steps = statistics.median(self._askings) / (share * self._plain.seconds)
        self._rest = max(0, math.ceil(steps) - 1)

    def add(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._steps += 1
        price = self._prices.get(rows)
        if price is None:
            price = self._prices[rows] = _Price(_RECENT)
        if price is self._plain:
            price.add(self._steps, seconds, _FRESH)
            return
        price.add(self._steps, seconds, self._believed)
        # What did not pay for so long may not for twice as long.
        waited = self._steps - self._guessed > _FRESH
        self._believed = min(2 * self._believed, _LONGEST) if waited else _FRESH
        self._guessed = self._steps

    def prices(self, most: int) -> list[float]:
        """Seconds of a step with no guess, one, and so on up to `most` rows.

        Between known numbers of rows a straight line; beyond the largest the one that leads there
        from steps without guesses, or where nothing else is known so little that it is tried.
        """
        known = sorted(
            (rows, price.seconds)
            for rows, price in self._prices.items()
            if price.is_known(self._steps, _FRESH if price is self._plain else self._believed)
        )
        found: list[float] = []
        for (low, base), (high, above) in pairwise(known):
            slope = (above - base) / (high - low)
            found += [base + slope * rows for rows in range(high - low)]
        (fewest, plain), (low, base) = known[0], known[-1]
        slope = max(0.0, base - plain) / (low - fewest) if low > fewest else plain * _HOPED
        found += [base + slope * rows for rows in range(most + 1 - low)]
        return found[: most + 1 - fewest]
