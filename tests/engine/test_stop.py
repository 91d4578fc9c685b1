"""Stop strings against a plain search in the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fake_runner import PIECES, FakeDetokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from earnest.engine.stop import StopMatcher, TextStream

texts = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def plain(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, the longest of several; a stop string
    must end after `armed_from` characters."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted({min(place, len(text)) for place in places}), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=400)
@given(text=texts, stops=stop_lists, places=st.lists(st.integers(0, 30)))
@example(text="aabab", stops=["abab"], places=[3])
@example(text="abcd", stops=["bc", "abcd"], places=[1])
def test_same_text_as_the_plain_search(text: str, stops: list[str], places: list[int]) -> None:
    matcher, shown = StopMatcher(stops), ""
    for piece in cut(text, places):
        fresh = matcher.push(piece)
        shown += fresh
        if matcher.stopped:
            break
    shown += matcher.flush()
    assert (shown, matcher.stopped) == plain(text, stops)
    assert matcher.found is None or (matcher.found in stops and shown + matcher.found in text)


@settings(max_examples=300)
@given(text=texts, stops=stop_lists, later=texts)
def test_shown_is_final_and_as_much_as_can_be(text: str, stops: list[str], later: str) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(character) for character in text)
    if matcher.stopped:
        return
    # Never too much: whatever follows, what was shown is part of the result.
    assert plain(text + later, stops)[0].startswith(shown)
    # Never too little: what is held back is the beginning of a stop string.
    held = text[len(shown) :]
    assert not held or any(stop.startswith(held) for stop in stops)


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=stop_lists,
    min_tokens=st.integers(0, 5),
)
def test_min_tokens(pieces: list[str], stops: list[str], min_tokens: int) -> None:
    matcher, shown = StopMatcher(stops), ""
    for number, piece in enumerate(pieces, 1):
        shown += matcher.push(piece, armed=number > min_tokens)
        if matcher.stopped:
            break
    shown += matcher.flush()
    unarmed = len("".join(pieces[:min_tokens]))
    assert (shown, matcher.stopped) == plain("".join(pieces), stops, unarmed)


@pytest.mark.timeout(60)
def test_long_periodic_stop_strings_take_linear_time() -> None:
    matcher = StopMatcher(["a" * 50_000 + "b", "a" * 49_999 + "c"])
    text = "a" * 200_000
    shown = "".join(matcher.push(text[i : i + 7]) for i in range(0, len(text), 7))
    assert shown == "a" * 150_000
    assert matcher.push("b") == "" and matcher.stopped


def test_nothing_is_taken_after_the_stop() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a" and matcher.stopped
    assert matcher.push("more") == "" and matcher.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopMatcher([]).push("abc") == "abc"


def ids(*pieces: bytes) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["€"], (["a", "", "", ""], "a", True)),
        (["€b"], (["a", "", "", "", ""], "a", True)),
        (["€c"], (["a", "", "", "", "€b", "c"], "a€bc", False)),
        (["\ufffd"], (["a", "", "", "€", "b", "c"], "a€bc", False)),
    ],
)
def test_characters_split_over_tokens(
    stop: list[str], expected: tuple[list[str], str, bool]
) -> None:
    stream = TextStream(FakeDetokenizer(), stop, 0)
    shown = []
    for token in ids(b"a", b"\xe2", b"\x82", b"\xac", b"b", b"c"):
        shown.append(stream.push(token))
        if stream.found is not None:
            break
    assert (shown, "".join(shown) + stream.finish(), stream.found is not None) == expected


def test_broken_character_at_the_end() -> None:
    stream = TextStream(FakeDetokenizer(), ["x"], 0)
    assert [stream.push(token) for token in ids(b"a", b"\xe2", b"\x82")] == ["a", "", ""]
    assert stream.finish() == "\ufffd" and stream.found is None
    stream = TextStream(FakeDetokenizer(), ["\ufffd"], 0)
    stream.push(ids(b"\xe2")[0])
    assert stream.finish() == "" and stream.found == "\ufffd"


def test_no_tokenizer_no_text() -> None:
    stream = TextStream(None, [], 0)
    assert stream.push(3) == "" and stream.finish() == "" and stream.found is None
