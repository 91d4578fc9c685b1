"""SentencePiece vocabularies (`tokenizer.model`, GGUF "llama") over the `sentencepiece` library.

The library gives ids for plain text. Added tokens are cut out of the text first, and decoding is
ours, byte by byte, because the library knows nothing of the former and decodes whole texts only.
"""

from __future__ import annotations

from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from earnest.tokenizer.added import Splitter
from earnest.tokenizer.sentencepiece_proto import SPACE, PieceType, SentencePieceModel, byte_of
from earnest.tokenizer.vocabulary import AddedToken, library_errors


class SentencePieceVocabulary:
    """A SentencePiece BPE model and its added tokens; a `Vocabulary`.

    An added token may lie beyond the pieces, name a piece that no text reaches (`<s>`), or take
    over the id of a piece.

    Raises:
        TokenizerError: the library refuses the model.
    """

    def __init__(self, model: SentencePieceModel, added: Sequence[AddedToken] = ()) -> None:
        self.model = model
        self.added = tuple(added)
        self._added_by_id = {token.id: token for token in reversed(self.added)}
        with library_errors("loading the SentencePiece model"):
            self._processor = SentencePieceProcessor(model_proto=model.serialized())
        self._find = {piece: token_id for token_id, piece in enumerate(model.pieces)}
        self._find.update((token.content, token.id) for token in reversed(self.added))
        self._all_tokens = Splitter(self.added)
        self._plain_tokens = Splitter([token for token in self.added if not token.special])
        self.size = max([len(model.pieces), *(token.id + 1 for token in self.added)])
        self.special_ids = self._special_ids()
        self.begins_with_space = model.add_dummy_prefix
        self.prefix: tuple[int, ...] = ()
        self.suffix: tuple[int, ...] = ()

    def _special_ids(self) -> frozenset[int]:
        controls = {
            token_id
            for token_id, kind in enumerate(self.model.types)
            if kind in (PieceType.CONTROL, PieceType.UNKNOWN)
        }
        for token in self._added_by_id.values():
            (controls.add if token.special else controls.discard)(token.id)
        return frozenset(controls)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """See `Vocabulary.encode`.

        Where the model has a dummy prefix, it goes before every stretch of plain text, as llama.cpp
        and the first Llama tokenizers have it; ERNIE models have none.
        """
        ids: list[int] = []
        for part in (self._all_tokens if parse_special else self._plain_tokens).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                with library_errors("tokenising"):
                    ids += self._processor.EncodeAsIds(part)
        return ids

    def find(self, piece: str) -> int | None:
        """See `Vocabulary.find`."""
        return self._find.get(piece)

    def piece(self, token_id: int) -> str | None:
        """See `Vocabulary.piece`."""
        if token := self._added_by_id.get(token_id):
            return token.content
        pieces = self.model.pieces
        return pieces[token_id] if token_id < len(pieces) else None

    def token_bytes(self, token_id: int) -> bytes:
        """See `Vocabulary.token_bytes`. U+2581 becomes a space, wherever it came from."""
        if token := self._added_by_id.get(token_id):
            return token.content.encode("utf-8")
        if token_id >= len(self.model.pieces):
            return b""
        piece, kind = self.model.pieces[token_id], self.model.types[token_id]
        if kind == PieceType.UNUSED:
            return b""
        if kind == PieceType.BYTE:
            return bytes([byte_of(piece) or 0])
        return piece.replace(SPACE, " ").encode("utf-8")

    def files(self) -> dict[str, bytes]:
        """See `Vocabulary.files`; the added tokens belong to `tokenizer_config.json`."""
        return {"tokenizer.model": self.model.serialized()}
