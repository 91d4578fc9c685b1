"""`Blocks`: an answer as runs of thoughts, of text, and calls, in the order they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from earnest.serve.bodies import arguments_of
from earnest.serve.formats import Delta

Kind = Literal["thoughts", "text", "call"]


@dataclass
class Block:
    """A run of an answer.

    Attributes:
        kind: of all of it.
        text: the thoughts, the text, or the arguments of the call as JSON.
        call_id, name: of a call.
    """

    kind: Kind
    text: str = ""
    call_id: str = ""
    name: str = ""

    @property
    def arguments(self) -> dict[str, Any] | None:
        """Of a call, as an object; None where the JSON was cut off."""
        found = arguments_of(self.text)
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Change:
    """A block begins, goes on with `more`, or is complete; `index` counts blocks from 0."""

    what: Literal["begin", "more", "end"]
    index: int
    block: Block
    more: str = ""


@dataclass
class Blocks:
    """The blocks so far; the last one may still grow."""

    all: list[Block] = field(default_factory=list)
    _open: bool = False

    def take(self, deltas: Sequence[Delta]) -> list[Change]:
        """Take in the next pieces of the answer."""
        changes: list[Change] = []
        for delta in deltas:
            kind, more = _kind(delta)
            if not self._open or self.all[-1].kind != kind or delta.name:
                changes += self.end()
                self.all.append(Block(kind, call_id=delta.call_id, name=delta.name))
                self._open = True
                changes.append(self._change("begin"))
            if more:
                self.all[-1].text += more
                changes.append(self._change("more", more))
        return changes

    def end(self) -> list[Change]:
        """No more comes for the last block."""
        if not self._open:
            return []
        self._open = False
        return [self._change("end")]

    def _change(self, what: Literal["begin", "more", "end"], more: str = "") -> Change:
        return Change(what, len(self.all) - 1, self.all[-1], more)


def _kind(delta: Delta) -> tuple[Kind, str]:
    if delta.reasoning:
        return "thoughts", delta.reasoning
    if delta.call is None:
        return "text", delta.content
    return "call", delta.arguments
