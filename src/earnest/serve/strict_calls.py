"""`StrictCalls`: text that is free, and calls of tools in it that are not.

A tool that is `strict` is not told when to be called, only how. So the text is free until it opens
a block of calls; from there to the block's end a grammar says which tokens may come, and then the
text is free again. The tag that opens a block may be one token or several, a special one or plain
text: it is known by its bytes. A token that reaches beyond the tag would begin the block unseen,
and is not allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from earnest.engine.constraint import Constraint

OPEN, CLOSE = b"<tool_call>", b"</tool_call>"
_THINK, _THOUGHT = b"<think>", b"</think>"


class Overruns:
    """Tokens that reach beyond the tag that opens a block, by how much of it stands there already.

    Args:
        pieces: the bytes of each token.
        vocab_size: rows of the logits.
    """

    def __init__(self, pieces: Sequence[bytes], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        found: list[list[int]] = [[] for _ in OPEN]
        first = set(OPEN)
        for token, piece in enumerate(pieces):
            if not piece or (piece[0] not in first and OPEN not in piece):
                continue
            if OPEN in piece[:-1]:
                found[0].append(token)
            for there in range(1, len(OPEN)):
                rest = OPEN[there:]
                if len(piece) > len(rest) and piece.startswith(rest):
                    found[there].append(token)
        self._by_length = [np.array(tokens, np.intp) for tokens in found]

    def allowed(self, tail: bytes) -> npt.NDArray[np.bool_] | None:
        """Which tokens may follow a text that ends with `tail`; None: all."""
        there = [n for n in range(1, len(OPEN)) if tail.endswith(OPEN[:n])]
        lists = [self._by_length[n] for n in (0, *there) if len(self._by_length[n])]
        if not lists:
            return None
        free = np.ones(self._vocab_size, np.bool_)
        for tokens in lists:
            free[tokens] = False
        return free


class StrictCalls(Constraint):
    """Lets text be as it likes, and calls of tools as they must.

    Args:
        inside: makes a constraint for what stands between the tags, the closing one included.
        overruns: for the vocabulary.
        pieces: the bytes of each token.
        thinks: the text begins with thoughts; what looks like a call there is none.
    """

    def __init__(
        self,
        inside: Callable[[], Constraint],
        overruns: Overruns,
        pieces: Sequence[bytes],
        *,
        thinks: bool,
    ) -> None:
        self._inside, self._overruns, self._pieces = inside, overruns, pieces
        self._thinks = thinks
        self._call: Constraint | None = None
        self._tail = b""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        if self._call is not None:
            return self._call.allowed()
        return None if self._thinks else self._overruns.allowed(self._tail)

    def accept(self, token_id: int) -> None:
        piece = self._pieces[token_id] if token_id < len(self._pieces) else b""
        self._tail = (self._tail + piece)[-64 - len(piece) :]
        if self._call is not None:
            self._call.accept(token_id)
            if CLOSE in self._tail:
                self._call, self._tail = None, b""
        elif self._thinks:
            _, ended, rest = self._tail.partition(_THOUGHT)
            if ended:
                self._thinks, self._tail = False, rest
        elif self._tail.endswith(OPEN):
            self._call, self._tail = self._inside(), b""
        elif _THINK in self._tail:
            self._thinks, self._tail = True, self._tail.partition(_THINK)[2]
