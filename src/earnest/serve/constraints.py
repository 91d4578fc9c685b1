"""Constraints beside grammars: words that must not be written, thoughts that must end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from earnest.engine.constraint import Constraint


class Banned(Constraint):
    """Keeps runs of tokens from being written, beside what another constraint allows.

    Args:
        runs: token ids, none of them empty.
        vocab_size: rows of the logits.
        other: what else must hold.
    """

    def __init__(
        self, runs: Sequence[Sequence[int]], vocab_size: int, other: Constraint | None
    ) -> None:
        self._runs, self._vocab_size, self._other = runs, vocab_size, other
        self._longest = max(len(run) for run in runs)
        self._recent: list[int] = []

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        allowed = None if self._other is None else self._other.allowed()
        if allowed is None:
            allowed = np.ones(self._vocab_size, np.bool_)
        free = allowed.copy()
        for run in self._runs:
            before = list(run[:-1])
            if not before or self._recent[-len(before) :] == before:
                free[run[-1]] = False
        return free if free.any() else allowed

    def accept(self, token_id: int) -> None:
        self._recent = [*self._recent, token_id][-self._longest :]
        if self._other is not None:
            self._other.accept(token_id)


class ThinkingBudget(Constraint):
    """Ends a block of thoughts after so many tokens.

    Args:
        most: tokens of thoughts.
        closing: token ids that spell the end of the block.
        pieces: the bytes of each token.
        mark: the bytes by which a block that ends by itself is known.
        vocab_size: rows of the logits.
        other: what else must hold; it sees the tokens that are forced, too.
    """

    def __init__(
        self,
        most: int,
        closing: Sequence[int],
        pieces: Sequence[bytes],
        mark: bytes,
        vocab_size: int,
        other: Constraint | None,
    ) -> None:
        self._left, self._closing, self._pieces = most, list(closing), pieces
        self._mark, self._vocab_size, self._other = mark, vocab_size, other
        self._tail = b""
        self._ended = False

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        if self._ended or self._left > 0:
            return None if self._other is None else self._other.allowed()
        only = np.zeros(self._vocab_size, np.bool_)
        only[self._closing[-self._left]] = True
        return only

    def accept(self, token_id: int) -> None:
        if self._other is not None:
            self._other.accept(token_id)
        if self._ended:
            return
        self._left -= 1
        self._tail = (self._tail + self._pieces[token_id])[-2 * len(self._mark) :]
        self._ended = self._mark in self._tail or -self._left >= len(self._closing)
