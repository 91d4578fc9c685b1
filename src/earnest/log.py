"""The one logger, and the one shape in which long work reports how far it is."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger("earnest")
logger.addHandler(logging.NullHandler())


class Progress(Protocol):
    """How long work reports itself; the command line draws a bar from it.

    Called with the amount done so far, the total (same unit, bytes unless said otherwise) and a
    short text saying what is being worked on. Called at least once with `done == total`.
    """

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The `Progress` of a caller that does not want any."""
