"""Ollama's own client, and plain HTTP, drive `/api`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import ollama
import pytest
from running import Server

from earnest.engine import SamplingParams
from earnest.engine.language_model import LanguageModel

HELLO = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"temperature": 0, "num_predict": 12}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "time", "parameters": SCHEMA},
}


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    return ollama.Client(host=server.url)


def chat(client: ollama.Client, **given: Any) -> Any:
    options = GREEDY | given.pop("options", {})
    return client.chat(**({"model": "stories", "messages": HELLO, "options": options} | given))


def test_a_chat_and_its_stream_say_the_same(client: ollama.Client) -> None:
    whole = chat(client)
    assert whole.message.role == "assistant" and whole.message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 12)
    pieces = list(chat(client, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    assert (last.eval_count, last.prompt_eval_count) == (12, whole.prompt_eval_count)
    parts = last.load_duration + last.prompt_eval_duration + last.eval_duration
    assert 0 < last.prompt_eval_duration < last.total_duration == parts


def test_it_streams_unless_told_otherwise(server: Server) -> None:
    body = {"model": "stories:latest", "messages": HELLO, "options": GREEDY}
    reply = httpx.post(f"{server.url}/api/chat", json=body)
    assert reply.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert len(lines) > 2 and lines[-1]["done"]
    body["stream"] = False
    assert httpx.post(f"{server.url}/api/chat", json=body).json()["done"]


def test_generate_asks_or_goes_on(client: ollama.Client, stories: LanguageModel) -> None:
    asked = client.generate("stories", "Tell me a story.", options=GREEDY)
    assert asked.response == chat(client).message.content
    told = client.generate("stories", "Tell me a story.", system="Be brief.", options=GREEDY)
    assert told.prompt_eval_count > asked.prompt_eval_count
    expected = stories.generate("Once upon", SamplingParams(temperature=0, max_tokens=12))
    raw = client.generate("stories", "Once upon", raw=True, options=GREEDY)
    assert raw.response == expected.text
    pieces = client.generate("stories", "Once upon", raw=True, options=GREEDY, stream=True)
    assert "".join(piece.response for piece in pieces) == expected.text


def test_options_are_heeded(client: ollama.Client) -> None:
    text = chat(client, options={"num_predict": 40}).message.content
    word = re.findall(r"\w+", text)[3]
    stopped = chat(client, options={"num_predict": 40, "stop": [word]})
    assert stopped.done_reason == "stop" and stopped.message.content == text[: text.index(word)]
    hot = {"temperature": 1.0, "seed": 5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "num_ctx": 100}
    texts = {chat(client, options=hot).message.content for _ in range(2)}
    assert len(texts) == 1
    assert chat(client, options=hot | {"seed": 6}).message.content not in texts
    one = {"num_predict": 40, "repeat_penalty": 3.0, "repeat_last_n": -1}
    assert chat(client, options=one).message.content != text


def test_thoughts(client: ollama.Client) -> None:
    options = {"num_predict": 1100}
    whole = chat(client, think="low", options=options)
    assert whole.message.thinking
    pieces = list(chat(client, think="low", options=options, stream=True))
    assert "".join(p.message.thinking or "" for p in pieces) == whole.message.thinking
    assert "".join(p.message.content or "" for p in pieces) == whole.message.content
    assert chat(client, think=False).message.thinking is None
    again = [*HELLO, {"role": "assistant", "content": "x", "thinking": "y"}, *HELLO]
    assert chat(client, messages=again).message.content


def test_structure(client: ollama.Client) -> None:
    found = chat(client, format=SCHEMA, options={"num_predict": 80}).message.content
    assert json.loads(found)["city"] in ("Rome", "Oslo")
    found = client.generate("stories", "x", raw=True, format=SCHEMA, options={"num_predict": 80})
    assert json.loads(found.response)["city"] in ("Rome", "Oslo")
    assert chat(client, format="json").message.content.startswith("{")


def test_log_probabilities(client: ollama.Client) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2)
    assert len(whole.logprobs) == 12
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in whole.logprobs)
    pieces = chat(client, logprobs=True, top_logprobs=2, stream=True)
    assert [e for piece in pieces for e in piece.logprobs or ()] == list(whole.logprobs)


def test_calls(server: Server, client: ollama.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in Ollama's interface makes a model call, and this one never would: it is made to.
    Without Ollama's client, which drops half of the schema."""
    from earnest.serve import ollama as served_ollama

    class MustCall(served_ollama.Talk):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given, tool_choice="required", parallel_calls=False)

    def ask(most: int = 200, *, stream: bool = False) -> list[dict[str, Any]]:
        body = {"model": "stories", "messages": HELLO, "tools": [TOOL], "stream": stream}
        body["options"] = {"temperature": 0, "num_predict": most}
        return [
            json.loads(line)
            for line in httpx.post(f"{server.url}/api/chat", json=body).text.splitlines()
        ]

    assert "tool_calls" not in ask(4)[0]["message"]
    monkeypatch.setattr(served_ollama, "Talk", MustCall)
    (whole,) = ask()
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "time" and whole["done_reason"] == "stop"
    assert call["function"]["arguments"]["city"] in ("Rome", "Oslo")
    pieces = ask(stream=True)
    calls = [found for piece in pieces for found in piece["message"].get("tool_calls", ())]
    assert [found["function"] for found in calls] == [call["function"]]
    assert not any(piece["message"]["content"] for piece in pieces)
    (cut,) = ask(36)
    assert cut["done_reason"] == "length" and "tool_calls" not in cut["message"]
    monkeypatch.undo()
    result = {"role": "tool", "content": "noon", "tool_name": "time"}
    assert chat(client, messages=[*HELLO, whole["message"], result]).message.content


def test_a_request_without_a_question(client: ollama.Client) -> None:
    for found in (client.chat("stories"), client.generate("stories", keep_alive="5m")):
        assert (found.done, found.done_reason) == (True, "load")
    with pytest.raises(ollama.ResponseError, match="keep_alive"):
        client.generate("stories", keep_alive=0)


def test_what_is_served(client: ollama.Client, server: Server) -> None:
    (model,) = client.list().models
    assert model.model == "stories" and int(model.size) > 10**6 and len(model.digest) == 64
    assert model.details.parameter_size == "260.0K"
    shown = client.show("stories:latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["ernie4_5.context_length"] == 512
    assert "assistant" in shown.template and "temperature" in shown.parameters
    found = httpx.get(f"{server.url}/api/version").json()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    with pytest.raises(ollama.ResponseError, match="no model") as refused:
        client.show("llama3")
    assert refused.value.status_code == 404


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"options": {"num_gpu": 1}}, "num_gpu"),
        ({"options": {"num_ctx": 10**6}}, "num_ctx"),
        ({"options": {"repeat_last_n": 64}}, "repeat_last_n"),
        ({"options": {"temperature": -1}}, "temperature"),
        ({"options": {"num_predict": -3}}, "num_predict"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]}, "images"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, "context"),
        ({"format": {"type": "no"}}, "grammar"),
        ({"format": "xml"}, "format"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"tools": [{"type": "web"}]}, "tools"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, given: dict[str, Any], message: str
) -> None:
    body = {"model": "stories", "messages": HELLO} | given
    reply = httpx.post(f"{server.url}/api/chat", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"template": "x"}, "template"),
        ({"context": [1]}, "context"),
        ({"images": ["eA=="]}, "images"),
        ({"raw": True, "system": "x"}, "system"),
        ({"raw": True, "think": True}, "think"),
    ],
)
def test_so_it_is_when_generating(server: Server, given: dict[str, Any], message: str) -> None:
    body = {"model": "stories", "prompt": "x"} | given
    reply = httpx.post(f"{server.url}/api/generate", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_errors_in_a_stream_that_has_begun(start: Callable[..., Server]) -> None:
    slow = ollama.Client(host=start(limits={"request_seconds": 0.1}).url)
    with pytest.raises(ollama.ResponseError, match="time"):
        for seed in range(20):  # a story may end by itself
            list(
                chat(
                    slow, options={"num_predict": 450, "temperature": 1, "seed": seed}, stream=True
                )
            )


def test_what_is_loaded(client: ollama.Client) -> None:
    (loaded,), (listed,) = client.ps().models, client.list().models
    assert loaded.name == loaded.model == listed.model and loaded.digest == listed.digest
    assert loaded.size == listed.size and loaded.context_length == 512
