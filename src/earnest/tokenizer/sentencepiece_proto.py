"""`tokenizer.model` files: the few protobuf fields of a SentencePiece BPE model that matter.

The library that tokenises is written in C++ and trusts its input, so a file is first read here,
checked, and handed over as a model written anew from what was understood (`SentencePieceModel.
serialized`): unknown fields, self-tests and compiled normalisation tables never reach it. The same
writer turns the vocabulary of a GGUF file into a SentencePiece model.

Field numbers are those of `sentencepiece_model.proto` (google/sentencepiece).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from earnest.errors import TokenizerError
from earnest.tokenizer.vocabulary import is_unicode

MAX_MODEL_BYTES = 64 * 2**20
MAX_PIECES = 2**21
# The library splits unused pieces recursively, at most once per byte: this bounds its stack.
MAX_PIECE_BYTES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BPE = 2
_FLOAT32_MAX = 3.4e38
SPACE = "\u2581"
"""The visible stand-in for a space in SentencePiece vocabularies."""


class PieceType(IntEnum):
    """What a vocabulary entry is; GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece BPE vocabulary with the switches that change what it does.

    Attributes:
        pieces: text of every entry, spaces written as U+2581; the index is the token id.
        scores: of every entry; of two possible merges the one with the higher score goes first.
        types: of every entry, `PieceType`.
        byte_fallback: characters outside the vocabulary become their UTF-8 bytes.
        add_dummy_prefix: a space is put before every text.
        remove_extra_whitespaces: runs of spaces shrink to one, outer ones go.
        bos_piece, eos_piece: which pieces begin and end a text, if they exist.

    Raises:
        TokenizerError: something that the library could not work with.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"

    def __post_init__(self) -> None:
        pieces, types = self.pieces, self.types
        if not (len(pieces) == len(self.scores) == len(types)):
            raise TokenizerError(
                "a SentencePiece vocabulary has as many pieces as scores and types",
                got=f"{len(pieces)} pieces, {len(self.scores)} scores, {len(types)} types",
            )
        if not 0 < len(pieces) <= MAX_PIECES:
            raise TokenizerError(
                "a SentencePiece vocabulary has an impossible size",
                got=f"{len(pieces):,} pieces",
                expected=f"1 to {MAX_PIECES:,}",
            )
        if not all(abs(score) < _FLOAT32_MAX for score in self.scores):
            raise TokenizerError("a SentencePiece score is not a finite 32-bit number")
        if bad := set(types) - set(PieceType):
            raise TokenizerError("a SentencePiece piece has an unknown type", got=sorted(bad))
        unknown = types.count(PieceType.UNKNOWN)
        if unknown != 1:
            raise TokenizerError(
                "a SentencePiece vocabulary has exactly one unknown piece", got=unknown
            )
        seen: set[str] = set()
        for token_id, piece in enumerate(pieces):
            _check_piece(token_id, piece, types[token_id], seen)
        if self.byte_fallback and types.count(PieceType.BYTE) != 256:
            raise TokenizerError(
                "byte fallback needs 256 byte pieces", got=types.count(PieceType.BYTE)
            )

    @property
    def unk_id(self) -> int:
        """The id of the unknown piece."""
        return self.types.index(PieceType.UNKNOWN)

    def serialized(self) -> bytes:
        """The model as a protobuf that the `sentencepiece` library loads."""
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            text = piece.encode("utf-8")
            body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
            if kind != PieceType.NORMAL:
                body += b"\x18" + _varint(kind)
            out += b"\x0a" + _varint(len(body)) + body
        unk = self.unk_id
        trainer = (
            _number(3, _BPE)
            + _number(4, len(self.pieces))
            + _number(35, self.byte_fallback)
            + _number(40, unk)
            + _text(45, self.pieces[unk])
            + _text(46, self.bos_piece)
            + _text(47, self.eos_piece)
        )
        normalizer = (
            _text(1, "identity")
            + _number(3, self.add_dummy_prefix)
            + _number(4, self.remove_extra_whitespaces)
            + _number(5, True)
        )
        out += b"\x12" + _varint(len(trainer)) + trainer
        out += b"\x1a" + _varint(len(normalizer)) + normalizer
        return bytes(out)


def _check_piece(token_id: int, piece: str, kind: int, seen: set[str]) -> None:
    problem = None
    if not piece:
        problem = "is empty"
    elif not is_unicode(piece):
        problem = "is not Unicode text"
    elif len(piece.encode("utf-8")) > MAX_PIECE_BYTES:
        problem = f"is longer than {MAX_PIECE_BYTES} bytes"
    elif "\0" in piece:
        problem = "holds a NUL character"
    elif piece in seen:
        problem = "occurs twice"
    elif kind == PieceType.BYTE and byte_of(piece) is None:
        problem = "is a byte piece but not of the form <0xAB>"
    if problem:
        shown = piece if len(piece) <= 40 else piece[:40] + "..."
        raise TokenizerError(f"SentencePiece piece {token_id} {problem}", got=repr(shown))
    seen.add(piece)


def byte_of(piece: str) -> int | None:
    """The byte that a piece `<0xAB>` stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        digits = piece[3:5]
        if all(c in "0123456789ABCDEF" for c in digits):
            return int(digits, 16)
    return None


# --- reading ------------------------------------------------------------------------------------


def parse_model(data: bytes, origin: str) -> SentencePieceModel:
    """The model in the bytes of a `tokenizer.model` file.

    Raises:
        TokenizerError: not a SentencePiece protobuf, broken, or of a kind that is not supported
            (not BPE, or with a normalisation table).
    """
    try:
        return _parse(memoryview(data), origin)
    except _MalformedError as error:
        raise TokenizerError(
            f"{origin} is not a SentencePiece model: {error}",
            remedy="download the file again; it may be cut off or a large-file pointer",
        ) from error


class _MalformedError(Exception):
    """The bytes are not the protobuf they should be."""


def _parse(data: memoryview, origin: str) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | memoryview] = {}
    normalizer: dict[int, int | memoryview] = {}
    for field, value in _fields(data):
        if field == 1:
            if len(pieces) >= MAX_PIECES:
                raise _MalformedError(f"more than {MAX_PIECES:,} pieces")
            piece, score, kind = _piece(_message(value))
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
        elif field == 2:
            trainer.update(_fields(_message(value)))
        elif field == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise _MalformedError("it has no pieces")
    _refuse_unsupported(trainer, normalizer, origin)
    return SentencePieceModel(
        pieces,
        scores,
        types,
        byte_fallback=_flag(trainer, 35, default=False),
        add_dummy_prefix=_flag(normalizer, 3, default=True),
        remove_extra_whitespaces=_flag(normalizer, 4, default=True),
        bos_piece=_string(trainer.get(46, memoryview(b"<s>"))),
        eos_piece=_string(trainer.get(47, memoryview(b"</s>"))),
    )


def _refuse_unsupported(
    trainer: dict[int, int | memoryview], normalizer: dict[int, int | memoryview], origin: str
) -> None:
    kind = trainer.get(3, 1)
    if kind != _BPE:
        name = _MODEL_TYPES.get(kind, "unknown") if isinstance(kind, int) else "unknown"
        raise TokenizerError(
            f"{origin} is a SentencePiece model of a kind that is not supported",
            got=name,
            expected="bpe, as ERNIE 4.5 and Llama have",
        )
    problems = {
        "a normalisation table": bool(_message(normalizer.get(2, memoryview(b"")))),
        "unescaped whitespace": not _flag(normalizer, 5, default=True),
        "spaces as suffixes": _flag(trainer, 24, default=False),
    }
    if found := [name for name, present in problems.items() if present]:
        raise TokenizerError(
            f"{origin} uses {' and '.join(found)}, which is not supported",
            expected="identity normalisation, as ERNIE 4.5 and Llama have",
        )


def _piece(data: memoryview) -> tuple[str, float, int]:
    piece, score, kind = "", 0.0, int(PieceType.NORMAL)
    for field, value in _fields(data):
        if field == 1:
            piece = _string(value)
        elif field == 2:
            raw = _message(value)
            if len(raw) != 4:
                raise _MalformedError("a score is not a float")
            (score,) = struct.unpack("<f", raw)
        elif field == 3:
            if not isinstance(value, int):
                raise _MalformedError("a piece type is not a number")
            kind = value
    return piece, score, kind


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message: an int for varints, bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _read_varint(data, at)
        field, wire = key >> 3, key & 7
        if field == 0:
            raise _MalformedError("field number 0")
        if wire == _VARINT:
            number, at = _read_varint(data, at)
            yield field, number
            continue
        if wire == _BYTES:
            size, at = _read_varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _MalformedError(f"wire type {wire}")
        if size > end - at:
            raise _MalformedError("it is cut off")
        yield field, data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _MalformedError("it is cut off" if shift < 70 else "a number is too long")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _MalformedError("a number where bytes belong")
    return value


def _string(value: int | memoryview) -> str:
    try:
        return str(_message(value), "utf-8")
    except UnicodeDecodeError as error:
        raise _MalformedError("text is not UTF-8") from error


def _flag(fields: dict[int, int | memoryview], number: int, *, default: bool) -> bool:
    value = fields.get(number, int(default))
    if not isinstance(value, int):
        raise _MalformedError("bytes where a switch belongs")
    return bool(value)


# --- writing ------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(int(value))


def _text(field: int, value: str) -> bytes:
    data = value.encode("utf-8")
    return _varint(field << 3 | _BYTES) + _varint(len(data)) + data
