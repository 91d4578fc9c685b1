"""Tools that are strict: called or not as the model likes, but only as their schema says."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from running import Server

from earnest.engine import SamplingParams
from earnest.engine.language_model import LanguageModel
from earnest.serve import answering
from earnest.serve.bodies import tool
from earnest.serve.formats import form_of
from earnest.serve.grammar import Grammars
from earnest.serve.strict_calls import CLOSE, OPEN, Overruns, StrictCalls

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
PIECES = [
    *(b"a", b"<", b"tool_call", b">", b"<tool_call>", b">x", b" <tool_call>{", b"call>{"),
    *(b"<think>", b"</think>", b"tool_", b"call>", b"x</think>y<tool_"),
]
INSIDE = np.zeros(len(PIECES), np.bool_)


class Inside:
    """What stands in a call: until it is closed, token 0 only."""

    def allowed(self) -> Any:
        return INSIDE

    def accept(self, token_id: int) -> None:
        pass


def forbidden(state: StrictCalls) -> set[bytes]:
    allowed = state.allowed()
    return set() if allowed is None else {PIECES[i] for i in np.flatnonzero(~allowed)}


def fed(*pieces: bytes, thinks: bool = False) -> StrictCalls:
    overruns = Overruns(PIECES, len(PIECES))
    state = StrictCalls(Inside, overruns, PIECES, thinks=thinks)
    for piece in pieces:
        state.accept(PIECES.index(piece))
    return state


ALWAYS = {b" <tool_call>{"}


@pytest.mark.parametrize(
    ("pieces", "called", "more"),
    [
        ((), False, set()),
        ((b"a", b"<"), False, set()),
        ((b"<", b"tool_call"), False, {b">x"}),
        ((b"<", b"tool_"), False, {b"call>{"}),
        ((b"<", b"tool_call", b">"), True, None),
        ((b"<", b"tool_", b"call>"), True, None),
        ((b"a", b"<tool_call>"), True, None),
        ((b"<", b"tool_call", b"a", b">"), False, set()),
    ],
)
def test_where_calls_begin(
    pieces: tuple[bytes, ...], called: bool, more: set[bytes] | None
) -> None:
    state = fed(*pieces)
    assert (state.allowed() is INSIDE) == called
    assert more is None or forbidden(state) == ALWAYS | more


def test_thoughts_are_free() -> None:
    for state in (fed(b"a", b"<tool_call>", thinks=True), fed(b"a", b"<think>", b"<tool_call>")):
        assert state.allowed() is None
        state.accept(PIECES.index(b"x</think>y<tool_"))
        assert forbidden(state) == ALWAYS | {b"call>{"}
        state.accept(PIECES.index(b"call>"))
        assert state.allowed() is INSIDE


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_follows_the_schema(stories: LanguageModel, seed: int) -> None:
    model, rng = stories, np.random.default_rng(seed)
    vocab_size = model.config.vocab_size
    grammars = Grammars(model.tokenizer, vocab_size, sorted(model.tokenizer.eos_ids))
    pieces = [model.tokenizer.token_bytes(i) for i in range(vocab_size)]
    schema = {"type": "object", "properties": {"arguments": SCHEMA}, "required": ["arguments"]}
    inside = grammars.constraint(grammars.call({**schema, "additionalProperties": False}))
    state = StrictCalls(inside, Overruns(pieces, vocab_size), pieces, thinks=False)
    text = b""
    for call in range(2):
        for token in grammars.spelled(f"{call}<tool_call>"):
            state.accept(token)
            text += pieces[token]
        begun = len(text)
        while CLOSE not in text[begun:]:
            allowed = state.allowed()
            assert allowed is not None and len(text) < 4000
            token = int(rng.choice(np.flatnonzero(allowed)))
            state.accept(token)
            text += pieces[token]
        found = json.loads(text[begun : -len(CLOSE)])
        assert found["arguments"]["city"] in ("Rome", "Oslo")
        assert isinstance(found["arguments"]["days"], int)
        assert state.allowed() is None  # free again


class Begins(StrictCalls):
    """A model that begins with a call, whatever it would rather do."""

    opening: list[int]

    def allowed(self) -> Any:
        if self.opening:
            only = np.zeros(len(self._pieces), np.bool_)
            only[self.opening[0]] = True
            return only
        return super().allowed()

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        self.opening = self.opening[1:]


CHAT = {
    "messages": [{"role": "user", "content": "How long in Oslo?"}],
    "seed": 5,
    "temperature": 2,
}
FUNCTION = {"name": "travel", "parameters": SCHEMA}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            CHAT
            | {
                "max_tokens": 300,
                "tools": [
                    {"type": "function", "function": FUNCTION | {"strict": True}},
                    {"type": "function", "function": {"name": "free"}},
                ],
            },
        ),
        (
            "/v1/responses",
            {
                "input": "How long in Oslo?",
                "max_output_tokens": 300,
                "tools": [{"type": "function", "strict": True, **FUNCTION}],
            },
        ),
        (  # strict by default
            "/v1/responses",
            {
                "input": "How long in Oslo?",
                "max_output_tokens": 300,
                "tools": [{"type": "function", **FUNCTION}],
            },
        ),
        (
            "/v1/messages",
            {
                "messages": CHAT["messages"],
                "max_tokens": 300,
                "tools": [{"name": "travel", "input_schema": SCHEMA, "strict": True}],
            },
        ),
    ],
)
def test_a_strict_tool_under_auto(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    begins = server.served.grammars.spelled(OPEN.decode() + '[{"name":"travel"')
    monkeypatch.setattr(Begins, "opening", begins, raising=False)
    monkeypatch.setattr(answering, "StrictCalls", Begins)
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    found = re.search(r'\{\\?"city\\?": ?\\?"(Rome|Oslo)\\?", ?\\?"days\\?": ?-?\d+\}', reply.text)
    assert found and "travel" in reply.text, reply.text


def odd(number: int) -> dict[str, Any]:
    return tool(f"odd{number}", None, {"type": "nonsense"})


# Each of them can be followed; all of them together are too much.
LONG = [tool(f"long{n}", None, {"enum": [f"{n}{'x' * 30_000}"]}) for n in range(3)]
GOOD = tool("good", None, SCHEMA)


@pytest.mark.parametrize(
    ("tools", "asked", "loose"),
    [
        ([GOOD, LONG[0]], {"good"}, set()),
        ([GOOD, odd(1)], set(), {"odd1"}),
        ([GOOD, *LONG], {"good"}, {"long0", "long1", "long2"}),
        (LONG, set(), {"long0", "long1", "long2"}),
        ([GOOD, *map(odd, range(70))], {"good"}, {f"odd{n}" for n in range(70)}),
        ([], set(), set()),
    ],
)
def test_strict_by_default_where_it_can_be(
    server: Server, tools: list[dict[str, Any]], asked: set[str], loose: set[str]
) -> None:
    names = frozenset(each["function"]["name"] for each in tools)
    talk = answering.Talk(
        [],
        SamplingParams(),
        tools=tools,
        strict=frozenset(asked),
        strict_by_default=names - asked,
    )
    form = form_of("")
    made, found = answering._strict(server.served, talk, tools, form)
    assert found == loose
    assert (made is not None) == bool(names - loose)


def test_a_strict_tool_with_a_bad_schema_is_refused(server: Server) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "nonsense"}}
    body = CHAT | {"tools": [{"type": "function", "function": function}]}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert reply.status_code == 400 and "the tool f cannot be strict" in reply.text
