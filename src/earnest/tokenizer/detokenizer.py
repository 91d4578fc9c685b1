"""Token ids to text, one at a time."""

from __future__ import annotations


class Detokenizer:
    """Turns ids into text as they come; see `Tokenizer.detokenizer`."""

    def push(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come."""
        raise NotImplementedError

    def flush(self) -> str:
        """What is left at the end."""
        raise NotImplementedError
