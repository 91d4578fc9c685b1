"""Reading a prompt: what is taken from its rows, logits or hidden states, as they are computed.

Rows come in order, in pieces of any size, and after a preemption some of them again; each is taken
once, alone. So what was read has the same bits however the prompt was divided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from earnest.engine.request import Pooling, Request, Score, Scoring, TokenLogprobs
from earnest.engine.sampler import require_finite, token_logprobs
from earnest.runners.base import Float32


class Reader(ABC):
    """Reads the rows `[next, stop)` of a prompt; row i is what the model makes of tokens 0 to i.

    Attributes:
        next: the row that is wanted next. What lies before it may come from remembered blocks.
        stop: where its interest ends.
        hidden: rows are hidden states (after the final norm), not logits.
    """

    hidden = False

    def __init__(self, start: int, stop: int) -> None:
        self.next, self.stop = start, stop

    @property
    def done(self) -> bool:
        """Whether all was read."""
        return self.next >= self.stop

    def read(self, first: int, rows: Float32) -> None:
        """Take in computed rows, the first of which is that of position `first`.

        Raises:
            CheckpointError: they hold NaN or infinity.
        """
        for position, row in enumerate(rows, first):
            if position == self.next < self.stop:
                self._take(position, row)
                self.next += 1

    @abstractmethod
    def _take(self, position: int, row: Float32) -> None: ...


class PromptLogprobs(Reader):
    """Log-probability of every token of the prompt but the first, and the likeliest ones."""

    def __init__(self, prompt: tuple[int, ...], count: int) -> None:
        super().__init__(0, len(prompt) - 1)
        self._prompt, self._count = prompt, count
        self.found: list[TokenLogprobs | None] = [None]

    def _take(self, position: int, row: Float32) -> None:
        self.found.append(token_logprobs(row, int(self._prompt[position + 1]), self._count))


class Scores(Reader):
    """How likely given tokens are at given positions."""

    def __init__(self, scoring: Scoring) -> None:
        self._targets = scoring.targets
        super().__init__(self._targets[0][0] - 1, self._targets[-1][0])
        self.found: list[Score] = []

    def _take(self, position: int, row: Float32) -> None:
        here = len(self.found)
        tokens: list[int] = []
        for at, token in self._targets[here:]:
            if at != position + 1:
                break
            tokens.append(token)
        if not tokens:
            return
        require_finite(row)
        best = int(np.argmax(row))
        x_V = row.astype(np.float64)
        log_total = x_V[best] + np.log(np.exp(x_V - x_V[best]).sum())
        self.found += [Score(float(x_V[token] - log_total), token == best) for token in tokens]


class Pooled(Reader):
    """One vector for the prompt, float32 `[hidden_size]`, not normalised."""

    hidden = True

    def __init__(self, pooling: Pooling, length: int) -> None:
        start = 0 if pooling.kind == "mean" else length - 1
        super().__init__(start, length)
        self._total: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._count = length - start

    def _take(self, position: int, row: Float32) -> None:
        require_finite(row)
        if self._total is None:
            self._total = np.zeros(len(row), np.float64)
        self._total += row

    @property
    def found(self) -> Float32 | None:
        """The vector, once all was read."""
        if self._total is None or not self.done:
            return None
        return (self._total / self._count).astype(np.float32)


def reader_of(request: Request) -> Reader | None:
    """What a request wants to know of its prompt; None: nothing."""
    match request.reading:
        case Scoring():
            return Scores(request.reading)
        case Pooling():
            return Pooled(request.reading, len(request.prompt_ids))
    count = request.sampling.prompt_logprobs
    return None if count is None else PromptLogprobs(request.prompt_ids, count)


def normalized(vector: Float32) -> Float32:
    """A vector of the same direction and of length 1; zeros stay zeros."""
    wide = vector.astype(np.float64)
    length = float(np.sqrt((wide * wide).sum()))
    return (wide / length).astype(np.float32) if length else vector
