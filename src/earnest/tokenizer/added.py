"""Finding added tokens in a text, as the `tokenizers` library does it.

The leftmost match wins, of several at one place the longest; what lies between is left to the
vocabulary. Needed here because the `sentencepiece` library knows nothing of tokens that are added
in JSON files. The search costs the same for ten tokens and for sixty thousand: only places where
some token's first character stands are looked at, and there one look-up per length.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

from earnest.tokenizer.vocabulary import AddedToken

# Unicode White_Space; str.isspace() also counts the separators U+001C..U+001F.
_SPACES = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)
_JOINERS = "\u200c\u200d"


class Splitter:
    """Cuts a text into added tokens and the text between them.

    Args:
        tokens: the tokens to look for. Of two with the same text the first counts.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for token in tokens:
            self._tokens.setdefault(token.content, token)
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for content in self._tokens:
            lengths[content[0]].add(len(content))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Plain text (never empty) and ids of added tokens, in order."""
        done = at = 0
        while found := self._first and self._first.search(text, at):
            start = found.start()
            token = self._longest_at(text, start)
            if token is None:
                at = start + 1
                continue
            at = stop = start + len(token.content)
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop:])):
                continue
            while token.lstrip and start > done and text[start - 1] in _SPACES:
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in _SPACES:
                stop += 1
            if start > done:
                yield text[done:start]
            yield token.id
            done = stop
        if done < len(text):
            yield text[done:]

    def _longest_at(self, text: str, start: int) -> AddedToken | None:
        for length in self._lengths[text[start]]:
            if token := self._tokens.get(text[start : start + length]):
                return token
        return None


def _is_word(text: str) -> bool:
    """Whether a text starts with a word character (Unicode TR 18, as in Rust's `\\w`)."""
    first = text[:1]
    if not first:
        return False
    category = unicodedata.category(first)
    return (
        first.isalpha() or first in _JOINERS or category[0] == "M" or category in ("Nd", "Nl", "Pc")
    )
