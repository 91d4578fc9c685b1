"""What the kinds of vocabulary have in common: the seam between them and `Tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from earnest.errors import TokenizerError

# Far above every vocabulary there is; a file that asks for more is broken.
MAX_TOKEN_ID = 2**24


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the vocabulary's own algorithm sees it.

    Attributes:
        id: its token id.
        content: its text.
        special: controls the model; left out of decoded text.
        single_word: counts only where no letter or digit touches it.
        lstrip, rstrip: takes the white space before, after it along.
        normalized: sought in the text as the vocabulary rewrites it (`tokenizer.json` only).
    """

    id: int
    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.id < MAX_TOKEN_ID:
            raise TokenizerError(
                f"added token {self.content[:40]!r} has an impossible id",
                got=self.id,
                expected=f"0 to {MAX_TOKEN_ID - 1:,}",
            )
        if not self.content or not is_unicode(self.content):
            raise TokenizerError(
                "an added token has no text, or none that is Unicode", got=f"id {self.id}"
            )

    def to_json(self) -> dict[str, Any]:
        """As `tokenizer_config.json` and `tokenizer.json` write it, without the id."""
        return {
            "content": self.content,
            "lstrip": self.lstrip,
            "normalized": self.normalized,
            "rstrip": self.rstrip,
            "single_word": self.single_word,
            "special": self.special,
        }


class Vocabulary(Protocol):
    """One vocabulary with its added tokens.

    Attributes:
        size: ids run from 0 to size - 1 (some may be unused).
        special_ids: ids left out of decoded text.
        begins_with_space: a space is put before a text, and taken off again when decoding.
        prefix, suffix: ids that the vocabulary's own file puts around a text.
    """

    @property
    def size(self) -> int: ...
    @property
    def special_ids(self) -> Set[int]: ...
    @property
    def begins_with_space(self) -> bool: ...
    @property
    def prefix(self) -> Sequence[int]: ...
    @property
    def suffix(self) -> Sequence[int]: ...

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a text without surrogates; special tokens' text is plain text if not parsed."""

    def find(self, piece: str) -> int | None:
        """The id of a piece or added token, as it is written in the vocabulary."""

    def piece(self, token_id: int) -> str | None:
        """How a token is written in the vocabulary; None for unused ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; none for unused ids."""

    def files(self) -> Mapping[str, bytes]:
        """Files, by name, from which the same vocabulary can be read again."""


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Turn whatever a tokenising library throws into a `TokenizerError`.

    The libraries are written in C++ and Rust; their errors come as bare `Exception`s,
    `RuntimeError`s, or, when Rust code gives up, as a class derived from `BaseException`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"{doing} failed: {str(error)[:500] or type(error).__name__}",
            remedy="the tokenizer files may be broken; download them again",
        ) from error
