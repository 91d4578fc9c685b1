"""Added tokens are found in text as the `tokenizers` library finds them."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from earnest.errors import TokenizerError
from earnest.tokenizer.added import Splitter
from earnest.tokenizer.vocabulary import MAX_TOKEN_ID, AddedToken

CONTENTS = ["<a>", "<a>b", "<ab", "ab", "a b", "<|x|>", "<|x", ">", "é", "🎉"]
TEXT = st.text(alphabet="<>ab|x \n\u3000_1é\u0301🎉\u200d", max_size=24)


def library_split(tokens: list[AddedToken], text: str) -> list[str | int]:
    """What the reference makes of a text: ids of added tokens, and the text between."""
    library = tokenizers.Tokenizer(
        models.BPE(unk_token="?", vocab={"?": 0}, merges=[], fuse_unk=True)
    )
    for token in tokens:
        library.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                )
            ]
        )
    encoded = library.encode(text)
    parts: list[str | int] = []
    for token_id, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
        parts.append(token_id if token_id else text[start:stop])
    return parts


@settings(max_examples=400, deadline=None)
@given(
    contents=st.lists(st.sampled_from(CONTENTS), min_size=1, max_size=5, unique=True),
    flags=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=5, max_size=5),
    text=TEXT,
)
def test_equals_the_reference(
    contents: list[str], flags: list[tuple[bool, bool, bool]], text: str
) -> None:
    tokens = [
        AddedToken(token_id, content, single_word=single, lstrip=left, rstrip=right)
        for token_id, (content, (single, left, right)) in enumerate(
            zip(contents, flags, strict=False), start=1
        )
    ]
    assert list(Splitter(tokens).split(text)) == library_split(tokens, text)


def test_the_longest_of_several_wins_and_the_first_of_two_alike() -> None:
    splitter = Splitter([AddedToken(1, "<a>"), AddedToken(2, "<a>b"), AddedToken(3, "<a>")])
    assert list(splitter.split("x<a>bc<a>")) == ["x", 2, "c", 1]


def test_no_tokens_and_no_text() -> None:
    assert list(Splitter([]).split("<a>")) == ["<a>"]
    assert list(Splitter([AddedToken(1, "<a>")]).split("")) == []


def test_many_tokens_cost_no_more_than_few() -> None:
    splitter = Splitter([AddedToken(i, f"<{'x' * (i % 50)}{i}>") for i in range(60_000)])
    assert list(splitter.split("<" * 20_000)) == ["<" * 20_000]


@pytest.mark.parametrize(
    ("token_id", "content"), [(-1, "a"), (MAX_TOKEN_ID, "a"), (1, ""), (1, "\ud800")]
)
def test_impossible_tokens_are_refused(token_id: int, content: str) -> None:
    with pytest.raises(TokenizerError):
        AddedToken(token_id, content)
