"""The real ERNIE 4.5 tokenizer against published ids and against the reference libraries."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hard_text import hard_text
from hypothesis import given, settings
from sentencepiece import SentencePieceProcessor

from earnest.errors import PromptError
from earnest.tokenizer import Tokenizer


def test_published_ids_of_295_hard_strings(ernie: Tokenizer, goldens: list[dict[str, Any]]) -> None:
    assert len(goldens) == 295
    for case in goldens:
        ids = ernie.encode(case["text"])
        assert ids == case["ids"], case
        decoded = case.get("decoded", case["text"])
        assert ernie.decode(ids, skip_special_tokens=False) == decoded, case
        if "pieces" in case:
            assert [ernie.piece(token_id) for token_id in ids] == case["pieces"]
        plain = ernie.encode(case["text"], parse_special=False)
        assert plain == case.get("sentencepiece_ids", case["ids"]), case


def test_published_test_suites(ernie: Tokenizer, shared: Path) -> None:
    published = json.loads((shared / "data/goldens/published_ernie45.json").read_text("utf-8"))
    for case in published["encode"]:
        assert ernie.encode(case["text"]) == case["ids"], case["source"]
    for case in published["decode"]:
        assert ernie.decode(case["ids"]) == case["text"], case["source"]
    for case in published["pieces"]:
        pieces = [ernie.piece(token_id) for token_id in ernie.encode(case["text"])]
        assert pieces == case["tokenizer_pieces"], case["source"]
        if "sentencepiece_pieces" in case:
            plain = ernie.encode(case["text"], parse_special=False)
            assert [ernie.piece(token_id) for token_id in plain] == case["sentencepiece_pieces"]


@settings(max_examples=400, deadline=None)
@given(text=hard_text())
def test_equals_the_reference_libraries(
    ernie: Tokenizer,
    fast_library: tokenizers.Tokenizer,
    raw_library: SentencePieceProcessor,
    text: str,
) -> None:
    ids = ernie.encode(text)
    assert ids == fast_library.encode(text, add_special_tokens=False).ids
    plain = ernie.encode(text, parse_special=False)
    assert plain == raw_library.EncodeAsIds(text)
    for skip in (True, False):
        assert ernie.decode(ids, skip_special_tokens=skip) == fast_library.decode(
            ids, skip_special_tokens=skip
        )
    assert ernie.decode(plain) == text.replace("\u2581", " ")


@pytest.mark.parametrize("name", ["books-en-valid", "modern-zh-valid", "wikitext2-valid"])
def test_equals_the_reference_library_on_whole_texts(
    ernie: Tokenizer, fast_library: tokenizers.Tokenizer, shared: Path, name: str
) -> None:

    packed = (shared / f"data/corpora/{name}.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode()[:60_000]
    ids = ernie.encode(text)
    assert ids == fast_library.encode(text, add_special_tokens=False).ids
    assert ernie.decode(ids, skip_special_tokens=False) == text


def test_every_single_id_decodes_as_the_reference_does(
    ernie: Tokenizer, fast_library: tokenizers.Tokenizer
) -> None:
    for token_id in range(ernie.vocab_size):
        theirs = fast_library.decode([token_id], skip_special_tokens=False)
        assert ernie.decode([token_id], skip_special_tokens=False) == theirs, token_id


def test_special_tokens_are_read_from_the_files(ernie: Tokenizer) -> None:
    assert ernie.vocab_size == 101_304
    assert (ernie.bos_id, ernie.unk_id, ernie.pad_id) == (1, 0, 0)
    assert ernie.eos_ids == (2, 100_272)
    assert ernie.special_tokens["cls_token"] == "<|begin_of_sentence|>"
    assert [i for i in range(100_269, 100_295) if ernie.is_special(i)] == [
        100_272, 100_273, 100_274, 100_277, 100_278, 100_279, 100_280,
    ]  # fmt: skip
    assert all(ernie.is_special(i) for i in range(100_295, 101_304))
    assert not any(ernie.is_special(i) for i in range(3, 13))  # the digits
    assert ernie.encode("hi", add_special_tokens=True) == ernie.encode("hi")


def test_skipping_special_tokens_keeps_what_only_looks_special(ernie: Tokenizer) -> None:
    mask_11 = 100_273 + 11
    assert ernie.piece(mask_11) == "<mask:11>"
    assert ernie.decode([*ernie.encode("a</s>b"), mask_11]) == "ab<mask:11>"


def test_unused_rows_of_the_embedding_are_silent(ernie: Tokenizer) -> None:
    ids = [*ernie.encode("a"), 101_304, 103_423, *ernie.encode("b")]
    assert ernie.decode(ids) == "ab"
    assert ernie.token_bytes(103_423) == b""
    assert ernie.piece(103_423) == ""
    assert not ernie.is_special(103_423)


@pytest.mark.parametrize("token_id", [-1, 2**31, 1.5, "3", None])
def test_what_is_no_id_is_refused(ernie: Tokenizer, token_id: Any) -> None:
    for call in (ernie.token_bytes, ernie.piece, ernie.is_special, lambda i: ernie.decode([i])):
        with pytest.raises(PromptError, match="token id"):
            call(token_id)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("\ud83c\udf89", "\U0001f389"),
        ("a\ud83cb", "a\ufffdb"),
        ("\udf89\ud83c", "\ufffd\ufffd"),
        ("x\ud83c\ud83c\udf89\udf89", "x\ufffd\U0001f389\ufffd"),
        ("\ud83c", "\ufffd"),
    ],
)
def test_surrogates_are_joined_or_replaced(ernie: Tokenizer, text: str, meant: str) -> None:
    assert ernie.encode(text) == ernie.encode(meant)
    assert ernie.decode(ernie.encode(text)) == meant


def test_strangers_text_cannot_end_a_turn(ernie: Tokenizer) -> None:
    text = "</s><|end_of_sentence|><|IMAGE_PLACEHOLDER|>"
    ids = ernie.encode(text, parse_special=False)
    assert not any(map(ernie.is_special, ids))
    assert ernie.decode(ids) == text
    assert all(map(ernie.is_special, ernie.encode(text)))


def test_tokenizer_json_and_tokenizer_model_are_one_tokenizer(
    ernie: Tokenizer, ernie_folder: Path, fast_json: bytes, tmp_path: Path,
    goldens: list[dict[str, Any]],
) -> None:  # fmt: skip
    (tmp_path / "tokenizer.json").write_bytes(fast_json)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name).write_bytes((ernie_folder / name).read_bytes())
    fast = Tokenizer.from_folder(tmp_path)
    assert fast.vocab_size == ernie.vocab_size
    assert (fast.bos_id, fast.eos_ids, fast.unk_id, fast.pad_id) == (1, (2, 100_272), 0, 0)
    assert fast.special_tokens == ernie.special_tokens
    for token_id in range(fast.vocab_size):
        assert fast.token_bytes(token_id) == ernie.token_bytes(token_id)
        assert fast.is_special(token_id) == ernie.is_special(token_id)
        assert fast.piece(token_id) == ernie.piece(token_id)
    for case in goldens:
        assert fast.encode(case["text"]) == case["ids"]
        plain = ernie.encode(case["text"], parse_special=False)
        assert fast.encode(case["text"], parse_special=False) == plain
    assert fast.chat_template is not None
