"""What careless clients send: text that is no text, lists without end, bodies that are packed."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from running import Server

from earnest.engine.language_model import LanguageModel
from earnest.serve import plain
from earnest.serve.openai_common import token_text
from earnest.serve.state import Limits, Served
from earnest.tokenizer import Tokenizer

LONE = "\ud800"  # half of a character; JSON can hold it, UTF-8 cannot
TURNS = [{"role": "user", "content": "Once", "name": "me"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "title": "t"}
FUNCTION = {"name": "find", "description": "d", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": "b"}'}}
WRITTEN = {"stop": ["x"], "bad_words": ["y"], "user": "u", "cache_salt": "s", "model": "stories"}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {"prompt": "Once", "max_tokens": 3, "echo": True, "logprobs": 1, **WRITTEN},
    ),
    ("/v1/completions", {"prompt": ["Once", "a"], "max_tokens": 3, "guided_choice": ["b"]}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "guided_regex": "a"}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "guided_grammar": 'start: "a"'}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "guided_json": SCHEMA}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                *TURNS,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "r"}]},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "find"}},
            "metadata": {"m": "n"},
            "max_tokens": 3,
            **WRITTEN,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": TURNS,
            "max_tokens": 3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
            "chat_template_kwargs": {"options": {"o": "p"}},
        },
    ),
    (
        "/v1/responses",
        {
            "model": "stories",
            "instructions": "i",
            "input": [
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "a"}],
                },
                {"type": "function_call", "call_id": "1", "name": "find", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "o"},
            ],
            "tools": [{"type": "function", **FUNCTION}],
            "metadata": {"m": "n"},
            "max_output_tokens": 3,
        },
    ),
    (
        "/v1/messages",
        {
            "model": "stories",
            "system": "s",
            "messages": [
                {"role": "user", "content": "Once"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "1", "name": "find", "input": {"a": "b"}}
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}],
                },
            ],
            "tools": [{"name": "find", "description": "d", "input_schema": SCHEMA}],
            "stop_sequences": ["x"],
            "metadata": {"user_id": "u"},
            "max_tokens": 3,
        },
    ),
    (
        "/api/generate",
        {
            "model": "stories",
            "prompt": "Once",
            "system": "s",
            "format": SCHEMA,
            "options": {"num_predict": 3, "stop": ["x"]},
        },
    ),
    (
        "/api/chat",
        {
            "model": "stories",
            "messages": [{"role": "user", "content": "Once"}],
            "tools": [{"type": "function", "function": FUNCTION}],
            "options": {"num_predict": 3},
            "keep_alive": "5m",
        },
    ),
    ("/api/show", {"model": "stories"}),
    ("/v1/embeddings", {"model": "stories", "input": ["a", "b"], "user": "u"}),
    ("/api/embed", {"model": "stories", "input": ["a", "b"]}),
    ("/tokenize", {"prompt": "Once"}),
    ("/tokenize", {"messages": TURNS}),
]


def with_one(body: Any, text: str) -> Iterator[Any]:
    """The body with each of its texts replaced in turn, and each name of a field."""
    if isinstance(body, str):
        yield text
        yield body + text
        return
    pairs = body.items() if isinstance(body, dict) else enumerate(body)
    for key, value in list(pairs):
        if isinstance(value, str | dict | list):
            for changed in with_one(value, text):
                made = copy.copy(body)
                made[key] = changed
                yield made
        if isinstance(body, dict):
            yield {(key if name != key else text): given for name, given in body.items()}


STREAMING = [
    path for path, _ in BODIES if "embed" not in path and path not in ("/tokenize", "/api/show")
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda given: str(given)[:40])
def test_text_that_is_no_text(server: Server, path: str, body: dict[str, Any]) -> None:
    wrong = []
    with httpx.Client(timeout=30) as client:
        assert client.post(server.url + path, json=body).status_code == 200
        for changed in with_one(body, LONE):
            for how in ({"stream": False}, {"stream": True}) if path in STREAMING else ({},):
                reply = client.post(server.url + path, content=json.dumps({**changed, **how}))
                if reply.status_code not in (200, 400, 404, 422) or "api_error" in reply.text:
                    wrong.append((changed, how, reply.text))
    assert wrong == []


def test_text_that_is_no_text_comes_back_as_it_was(server: Server) -> None:
    body = {"input": "Once", "instructions": f"a{LONE}b", "max_output_tokens": 2}
    reply = httpx.post(f"{server.url}/v1/responses", content=json.dumps(body))
    assert reply.json()["instructions"] == f"a{LONE}b"
    assert b'"a\\ud800b"' in reply.content


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", "stop"),
        ("/v1/completions", "bad_words"),
        ("/v1/chat/completions", "stop"),
        ("/v1/chat/completions", "bad_words"),
        ("/v1/messages", "stop_sequences"),
        ("/api/generate", "options"),
    ],
)
def test_more_stop_strings_than_anybody_needs(server: Server, path: str, field: str) -> None:
    """Each is looked for at every token, on the thread that serves all clients: 50,000 of them took
    more than 10 ms a token."""
    body = next(body for known, body in BODIES if known == path)

    def asked(count: int) -> httpx.Response:
        texts = [f"q{number}" for number in range(count)]
        given = {"num_predict": 3, "stop": texts} if field == "options" else texts
        return httpx.post(server.url + path, json=body | {field: given}, timeout=30)

    most = Limits().texts
    assert asked(most).status_code == 200
    refused = asked(most + 1)
    assert refused.status_code == 400 and "at most 1,024" in refused.text


@pytest.mark.parametrize(
    "change",
    [
        {"stop": ["", "q" * 1_000_000]},
        {"q" * 1_000_000: 1},
        {f"q{number}": 1 for number in range(10_000)},
        {"model": "q" * 1_000_000},
        {"guided_regex": "(" * 4000},
        {"guided_choice": ["q" * 1_000_000, ""]},
    ],
    ids=lambda change: str(change)[:20],
)
def test_errors_are_short_whatever_they_quote(server: Server, change: dict[str, Any]) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Once", **change})
    assert reply.status_code in (400, 404)
    error = reply.json()["error"]
    assert len(error["message"]) <= 4001 and len(error["param"] or "") <= 100


def test_many_tokens_are_not_written_on_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000,000 of them, which are 10 MB of text, kept all other clients waiting."""
    written: list[bool] = []

    def text(served: Served, token: int) -> str:
        try:
            written.append(bool(asyncio.get_running_loop()))
        except RuntimeError:
            written.append(False)
        return token_text(served, token)

    monkeypatch.setattr(plain, "token_text", text)
    reply = httpx.post(
        f"{server.url}/tokenize", json={"prompt": "Once upon", "return_token_strs": True}
    )
    assert len(reply.json()["token_strs"]) == len(written) == reply.json()["count"] > 2
    assert not any(written)


def test_words_are_looked_up_once_for_all_prompts(
    server: Server, stories: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = []
    kind = type(stories.tokenizer)
    encode = kind.encode

    def counted(self: Tokenizer, text: str, **how: Any) -> list[int]:
        looked_up.append(text)
        return encode(self, text, **how)

    monkeypatch.setattr(kind, "encode", counted)
    body = {"prompt": ["a", "b", "c"], "bad_words": ["qqq"], "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    assert looked_up.count("qqq") <= 2  # as it is, and as pieces that spell it


def test_more_answers_than_there_is_ever_room_for(start: Callable[..., Server]) -> None:
    """A 429 would have them come again and again."""
    url = f"{start(limits={'waiting': 6}).url}/v1/completions"

    def asked(prompts: int, count: int) -> httpx.Response:
        body = {"prompt": ["Once"] * prompts, "n": count, "max_tokens": 2}
        return httpx.post(url, json=body, timeout=30)

    assert asked(1, 6).status_code == asked(3, 2).status_code == asked(6, 1).status_code == 200
    for prompts, count, most in ((1, 7, "6"), (2, 4, "3 for each prompt"), (7, 1, "0 for each")):
        refused = asked(prompts, count)
        assert refused.status_code == 400 and f"at most {most}" in refused.text


def test_bodies_that_are_packed(server: Server) -> None:
    body = gzip.compress(json.dumps({"prompt": "Once", "max_tokens": 2}).encode())
    headers = {"content-encoding": "gzip"}
    reply = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert reply.status_code == 415 and "compressed" in reply.json()["error"]["message"]
    plain = {"content-encoding": "Identity"}
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, json={"prompt": "a", "max_tokens": 2}, headers=plain).status_code == 200
