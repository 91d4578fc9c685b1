"""Tokenizers written into GGUF metadata and read back: the same ids, whatever file they came in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hard_text import hard_text
from hypothesis import given, settings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from earnest.errors import TokenizerError
from earnest.tokenizer import Tokenizer
from earnest.tokenizer.byte_level import LLAMA3_PATTERN, QWEN2_PATTERN
from earnest.tokenizer.gguf_write import corrected
from earnest.tokenizer.sentencepiece_proto import PieceType

ROWS = 103_424
TEXT = (
    "the quick brown fox jumps over the lazy dog " * 3 + "0123 wörter 文心 naïve it's I'll\n\n  x"
)


def assert_same(a: Tokenizer, b: Tokenizer, text: str) -> None:
    for parse_special in (True, False):
        ids = a.encode(text, parse_special=parse_special)
        assert b.encode(text, parse_special=parse_special) == ids
        for skip in (True, False):
            assert b.decode(ids, skip_special_tokens=skip) == a.decode(
                ids, skip_special_tokens=skip
            )
    assert b.encode(text, add_special_tokens=True) == a.encode(text, add_special_tokens=True)


# --- SentencePiece ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ernie_written(ernie: Tokenizer) -> dict[str, Any]:
    return ernie.to_gguf(ROWS)


@pytest.fixture(scope="module")
def ernie_back(ernie_written: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(ernie_written)


@settings(max_examples=300, deadline=None)
@given(text=hard_text())
def test_ernie_gives_the_same_ids(ernie: Tokenizer, ernie_back: Tokenizer, text: str) -> None:
    assert_same(ernie, ernie_back, text)


def test_ernie_specials_are_control_tokens(
    ernie: Tokenizer, ernie_written: dict[str, Any], ernie_back: Tokenizer
) -> None:
    types = ernie_written["tokenizer.ggml.token_type"]
    for token_id in range(ernie.vocab_size):
        assert ernie_back.piece(token_id) == ernie.piece(token_id)
        assert ernie_back.is_special(token_id) == ernie.is_special(token_id)
        assert (types[token_id] in (PieceType.CONTROL, PieceType.UNKNOWN)) == ernie.is_special(
            token_id
        )
    # Turn markers that tokenizer.model itself calls ordinary pieces; <mask:2> is one.
    assert {int(types[i]) for i in (100272, 100273, 100274, 100277)} == {PieceType.CONTROL}
    assert types[100275] == PieceType.NORMAL
    assert (types[3:13] == PieceType.USER_DEFINED).all()
    assert (types[13:269] == PieceType.BYTE).all()


def test_ernie_vocabulary_is_filled_up_to_the_embedding(
    ernie: Tokenizer, ernie_written: dict[str, Any], ernie_back: Tokenizer
) -> None:
    tokens = ernie_written["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == ROWS == ernie_back.vocab_size
    unused = range(ernie.vocab_size, ROWS)
    assert [tokens[i] for i in unused] == [f"[PAD{i}]" for i in unused]
    assert (ernie_written["tokenizer.ggml.token_type"][unused.start :] == PieceType.UNUSED).all()
    assert ernie_back.decode(unused) == ""
    assert max(ernie_back.encode(" ".join(tokens[i] for i in unused[:50]))) < ernie.vocab_size


def test_ernie_names_and_template(
    ernie: Tokenizer, ernie_written: dict[str, Any], ernie_back: Tokenizer
) -> None:
    wanted = {"bos": 1, "eos": 2, "eot": 100272, "unknown": 0, "padding": 0, "cls": 100273}
    for name, token_id in wanted.items():
        assert ernie_written[f"tokenizer.ggml.{name}_token_id"] == token_id
    assert ernie_back.eos_ids == ernie.eos_ids == (2, 100272)
    messages = [{"role": "user", "content": "Hello <s> there"}]
    assert ernie_back.apply_chat_template(messages) == ernie.apply_chat_template(messages)


@pytest.fixture(scope="module", params=["alone", "beside tokenizer.model"])
def fast_ernie(
    request: pytest.FixtureRequest,
    ernie_folder: Path,
    fast_json: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """The tokenizer.json form: scores come from tokenizer.model, or from the order of merges."""
    folder = tmp_path_factory.mktemp("fast")
    shutil.copytree(ernie_folder, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_bytes(fast_json)
    if request.param == "alone":
        (folder / "tokenizer.model").unlink()
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def fast_written(fast_ernie: Tokenizer) -> dict[str, Any]:
    return fast_ernie.to_gguf(ROWS)


@pytest.fixture(scope="module")
def fast_back(fast_written: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(fast_written)


@settings(max_examples=200, deadline=None)
@given(text=hard_text().filter(lambda text: "\u2581" not in text))
def test_fast_ernie_gives_the_same_ids(
    fast_ernie: Tokenizer, fast_back: Tokenizer, text: str
) -> None:
    assert_same(fast_ernie, fast_back, text)


def test_fast_ernie_is_written_as_sentencepiece(
    fast_written: dict[str, Any], ernie_written: dict[str, Any]
) -> None:
    for key in ("model", "tokens", "add_space_prefix", "bos_token_id", "eot_token_id"):
        assert fast_written[f"tokenizer.ggml.{key}"] == ernie_written[f"tokenizer.ggml.{key}"]
    ours, theirs = (m["tokenizer.ggml.token_type"] for m in (fast_written, ernie_written))
    assert np.array_equal(ours, theirs)


@settings(max_examples=100, deadline=None)
@given(text=hard_text())
def test_a_space_before_every_text(stories: Tokenizer, text: str) -> None:
    written = stories.to_gguf()
    assert written["tokenizer.ggml.add_space_prefix"] is True
    assert_same(stories, Tokenizer.from_gguf(written), text)


def test_more_tokens_than_rows_are_refused(stories: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="more tokens than the embedding"):
        stories.to_gguf(stories.vocab_size - 1)


# --- byte level ---------------------------------------------------------------------------------


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: split(LLAMA3_PATTERN),
    "qwen2": lambda: split(QWEN2_PATTERN),
}


def byte_level_folder(folder: Path, pre: str) -> Path:
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = BYTE_LEVEL[pre]()
    library.normalizer = normalizers.NFC() if pre == "qwen2" else None
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    library.train_from_iterator([TEXT] * 3, trainer)
    library.add_tokens([tokenizers.AddedToken("<tool>", special=False, normalized=False)])
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_vocabularies(pre: str, tmp_path: Path) -> None:
    source = Tokenizer.from_folder(byte_level_folder(tmp_path, pre))
    written = source.to_gguf(source.vocab_size + 9)
    assert written["tokenizer.ggml.model"] == "gpt2"
    assert written["tokenizer.ggml.pre"] == pre
    back = Tokenizer.from_gguf(written)
    assert back.vocab_size == source.vocab_size + 9
    for token_id in range(source.vocab_size):
        assert back.piece(token_id) == source.piece(token_id)
        assert back.is_special(token_id) == source.is_special(token_id)
    assert (back.bos_id, back.eos_ids, back.pad_id) == (source.bos_id, source.eos_ids, 2)

    @settings(max_examples=60, deadline=None)
    @given(text=hard_text())
    def check(text: str) -> None:
        assert_same(source, back, text + "<tool>" + text + "<|im_end|>")

    check()


def test_unknown_ways_of_splitting_are_refused(tmp_path: Path) -> None:
    path = byte_level_folder(tmp_path, "gpt-2") / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="no name for"):
        Tokenizer.from_folder(tmp_path).to_gguf()


# --- merges that scores cannot say ----------------------------------------------------------------


def fallback_folder(folder: Path, merges: list[tuple[str, str]]) -> Path:
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "abc",
    ]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_complete_merges_become_scores(tmp_path: Path) -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    source = Tokenizer.from_folder(fallback_folder(tmp_path, merges))
    back = Tokenizer.from_gguf(source.to_gguf())
    for text in ("abc", "ab c", "aabcc bc", "abab", "xaé"):
        assert back.encode(text) == source.encode(text)


@pytest.mark.parametrize(
    "merges",
    [
        [("b", "c"), ("a", "b"), ("ab", "c")],  # a + bc is missing, and scores would allow it
        [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],  # abc at two places
    ],
)
def test_other_merges_are_refused(merges: list[tuple[str, str]], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="order of this tokenizer's merges"):
        Tokenizer.from_folder(fallback_folder(tmp_path, merges)).to_gguf()


# --- metadata of another file -------------------------------------------------------------------


def test_ordinary_turn_markers_are_corrected(ernie_written: dict[str, Any]) -> None:
    """As a converter writes them that copies the types of tokenizer.model."""
    types = ernie_written["tokenizer.ggml.token_type"].copy()
    types[[100272, 100273]] = PieceType.NORMAL
    naive = {**ernie_written, "tokenizer.ggml.token_type": types.tolist()}
    reader = Tokenizer.from_gguf(naive)
    special = [i for i in range(reader.vocab_size) if reader.is_special(i)]
    mended = corrected(naive, special)
    assert np.array_equal(
        mended["tokenizer.ggml.token_type"], ernie_written["tokenizer.ggml.token_type"]
    )
    assert {k: v for k, v in mended.items() if "token_type" not in k} == {
        k: v for k, v in naive.items() if "token_type" not in k
    }
    assert corrected({"general.name": "x"}, [1]) == {"general.name": "x"}
