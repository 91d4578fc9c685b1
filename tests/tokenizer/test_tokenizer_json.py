"""`tokenizer.json`: what is supported gives the library's ids, what is not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hard_text import hard_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from earnest.errors import EarnestError, FormatError, TokenizerError
from earnest.tokenizer import Tokenizer
from earnest.tokenizer.fast_vocabulary import read_tokenizer_json

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *BYTES,
    "\u2581",
    "a",
    "b",
    "ab",
    "\u2581a",
    "\u2581ab",
    "é",
    "中",
]
SPACE_A = PIECES.index("\u2581a")
MERGES = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab")]


def llama_like() -> tokenizers.Tokenizer:
    """A small tokenizer of the Llama kind: dummy prefix, byte fallback, begin token."""
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: token_id for token_id, piece in enumerate(PIECES)},
            merges=MERGES,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([tokenizers.AddedToken("<tool>", normalized=False), "<call>", "é中"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return library


LLAMA = llama_like()
VOCABULARY = read_tokenizer_json(LLAMA.to_str().encode(), "tokenizer.json")


def in_folder(folder: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    (folder / "tokenizer.json").write_text(LLAMA.to_str(), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return in_folder(tmp_path_factory.mktemp("llama"))


@settings(max_examples=300, deadline=None)
@given(text=hard_text())
def test_equals_the_library(llama: Tokenizer, text: str) -> None:
    ids = llama.encode(text)
    assert ids == LLAMA.encode(text, add_special_tokens=False).ids
    full = llama.encode(text, add_special_tokens=True)
    assert full == LLAMA.encode(text, add_special_tokens=True).ids
    for skip in (True, False):
        theirs = LLAMA.decode(ids, skip_special_tokens=skip)
        assert llama.decode(ids, skip_special_tokens=skip) == theirs


def test_special_text_as_plain_text() -> None:
    plain = VOCABULARY.encode("</s><tool>", parse_special=False)
    assert 2 not in plain and plain[-1] == LLAMA.token_to_id("<tool>")
    assert VOCABULARY.encode("</s><tool>", parse_special=True)[0] == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1, SPACE_A, 2]),  # the file's own post-processor
        ({"add_bos_token": True}, [1, SPACE_A]),
        ({"add_bos_token": False}, [SPACE_A]),
        ({"add_eos_token": True}, [SPACE_A, 2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, SPACE_A, 2]),
    ],
)
def test_who_decides_about_begin_and_end(
    tmp_path: Path, config: dict[str, Any], expected: list[int]
) -> None:
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    tokenizer = in_folder(tmp_path, names | config)
    expected = [
        LLAMA.encode("a", add_special_tokens=False).ids[0] if i == SPACE_A else i for i in expected
    ]
    assert tokenizer.encode("a", add_special_tokens=True) == expected
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)


def test_tokens_that_only_the_configuration_adds(tmp_path: Path) -> None:
    size = LLAMA.get_vocab_size()
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": added, "extra_special_tokens": ["ab"]}
    tokenizer = in_folder(tmp_path, config)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("<|im_end|>") == [size]
    assert tokenizer.is_special(PIECES.index("ab"))  # a piece the configuration calls special
    assert tokenizer.encode("ab") == [PIECES.index("ab")]


def test_an_added_token_must_get_its_id(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not fit into the vocabulary"):
        in_folder(tmp_path, {"added_tokens_decoder": {"900": {"content": "<new>"}}})


def test_truncation_and_padding_in_the_file_do_nothing(tmp_path: Path) -> None:
    library = llama_like()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    ids = Tokenizer.from_folder(tmp_path).encode("abababab")
    assert ids == LLAMA.encode("abababab", add_special_tokens=False).ids


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": None}, "a model that is not supported"),
        ({"model": 5}, "a model that is not supported"),
        ({"model": {"type": "WordLevel"}}, "WordLevel"),
        ({"model": {"type": "BPE", "dropout": 0.5}}, "model.dropout"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "model.end_of_word_suffix"),
        ({"decoder": None}, "a decoder that is not supported"),
        ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "Fuse"),
        ({"normalizer": GROWING}, "a normalizer that is not supported"),
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 40}}, "at most 16 steps"),
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWING]}}, "a normalizer that"),
        ({"normalizer": {"type": "Sequence"}}, "a normalizer that"),
        ({"normalizer": []}, "a JSON object"),
        ({"pre_tokenizer": REGEX}, r"\(a\+\)\+"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "BertPreTokenizer"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [1] * 99}}, "short"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "reading .* failed"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [["a", "z"]]}}, "reading .* fail"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, "added_tokens": []}, "id"),
        ({"added_tokens": 7}, "reading .* failed"),
        ({"added_tokens": [{"id": 3, "content": "x"}]}, "reading .* failed"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(changes: dict[str, Any], problem: str) -> None:
    raw = json.loads(LLAMA.to_str()) | changes
    with pytest.raises(TokenizerError, match=problem):
        read_tokenizer_json(json.dumps(raw).encode(), "tokenizer.json")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"a":' * 5000, b"{}"])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises((FormatError, TokenizerError)):
        read_tokenizer_json(data, "tokenizer.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**33) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    raw = json.loads(LLAMA.to_str())
    target: Any = raw
    for _ in range(data.draw(st.integers(0, 3))):
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))[:8]
        deeper = [key for key in keys if isinstance(target[key], dict | list) and target[key]]
        if not deeper:
            break
        target = target[data.draw(st.sampled_from(deeper))]
    key = data.draw(st.sampled_from(list(target) if isinstance(target, dict) else [0]))
    target[key] = data.draw(JSON)
    try:
        vocabulary = read_tokenizer_json(json.dumps(raw).encode(), "tokenizer.json")
        ids = vocabulary.encode("ab a</s> é\x00", parse_special=True)
        b"".join(map(vocabulary.token_bytes, ids))
    except EarnestError:
        pass


def test_byte_level_decoding_of_added_tokens_in_other_characters() -> None:
    library = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "\u0120": 1}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(["日 本", "<x>"])
    vocabulary = read_tokenizer_json(library.to_str().encode(), "tokenizer.json")
    for token_id in range(4):
        assert vocabulary.token_bytes(token_id).decode() == library.decode([token_id])
