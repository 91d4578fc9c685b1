"""Tokenizers out of GGUF metadata: the real ERNIE one and small byte-level ones."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hard_text import hard_text
from hypothesis import given, settings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from earnest.errors import ChatUnsupportedError, TokenizerError
from earnest.tokenizer import Tokenizer
from earnest.tokenizer.byte_level import LLAMA3_PATTERN, PRE_TOKENIZERS, QWEN2_PATTERN
from earnest.tokenizer.sentencepiece_proto import PieceType, parse_model

STORIES = Path(__file__).resolve().parents[2] / "src/earnest/hub/stories/tokenizer.model"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


# --- SentencePiece kind -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ernie_metadata(shared: Path, ernie: Tokenizer) -> dict[str, Any]:
    """What a converter writes of the ERNIE tokenizer, the embedding's unused rows included."""
    model = parse_model((shared / "data/tokenizer/tokenizer.model").read_bytes(), "tokenizer.model")
    tokens, scores, types = list(model.pieces), list(model.scores), list(model.types)
    tokens += [ernie.piece(token_id) for token_id in range(len(tokens), ernie.vocab_size)]
    tokens += [f"[PAD{token_id}]" for token_id in range(ernie.vocab_size, 103_424)]
    scores += [-1000.0] * (103_424 - len(scores))
    types += [PieceType.CONTROL] * (ernie.vocab_size - len(types))
    types += [PieceType.UNUSED] * (103_424 - len(types))
    for token_id in range(ernie.vocab_size):
        if ernie.is_special(token_id) and types[token_id] == PieceType.NORMAL:
            types[token_id] = PieceType.CONTROL
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.cls_token_id": 100_273,
        "tokenizer.ggml.seperator_token_id": 100_272,
        "tokenizer.chat_template": ernie.chat_template.source if ernie.chat_template else "",
    }


@pytest.fixture(scope="module")
def ernie_gguf(ernie_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(ernie_metadata)


@settings(max_examples=300, deadline=None)
@given(text=hard_text())
def test_ernie_gguf_equals_the_folder(ernie_gguf: Tokenizer, ernie: Tokenizer, text: str) -> None:
    for parse_special in (True, False):
        ids = ernie.encode(text, parse_special=parse_special)
        assert ernie_gguf.encode(text, parse_special=parse_special) == ids
        for skip in (True, False):
            assert ernie_gguf.decode(ids, skip_special_tokens=skip) == ernie.decode(
                ids, skip_special_tokens=skip
            )


def test_ernie_gguf_names(ernie_gguf: Tokenizer, ernie: Tokenizer) -> None:
    assert ernie_gguf.vocab_size == 103_424
    assert ernie_gguf.eos_ids == ernie.eos_ids == (2, 100_272)
    assert (ernie_gguf.bos_id, ernie_gguf.unk_id, ernie_gguf.pad_id) == (1, 0, 0)
    assert ernie_gguf.special_tokens["sep_token"] == "<|end_of_sentence|>"
    assert ernie_gguf.token_bytes(103_423) == b""  # [PAD103423]
    messages = [{"role": "user", "content": "hi"}]
    assert ernie_gguf.apply_chat_template(messages) == ernie.apply_chat_template(messages)


def test_turn_markers_that_a_converter_left_ordinary(ernie_metadata: dict[str, Any]) -> None:
    """Without their ids and types, the template still says which tokens close a turn."""
    metadata = dict(ernie_metadata)
    types = list(metadata["tokenizer.ggml.token_type"])
    types[100_272] = types[100_273] = PieceType.NORMAL
    metadata["tokenizer.ggml.token_type"] = types
    del metadata["tokenizer.ggml.cls_token_id"], metadata["tokenizer.ggml.seperator_token_id"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("<|begin_of_sentence|>a<|end_of_sentence|>")[::2] == [100_273, 100_272]
    assert tokenizer.eos_ids == (2, 100_272)


def stories_metadata() -> dict[str, Any]:
    model = parse_model(STORIES.read_bytes(), "stories")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": model.pieces,
        "tokenizer.ggml.scores": np.array(model.scores, np.float32),
        "tokenizer.ggml.token_type": np.array(model.types, np.int32),
    }


@settings(max_examples=200, deadline=None)
@given(text=hard_text())
def test_stories_gguf_equals_the_folder(stories: Tokenizer, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(stories_metadata())  # all defaults, as llama.cpp has them
    ids = stories.encode(text, add_special_tokens=True)
    assert tokenizer.encode(text, add_special_tokens=True) == ids
    assert tokenizer.decode(ids) == stories.decode(ids)


def test_a_space_goes_before_each_stretch_of_text() -> None:
    tokenizer = Tokenizer.from_gguf(stories_metadata())
    ids = tokenizer.encode("Once</s>upon")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Once</s> upon"
    assert ids == [*tokenizer.encode("Once"), 2, *tokenizer.encode("upon")]


def test_user_defined_tokens_may_hold_spaces() -> None:
    metadata = stories_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "two words"]
    metadata["tokenizer.ggml.scores"] = np.array([*metadata["tokenizer.ggml.scores"], 0])
    metadata["tokenizer.ggml.token_type"] = np.array([*metadata["tokenizer.ggml.token_type"], 4])
    metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = Tokenizer.from_gguf(metadata)
    for parse_special in (True, False):
        assert tokenizer.encode("two words", parse_special=parse_special) == [512]
    assert tokenizer.decode([512]) == "two words"


# --- byte-level kind ----------------------------------------------------------------------------

EXPECTED: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs; 3.14 + 2.71 = 5.85!",
    "def f(x):\n    return x  # naïve café\n\n\tif x:\r\n        pass",
    "中文和日本語 ひらがな 한국어 العربية 🎉🎉 ½ ² e\u0301",
    string.printable,
] * 3


def trained(name: str) -> tokenizers.Tokenizer:
    """A small byte-level BPE made by the `tokenizers` library."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    library.pre_tokenizer = EXPECTED[name]()
    if name == "qwen2":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["<tool_call>", "two words"])
    return library


def metadata_of(library: tokenizers.Tokenizer, name: str) -> dict[str, Any]:

    vocabulary = library.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(library.to_str())["model"]["merges"]
    kinds = dict.fromkeys(SPECIAL, 3) | dict.fromkeys(["<tool_call>", "two words"], 4)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }


@pytest.fixture(scope="module", params=list(EXPECTED))
def pair(request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    library = trained(request.param)
    return library, Tokenizer.from_gguf(metadata_of(library, request.param))


@settings(max_examples=150, deadline=None)
@given(text=hard_text())
def test_byte_level_equals_the_library(
    pair: tuple[tokenizers.Tokenizer, Tokenizer], text: str
) -> None:
    library, tokenizer = pair
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    for skip in (True, False):
        theirs = library.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs


def test_byte_level_names(pair: tuple[tokenizers.Tokenizer, Tokenizer]) -> None:
    library, tokenizer = pair
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (0, 2))
    assert tokenizer.encode("<|im_end|><tool_call>") == [2, library.token_to_id("<tool_call>")]
    plain = tokenizer.encode("<|im_end|><tool_call>", parse_special=False)
    assert 2 not in plain and plain[-1] == library.token_to_id("<tool_call>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_known_name_builds(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata_of(trained("gpt-2"), name))
    assert tokenizer.decode(tokenizer.encode("it's 12 é")) == "it's 12 é"


def test_saved_and_read_again(pair: tuple[tokenizers.Tokenizer, Tokenizer], tmp_path: Path) -> None:
    tokenizer = pair[1]
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert_same(tokenizer, again)


def test_sentencepiece_saved_and_read_again(ernie_gguf: Tokenizer, tmp_path: Path) -> None:
    ernie_gguf.save(tmp_path)
    assert_same(ernie_gguf, Tokenizer.from_folder(tmp_path))


def test_stories_saved_and_read_again(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(stories_metadata())
    tokenizer.save(tmp_path)
    assert_same(tokenizer, Tokenizer.from_folder(tmp_path))


def assert_same(one: Tokenizer, two: Tokenizer) -> None:
    for name in ("vocab_size", "bos_id", "eos_ids", "unk_id", "pad_id", "special_tokens"):
        assert getattr(one, name) == getattr(two, name), name
    for token_id in range(one.vocab_size):
        assert one.token_bytes(token_id) == two.token_bytes(token_id), token_id
        assert one.piece(token_id) == two.piece(token_id), token_id
        assert one.is_special(token_id) == two.is_special(token_id), token_id
    for text in [*CORPUS, "<|im_start|>a<|im_end|> b</s>c<tool_call> two words"]:
        for special in (True, False):
            assert one.encode(text, parse_special=special) == two.encode(
                text, parse_special=special
            )
        assert one.encode(text, add_special_tokens=True) == two.encode(
            text, add_special_tokens=True
        )
    templates = [t.chat_template and t.chat_template.source for t in (one, two)]
    assert templates[0] == templates[1]


# --- broken files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model", "bert", "no tokenizer of a supported kind"),
        ("model", None, "no tokenizer of a supported kind"),
        ("tokens", [], "missing or not a list"),
        ("tokens", None, "missing or not a list"),
        ("tokens", "abc", "missing or not a list"),
        ("tokens", [1, 2], "not Unicode text"),
        ("tokens", ["a", "\udcff"], "not Unicode text"),
        ("token_type", [1], "does not fit the vocabulary"),
        ("token_type", [99] * 512, "no token type"),
        ("token_type", ["x"] * 512, "no token type"),
        ("scores", [0.0], "does not fit the vocabulary"),
        ("scores", ["x"] * 512, "not a number"),
        ("scores", [float("inf")] * 512, "not a finite"),
        ("add_space_prefix", 1, "not true or false"),
        ("add_bos_token", "yes", "not true or false"),
    ],
)
def test_broken_sentencepiece_metadata(key: str, value: object, problem: str) -> None:
    metadata = stories_metadata() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(TokenizerError, match=problem):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("pre", "klingon", "klingon"),
        ("pre", 7, "not supported"),
        ("merges", None, "missing or not a list"),
        ("merges", ["ab"], "merge .* is broken"),
        ("merges", ["zz zz"], "building the GGUF file's tokenizer failed"),
        ("tokens", ["a", "a"], "does not fit"),
    ],
)
def test_broken_byte_level_metadata(key: str, value: object, problem: str) -> None:
    metadata = metadata_of(trained("gpt-2"), "gpt-2") | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(TokenizerError, match=problem):
        Tokenizer.from_gguf(metadata)


def test_a_token_twice_is_refused() -> None:
    metadata = metadata_of(trained("gpt-2"), "gpt-2")
    metadata["tokenizer.ggml.tokens"][-1] = metadata["tokenizer.ggml.tokens"][300]
    with pytest.raises(TokenizerError, match="twice"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("token_id", [-1, 512, 2**32 - 1, "1", 1.0])
def test_named_ids_that_are_no_tokens_are_passed_over(
    token_id: object, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.from_gguf(stories_metadata() | {"tokenizer.ggml.eot_token_id": token_id})
    assert tokenizer.eos_ids == (2,)
    assert "eot_token_id is no token" in caplog.text


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match="chat_template is not text"):
        Tokenizer.from_gguf(stories_metadata() | {"tokenizer.chat_template": ["x"]})


def test_no_template_no_chat() -> None:
    tokenizer = Tokenizer.from_gguf(stories_metadata())
    assert tokenizer.chat_template is None
    with pytest.raises(ChatUnsupportedError, match="Base model"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
