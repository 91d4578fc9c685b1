"""What may come next: the seam between the engine and structured output."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """The state of one request's grammar. Everything slow (compiling) was done before."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, bool `[vocab_size]`; None: all of them. At least one is
        true: a grammar that is complete allows the tokens that end the text."""
        ...

    def accept(self, token_id: int) -> None:
        """A token was chosen; it was allowed."""
        ...
