"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Turns ids into text as they come. All it returned, joined, is the decoded whole.

    A token may end in the middle of a UTF-8 character; what is incomplete waits for the next
    token. Bytes that can no longer become a character come out as U+FFFD.

    Args:
        visible_bytes: the bytes that a token adds to the text.
        drop_first_space: take off the space that the vocabulary put before the text.
    """

    def __init__(
        self, visible_bytes: Callable[[int], bytes], *, drop_first_space: bool = False
    ) -> None:
        self._visible_bytes = visible_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_first_space = drop_first_space

    def push(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come; may be empty.

        Raises:
            PromptError: the id is negative or no id at all.
        """
        return self._shown(self._decoder.decode(self._visible_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete, else nothing."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if text and self._drop_first_space:
            self._drop_first_space = False
            return text.removeprefix(" ")
        return text
