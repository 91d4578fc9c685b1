"""Text comes out piece by piece without broken characters, and joins to the whole."""

from __future__ import annotations

import pytest
from hard_text import hard_text
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.tokenizer import Tokenizer


def pushed(tokenizer: Tokenizer, ids: list[int], skip: bool, continuation: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip, continuation=continuation)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 600), max_size=30), skip=st.booleans(), continuation=st.booleans()
)
def test_any_ids_join_to_the_whole(
    stories: Tokenizer, ids: list[int], skip: bool, continuation: bool
) -> None:
    pieces = pushed(stories, ids, skip, continuation)
    whole = stories.decode(ids, skip_special_tokens=skip, continuation=continuation)
    assert "".join(pieces) == whole
    data = b"".join(
        stories.token_bytes(i) for i in ids if not (skip and stories.is_special(i))
    ).decode("utf-8", "replace")
    assert whole == (data if continuation else data.removeprefix(" "))


@settings(max_examples=300, deadline=None)
@given(text=hard_text())
def test_no_piece_of_a_text_is_broken(stories: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("\u2581", " ")
    ids = stories.encode(text, parse_special=False)
    pieces = pushed(stories, ids, True, False)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(text=hard_text())
def test_no_piece_of_an_ernie_text_is_broken(ernie: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("\u2581", " ")
    pieces = pushed(ernie, ernie.encode(text), False, False)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte(ernie: Tokenizer) -> None:
    detokenizer = ernie.detokenizer()
    ids = [13 + byte for byte in "🎉".encode()]
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🎉"]
    assert detokenizer.flush() == ""


def test_what_stays_incomplete_is_marked_at_the_end(ernie: Tokenizer) -> None:
    detokenizer = ernie.detokenizer()
    assert detokenizer.push(13 + 0xE4) == ""
    assert detokenizer.push(*ernie.encode("a")) == "\ufffda"
    assert detokenizer.push(13 + 0xE4) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_shown_on_request(ernie: Tokenizer) -> None:
    ids = ernie.encode("a</s>b")
    assert "".join(pushed(ernie, ids, False, False)) == "a</s>b"
    assert "".join(pushed(ernie, ids, True, False)) == "ab"


@pytest.mark.parametrize(("continuation", "text"), [(False, "there was"), (True, " there was")])
def test_the_space_before_a_text_goes_only_where_a_text_begins(
    stories: Tokenizer, continuation: bool, text: str
) -> None:
    ids = stories.encode("there was")
    assert stories.decode(ids, continuation=continuation) == text
    assert "".join(pushed(stories, ids, True, continuation)) == text
