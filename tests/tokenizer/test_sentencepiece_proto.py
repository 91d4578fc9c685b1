"""Reading and writing SentencePiece models; broken ones never reach the C++ library."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from earnest.errors import TokenizerError
from earnest.tokenizer.sentencepiece_proto import (
    MAX_PIECE_BYTES,
    PieceType,
    SentencePieceModel,
    byte_of,
    parse_model,
)

STORIES = Path(__file__).resolve().parents[2] / "src/earnest/hub/stories/tokenizer.model"
SMALL = SentencePieceModel(
    ["<unk>", "<s>", "</s>", "a", "b", "ab", "7"],
    [0.0, 0.0, 0.0, -2.0, -3.0, -1.0, 0.0],
    [2, 3, 3, 1, 1, 1, 4],
)


def test_the_real_model_is_read_as_the_library_reads_it(
    shared: Path, raw_library: SentencePieceProcessor
) -> None:
    data = (shared / "data/tokenizer/tokenizer.model").read_bytes()
    model = parse_model(data, "tokenizer.model")
    assert len(model.pieces) == raw_library.GetPieceSize() == 100_295
    assert not model.add_dummy_prefix and not model.remove_extra_whitespaces
    assert model.byte_fallback and model.unk_id == 0
    for token_id in range(0, 100_295, 7):
        assert model.pieces[token_id] == raw_library.IdToPiece(token_id)
        assert model.scores[token_id] == raw_library.GetScore(token_id)
        kind = model.types[token_id]
        assert (kind == PieceType.BYTE) == raw_library.IsByte(token_id)
        assert (kind == PieceType.CONTROL) == raw_library.IsControl(token_id)


def test_written_and_read_again() -> None:
    for model in (
        SMALL,
        replace(SMALL, add_dummy_prefix=False, remove_extra_whitespaces=True, eos_piece="b"),
        parse_model(STORIES.read_bytes(), "stories"),
    ):
        assert parse_model(model.serialized(), "again") == model


def test_the_library_reads_what_is_written() -> None:
    library = SentencePieceProcessor(
        model_proto=replace(SMALL, add_dummy_prefix=False).serialized()
    )
    assert library.EncodeAsIds("ab7ba") == [5, 6, 4, 3]
    assert (library.bos_id(), library.eos_id(), library.unk_id()) == (1, 2, 0)


@pytest.mark.parametrize(
    ("piece", "byte"),
    [("<0x00>", 0), ("<0xFF>", 255), ("<0xff>", None), ("<0x0>", None), ("<0x+1>", None)],
)
def test_byte_pieces(piece: str, byte: int | None) -> None:
    assert byte_of(piece) == byte


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pieces": ["<unk>", "<s>", "</s>", "a", "a", "ab", "7"]}, "occurs twice"),
        ({"pieces": ["<unk>", "<s>", "</s>", "a", "", "ab", "7"]}, "is empty"),
        ({"pieces": ["<unk>", "<s>", "</s>", "a", "\0", "ab", "7"]}, "NUL"),
        ({"pieces": ["<unk>", "<s>", "</s>", "x" * (MAX_PIECE_BYTES + 1), *"bcd"]}, "longer"),
        ({"types": [1, 3, 3, 1, 1, 1, 4]}, "exactly one unknown"),
        ({"types": [2, 2, 3, 1, 1, 1, 4]}, "exactly one unknown"),
        ({"types": [2, 3, 3, 1, 1, 1, 9]}, "unknown type"),
        ({"types": [2, 3, 3, 1, 1, 6, 4]}, "not of the form <0xAB>"),
        ({"scores": [0.0] * 6}, "as many pieces"),
        ({"scores": [0.0] * 6 + [float("nan")]}, "not a finite"),
        ({"scores": [0.0] * 6 + [1e39]}, "not a finite"),
        ({"byte_fallback": True}, "256 byte pieces"),
        ({"pieces": [], "scores": [], "types": []}, "impossible size"),
    ],
)  # fmt: skip
def test_impossible_vocabularies_are_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        replace(SMALL, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "it has no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "is not a SentencePiece model"),
        (b"\x0a" + b"\xff" * 20, "too long"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x08\x01", "a number where bytes belong"),
        (SMALL.serialized()[:-3], "cut off"),
        (SMALL.serialized() + b"\x12\x02\x18\x01", "unigram"),
        (SMALL.serialized() + b"\x1a\x05\x12\x03abc", "a normalisation table"),
        (SMALL.serialized() + b"\x1a\x02\x28\x00", "unescaped whitespace"),
        (SMALL.serialized() + b"\x12\x03\xc0\x01\x01", "spaces as suffixes"),
    ],
)
def test_broken_and_unsupported_files_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        parse_model(data, "x.model")


def test_unknown_fields_are_passed_over() -> None:
    extra = b"\xa2\x06\x03abc" + b"\xa8\x06\x07" + b"\xad\x06abcd" + b"\xb1\x06abcdefgh"
    assert parse_model(SMALL.serialized() + extra, "x.model") == SMALL


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(TokenizerError):
        parse_model(data, "x.model")


HOSTILE = r"""
import random, sys
from earnest.errors import TokenizerError
from earnest.tokenizer.sentencepiece_proto import SentencePieceModel, parse_model
from earnest.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from earnest.tokenizer.sources import added_tokens

base = open(sys.argv[1], "rb").read()
letters = "ab \u2581<>0xF\U0001f389\u00e9\n\x01\ufffd\u0301"

def damaged(rng):
    data = bytearray(base)
    at = rng.randrange(len(data))
    change = rng.randrange(3)
    if change == 0:
        data[at] = rng.randrange(256)
    elif change == 1:
        del data[at : at + rng.randint(1, 20)]
    else:
        data[at:at] = data[at : at + rng.randint(1, 40)]
    return parse_model(bytes(data), "damaged")

def odd(rng):
    pieces = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 40))}
    pieces = ["<unk>", *sorted(pieces - {"<unk>"})]
    types = [2, *rng.choices([1, 1, 1, 3, 4, 5, 5], k=len(pieces) - 1)]
    scores = [rng.choice([0.0, -1.0, 3e38, -3e38, -rng.random()]) for _ in pieces]
    return SentencePieceModel(
        pieces, scores, types, False, rng.random() < 0.5, rng.random() < 0.3
    )

loaded = 0
for seed in range(int(sys.argv[2])):
    rng = random.Random(seed)
    try:
        model = (damaged if seed % 2 else odd)(rng)
        vocabulary = SentencePieceVocabulary(model, added_tokens(model, [], []))
    except TokenizerError:
        continue
    loaded += 1
    random_text = "".join(rng.choices(letters, k=40))
    for text in ("Once upon a time</s> 12", random_text, rng.choice(letters) * 2000):
        for parse_special in (True, False):
            ids = vocabulary.encode(text, parse_special=parse_special)
            b"".join(map(vocabulary.token_bytes, ids)).decode("utf-8", "replace")
print(loaded)
"""


def test_damaged_and_odd_models_do_not_crash_the_process() -> None:
    """In a process of its own: a crash of the C++ library would take the tests along."""
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(STORIES), "1200"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 600  # enough gets through for this to test something


def test_a_chain_of_unused_pieces_does_not_exhaust_the_stack() -> None:
    length = 600
    model = SentencePieceModel(
        ["<unk>", *("a" * n for n in range(1, length + 1))],
        [0.0, *(float(n) for n in range(length))],
        [2, 1] + [5] * (length - 1),
        add_dummy_prefix=False,
    )
    library = SentencePieceProcessor(model_proto=model.serialized())
    ids = library.EncodeAsIds("a" * length)
    assert ids and all(0 <= token_id < len(model.pieces) for token_id in ids)
