"""From token ids to the text that may be shown: whole characters, and never part of a stop string.

A stop string may begin in one token and end in a later one, so text that could still become one is
held back until it is one (and is dropped) or cannot be (and is shown). How much to hold back is
what the automaton of Knuth, Morris and Pratt (1977) knows: its state is the length of the longest
beginning of the stop string that the text ends with. So every character is looked at once, and the
result does not depend on how the text was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """What is needed of `earnest.tokenizer`: ids in, whole characters out."""

    def push(self, token_id: int, /) -> str:
        """Text that became complete with this id."""
        ...

    def flush(self) -> str:
        """What remains at the end."""
        ...


class StopMatcher:
    """Finds the first stop string in a growing text.

    The match that ends first wins; of several that end at one character, the longest.

    Args:
        stops: non-empty strings; none at all is allowed.

    Attributes:
        found: the stop string that was found; nothing is accepted after that. None: none yet.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.found is not None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Take more text; returns what may be shown now.

        Args:
            text: the continuation.
            armed: False: stop strings that end in this text do not count and are shown.
        """
        if not self._stops:
            return text
        if self.stopped:
            return ""
        pending = self._held + text
        for position, character in enumerate(text, len(self._held)):
            length = self._advance(character)
            if length and armed:
                end = position + 1
                self.found, self._held = pending[end - length : end], ""
                return pending[: end - length]
        keep = max(self._states)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """The text still held back, once it is known that no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Feed one character; returns the length of the longest stop string it completes, or 0."""
        completed = 0
        for number, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[number]
            while state and stop[state] != character:
                state = borders[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                completed = max(completed, state)
                state = borders[state - 1]
            self._states[number] = state
        return completed


def _borders(pattern: str) -> list[int]:
    """For each beginning of `pattern`: the length of its longest proper border."""
    borders, length = [0] * len(pattern), 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders


class TextStream:
    """The text of one request as it grows.

    Args:
        detokenizer: turns ids into text; None where the model has no tokenizer: no text at all.
        stops: stop strings.
        min_tokens: a stop string counts only if it ends in the text of a later token than these.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, stops: Sequence[str], min_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._count = 0

    @property
    def found(self) -> str | None:
        """The stop string that was found."""
        return self._matcher.found

    def push(self, token_id: int) -> str:
        """Text that may be shown after this token."""
        self._count += 1
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.push(token_id)
        return self._matcher.push(text, armed=self._count > self._min_tokens)

    def finish(self) -> str:
        """What remains to be shown when no more tokens come; may find a stop string too."""
        if self._detokenizer is None or self.found is not None:
            return ""
        text = self._matcher.push(self._detokenizer.flush(), armed=self._count > self._min_tokens)
        return text + self._matcher.flush()
