"""The official client drives the server: chats, completions, streams, structure, errors."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from running import Server

from earnest.engine import SamplingParams
from earnest.engine.language_model import LanguageModel
from earnest.serve import http

HELLO = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "stories", "messages": HELLO, "max_tokens": 12, "seed": 3} | options
    return client.chat.completions.create(**options)


def complete(client: openai.OpenAI, prompt: Any = "Once upon a time", **options: Any) -> Any:
    options = {"model": "stories", "max_tokens": 12, "temperature": 0} | options
    return client.completions.create(prompt=prompt, **options)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "earnest"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_model_writes(
    client: openai.OpenAI, stories: LanguageModel
) -> None:
    expected = stories.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))
    found = complete(client)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == len(expected.token_ids)
    ids = complete(client, expected.prompt_token_ids, extra_body={"return_token_ids": True})
    assert ids.choices[0].text == expected.text
    assert ids.choices[0].token_ids == expected.token_ids


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2)
    pieces = list(
        chat(
            client,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    streamed = [
        e.logprob for p in pieces for c in p.choices if c.logprobs for e in c.logprobs.content
    ]
    assert streamed == [entry.logprob for entry in whole.choices[0].logprobs.content]
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)


def test_several_answers(client: openai.OpenAI) -> None:
    found = chat(client, n=3, temperature=1.0)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert chat(client, seed=4, temperature=1.0).choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for piece in chat(client, n=3, temperature=1.0, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert streamed == texts


def test_echo_gives_what_evaluation_needs(client: openai.OpenAI, stories: LanguageModel) -> None:
    ids = stories.tokenizer.encode("Once upon a time there was")
    prompts = [ids, ids[:3]]
    found = complete(client, prompts, echo=True, logprobs=1, max_tokens=1)
    for prompt, choice in zip(prompts, found.choices, strict=True):
        table = choice.logprobs
        assert len(table.tokens) == len(prompt) + 1
        assert table.token_logprobs[0] is None and table.top_logprobs[0] is None
        logits = stories.logits(prompt).astype(np.float64)
        normal = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        exact = [normal[i, token] for i, token in enumerate(prompt[1:])]
        assert table.token_logprobs[1:-1] == pytest.approx(exact, abs=1e-4)
        joined = "".join(table.tokens)
        assert [
            joined[at : at + len(t)] for at, t in zip(table.text_offset, table.tokens, strict=True)
        ]
        assert choice.text.startswith(stories.tokenizer.decode(prompt))


def test_stop_strings_and_bad_words(client: openai.OpenAI) -> None:
    plain = complete(client, max_tokens=40).choices[0].text
    word = re.findall(r"\w+", plain)[4]
    stopped = complete(client, max_tokens=40, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop" and word not in stopped.text
    assert plain.startswith(stopped.text)
    banned = complete(client, max_tokens=40, extra_body={"bad_words": [word]}).choices[0]
    assert word not in banned.text.split()


def test_structure(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    found = chat(client, response_format=wanted, max_tokens=80).choices[0]
    assert found.finish_reason == "stop"
    assert json.loads(found.message.content)["name"] in ("Ann", "Bob")
    extra = {"structured_outputs": {"regex": "[ab]{4}"}}
    assert re.fullmatch("[ab]{4}", chat(client, extra_body=extra).choices[0].message.content)
    extra = {"guided_choice": ["yes", "no"]}
    assert chat(client, extra_body=extra).choices[0].message.content in ("yes", "no")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called(client: openai.OpenAI, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    options = {
        "tools": TOOLS,
        "tool_choice": named,
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    if not stream:
        (choice,) = chat(client, **options).choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        name, arguments = call.function.name, call.function.arguments
    else:
        name = arguments = finish = ""
        for piece in chat(client, stream=True, **options):
            for call in piece.choices[0].delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            finish = piece.choices[0].finish_reason or finish
        assert finish == "tool_calls"
    assert name == "time" and json.loads(arguments)["city"] in ("Rome", "Oslo")


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
NO_SCHEMA = {"name": "x", "schema": {"type": "no"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, "context"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "vocabulary"),
        ({"response_format": {"type": "json_schema", "json_schema": NO_SCHEMA}}, "grammar"),
        ({"extra_body": {"guided_regex": "("}}, "grammar"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool"),
        ({"n": 0}, "n:"),
        ({"n": 1000}, "n is too large"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "tokenize"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **options)
    assert chat(client).choices[0].message.content  # and the server lives


@pytest.mark.parametrize("prompt", ["", [], [[]], [-1], [10**6], [2**63]])
def test_prompts_at_the_edge(client: openai.OpenAI, prompt: Any) -> None:
    if prompt == "":  # becomes the token that begins a text
        assert complete(client, prompt).choices[0].text is not None
        return
    with pytest.raises(openai.BadRequestError):
        complete(client, prompt)


NUMBERS = (-1, 0, 2**31, 2**63, 1e400, "x", True, None, [], {})


@pytest.mark.parametrize(
    "field",
    [
        *(
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "n",
            "logprobs",
            "priority",
        ),
        *("min_tokens", "frequency_penalty", "repetition_penalty", "stop", "logit_bias", "echo"),
    ],
)
def test_any_value_is_answered(server: Server, field: str) -> None:
    for value in NUMBERS:
        body = {"prompt": "a", "max_tokens": 2, field: value}
        text = json.dumps(body).replace("Infinity", "1e400")
        reply = httpx.post(f"{server.url}/v1/completions", content=text, timeout=20)
        assert reply.status_code in (200, 400), (field, value, reply.text)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff", b"null", b'{"prompt": NaN}', b'{"a":' * 50_000]
)
def test_broken_bodies(server: Server, body: bytes) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", content=body, timeout=20)
    assert reply.status_code == 400
    assert "message" in reply.json()["error"]


def test_alone_and_together_the_same(client: openai.OpenAI) -> None:
    prompts = [f"Once there was a {word}" for word in ("cat", "dog", "tree", "boy", "girl", "sun")]

    def write(prompt: str) -> str:
        return str(complete(client, prompt, temperature=1, seed=7, max_tokens=20).choices[0].text)

    alone = [write(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(write, prompts)) == alone


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        next(reply.iter_raw())
    gone = threading.Event()
    for _ in range(100):
        if server.served.service.load.running == 0 and server.served.service._open == 0:
            break
        gone.wait(0.05)
    assert server.served.service._open == 0


def test_tokens(server: Server, stories: LanguageModel) -> None:
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": "a cat"}).json()
    assert found["tokens"] == stories.tokenizer.encode("a cat", add_special_tokens=True)
    assert found["count"] == len(found["tokens"])
    again = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"]}).json()
    assert again["prompt"] == "a cat"
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": HELLO}).json()
    assert chat["count"] > 3


def test_how_the_server_is(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").text == "ready\n"
    assert httpx.get(f"{server.url}/docs").status_code == 200
    page = httpx.get(f"{server.url}/metrics").text
    for name in (
        *("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total"),
        *("vllm:time_to_first_token_seconds_bucket", "vllm:request_success_total"),
    ):
        assert f"{name}{{" in page
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "not_found_error"


def test_counters_begin_at_nought(start: Callable[..., Server]) -> None:
    """A rate needs the value before the first answer."""
    page = httpx.get(f"{start().url}/metrics").text
    for reason in ("stop", "length", "tool_calls"):
        labels = f'finished_reason="{reason}",model_name="stories"'
        assert f"vllm:request_success_total{{{labels}}} 0.0\n" in page


def test_keys(start: Callable[..., Server]) -> None:
    server = start(api_keys=("right", "also right"))
    url = f"{server.url}/v1/models"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(url).status_code == 401
    for key, status in (("right", 200), ("also right", 200), ("wrong", 401), ("x" * 999, 401)):
        assert httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code == status
        assert httpx.get(url, headers={"x-api-key": key}).status_code == status


def test_limits(start: Callable[..., Server]) -> None:
    server = start(limits={"body_bytes": 2000, "body_seconds": 0.3, "request_seconds": 0.2})
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, json={"prompt": "x" * 3000}).status_code == 413
    chunks = (b"x" * 500 for _ in range(10))
    assert httpx.post(url, content=chunks).status_code == 413
    body = {"prompt": "Once", "max_tokens": 450, "ignore_eos": True}
    assert httpx.post(url, json=body).status_code == 504

    def slowly() -> Any:
        yield b'{"prompt"'
        threading.Event().wait(0.8)
        yield b': "a"}'

    assert httpx.post(url, content=slowly()).status_code == 408


def test_a_body_needs_no_content_type(server: Server) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 2})
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = httpx.post(f"{server.url}/v1/completions", content=body, headers=kind)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://evil.example", None, False),
        ("http://evil.example:8000", "evil.example:8000", False),  # a name that points here
        ("null", None, False),
        ("http://localhost:3000", None, True),
        ("http://127.0.0.1:9", None, True),
        ("http://192.0.2.7:8000", "192.0.2.7:8000", True),  # the server's own page
        ("http://192.0.2.7:8000", "192.0.2.8:8000", False),
        ("http://[", None, False),
    ],
)
def test_which_pages_may_call(server: Server, origin: str, host: str | None, allowed: bool) -> None:
    headers = {"origin": origin} | ({"host": host} if host else {})
    reply = httpx.post(f"{server.url}/tokenize", content='{"prompt": "a"}', headers=headers)
    assert reply.status_code == (200 if allowed else 403)


def test_pages_that_are_listed_may_call(start: Callable[..., Server]) -> None:
    url = f"{start(origins=('http://chat.example',), api_keys=('key',)).url}/v1/models"
    refused = httpx.get(url, headers={"origin": "http://chat.example"})
    assert refused.status_code == 401  # and the page can read why
    assert refused.headers["access-control-allow-origin"] == "http://chat.example"
    listed = {"origin": "http://chat.example", "authorization": "Bearer key"}
    assert httpx.get(url, headers=listed).status_code == 200
    assert httpx.get(url, headers=listed | {"origin": "http://evil.example"}).status_code == 403


def test_a_silent_stream_says_that_it_is_there(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_KEEP_ALIVE", 0.02)
    step = server.served.model.runner.step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return step(*arguments)

    monkeypatch.setattr(server.served.model.runner, "step", slow)
    body = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True, "stream": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    events = reply.text.strip().split("\n\n")
    assert events.count(": still here") >= 2
    assert events[-1] == "data: [DONE]" and events[0].startswith("data: {")
    texts = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert texts[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"max_tokens": 2.0}, 200),
        ({"max_tokens": 2, "temperature": 1}, 200),
        ({"max_tokens": 2.5}, 400),
        ({"max_tokens": "2"}, 400),
        ({"max_tokens": True}, 400),
        ({"max_tokens": 2, "stream": 0}, 400),
        ({"max_tokens": 2, "stop": 7}, 400),
        ({"max_tokens": 2, "temperature": "0"}, 400),
    ],
)
def test_values_are_what_they_say(server: Server, change: dict[str, Any], status: int) -> None:
    body = {"prompt": "Once"} | change
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    assert reply.status_code == status, reply.text
