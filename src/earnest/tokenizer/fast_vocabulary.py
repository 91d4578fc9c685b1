"""Byte-pair vocabularies over the `tokenizers` library (`tokenizer.json`, GGUF "gpt2").

The library finds added tokens and gives ids; decoding is ours, byte by byte, because an answer is
decoded while it is being written. Both ways of decoding that language models use are known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import tokenizers
from tokenizers import Tokenizer as Library

from earnest.errors import TokenizerError
from earnest.files import parse_json_object
from earnest.tokenizer import tokenizer_json
from earnest.tokenizer.byte_level import bytes_of
from earnest.tokenizer.sentencepiece_proto import SPACE, byte_of
from earnest.tokenizer.tokenizer_json import Decoding
from earnest.tokenizer.vocabulary import MAX_TOKEN_ID, AddedToken, library_errors


class FastVocabulary:
    """A BPE of the `tokenizers` library with its added tokens; a `Vocabulary`.

    Args:
        library: the library's object; belongs to this one from now on.
        decoding: how its pieces become text.
        begins_with_space: whether decoding takes a space off the start.
        added: tokens that other files add or name. One that the library lacks must get the id
            that is stated.

    Raises:
        TokenizerError: ids are absurd, or an added token cannot have its id.
    """

    def __init__(
        self,
        library: Library,
        decoding: Decoding,
        *,
        begins_with_space: bool = False,
        added: Sequence[AddedToken] = (),
    ) -> None:
        self._decoding = decoding
        self._library = library
        self.begins_with_space = begins_with_space
        with library_errors("reading the tokenizer"):
            library.no_truncation()
            library.no_padding()
            self._add(added)
            self._find = library.get_vocab(with_added_tokens=True)
            flags = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in flags.items() if token.special)
        self._pieces = {token_id: piece for piece, token_id in self._find.items()}
        self.size = max(self._pieces, default=-1) + 1
        if not 0 < self.size <= MAX_TOKEN_ID:
            raise TokenizerError(
                "a tokenizer has impossible ids",
                got=f"highest id {self.size - 1:,}",
                expected=f"0 to {MAX_TOKEN_ID - 1:,}",
            )
        self.prefix, self.suffix = self._around()

    def _add(self, added: Sequence[AddedToken]) -> None:
        present = {token.content for token in self._library.get_added_tokens_decoder().values()}
        for token in sorted(added, key=lambda token: token.id):
            if token.content in present:
                continue
            self._library.add_tokens([_library_token(token)])
            got = self._library.token_to_id(token.content)
            if got != token.id:
                raise TokenizerError(
                    f"added token {token.content[:40]!r} does not fit into the vocabulary",
                    got=f"id {token.id}",
                    expected=f"id {got}",
                )

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the library's own post-processor puts before and after a text."""
        with library_errors("reading the tokenizer's post-processor"):
            bare = self._library.encode("a", add_special_tokens=False).ids
            full = self._library.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        raise TokenizerError("the tokenizer's post-processor does not keep the text")

    @cached_property
    def _untrusting(self) -> Library:
        """The same, but special tokens' text is plain text."""
        with library_errors("copying the tokenizer"):
            copy = Library.from_str(self._library.to_str())
            copy.encode_special_tokens = True
        return copy

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """See `Vocabulary.encode`."""
        library = self._library if parse_special else self._untrusting
        with library_errors("tokenising"):
            ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def find(self, piece: str) -> int | None:
        """See `Vocabulary.find`."""
        return self._find.get(piece)

    def piece(self, token_id: int) -> str | None:
        """See `Vocabulary.piece`."""
        return self._pieces.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Vocabulary.token_bytes`."""
        piece = self._pieces.get(token_id)
        if piece is None:
            return b""
        if self._decoding is Decoding.BYTE_LEVEL:
            return bytes_of(piece)
        byte = byte_of(piece)
        return piece.replace(SPACE, " ").encode("utf-8") if byte is None else bytes([byte])

    def files(self) -> dict[str, bytes]:
        """See `Vocabulary.files`."""
        with library_errors("writing the tokenizer"):
            return {"tokenizer.json": self._library.to_str(pretty=False).encode("utf-8")}


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def read_tokenizer_json(
    data: bytes, origin: str, added: Sequence[AddedToken] = (), specials: Iterable[str] = ()
) -> FastVocabulary:
    """The vocabulary in the bytes of a `tokenizer.json`.

    Args:
        data: the file.
        origin: what to call it in errors.
        added: tokens that other files give ids to.
        specials: text of tokens that other files call special; those in the vocabulary are found
            in text too.

    Raises:
        FormatError: not JSON.
        TokenizerError: broken, or something in it is not supported.
    """
    raw = parse_json_object(data, origin)
    decoding, begins_with_space = tokenizer_json.check(raw, origin)
    del raw
    with library_errors(f"reading {origin}"):
        library = Library.from_str(data.decode("utf-8"))
        stated = {token.content for token in added}
        found = [
            AddedToken(token_id, content)
            for content in sorted(set(specials) - stated)
            if (token_id := library.token_to_id(content)) is not None
        ]
    added = (*added, *found)
    return FastVocabulary(library, decoding, begins_with_space=begins_with_space, added=added)
