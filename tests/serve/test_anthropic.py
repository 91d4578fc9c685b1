"""The official client drives `/v1/messages`: text, thoughts, tools, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import pytest
from running import Server

HELLO = [{"role": "user", "content": "Tell me a story."}]
THINK = {"thinking": {"type": "enabled", "budget_tokens": 6}}


def tool(name: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"name": name, "input_schema": schema}


NOTHING = {"name": "nod", "input_schema": {"type": "object", "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def options_of(given: dict[str, Any]) -> dict[str, Any]:
    own = {"model": "stories", "messages": HELLO, "max_tokens": 16}
    extra = {"temperature": 0} | given.pop("extra_body", {})
    return own | given | {"extra_body": extra}


def create(client: anthropic.Anthropic, **given: Any) -> Any:
    return client.messages.create(**options_of(given))


def streamed(client: anthropic.Anthropic, **given: Any) -> tuple[list[Any], Any]:
    """The events as they came, and what the client makes of them."""
    raw = list(client.messages.create(stream=True, **options_of(dict(given))))
    with client.messages.stream(**options_of(dict(given))) as stream:
        return raw, stream.get_final_message()


def same(whole: Any, other: Any) -> None:
    found, expected = (m.model_dump(exclude={"id", "usage"}) for m in (whole, other))
    for message in (found, expected):  # ids of calls are drawn
        for block in message["content"]:
            block.pop("id", None)
    assert found == expected
    assert whole.usage.output_tokens == other.usage.output_tokens


def test_a_message_and_its_stream_say_the_same(client: anthropic.Anthropic) -> None:
    whole = create(client)
    assert (whole.role, whole.type, whole.model) == ("assistant", "message", "stories")
    assert [block.type for block in whole.content] == ["text"]
    assert (whole.stop_reason, whole.stop_sequence) == ("max_tokens", None)
    assert whole.usage.output_tokens == 16
    raw, message = streamed(client)
    same(message, whole)
    kinds = [event.type for event in raw]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert raw[0].message.content == [] and raw[0].message.stop_reason is None


def test_events_on_the_wire(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    reply = httpx.post(f"{server.url}/v1/messages", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    for event in reply.text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert "event: ping\n" in reply.text


def test_system_and_blocks_are_read(client: anthropic.Anthropic) -> None:
    plain = client.messages.count_tokens(model="stories", messages=HELLO).input_tokens
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        told = client.messages.count_tokens(model="stories", messages=HELLO, system=system)
        assert told.input_tokens > plain
    blocks: Any = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    parts = [{"role": "user", "content": blocks}]
    assert client.messages.count_tokens(model="stories", messages=parts).input_tokens == plain
    assert create(client, messages=parts).content == create(client).content


def test_tokens_are_counted_and_prefixes_found(client: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "There was a cat and a dog. " * 8}]
    counted = client.messages.count_tokens(model="stories", messages=long).input_tokens
    create(client, messages=long)
    usage = create(client, messages=long).usage
    assert usage.cache_read_input_tokens > 0
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    raw, _ = streamed(client, messages=long)
    assert raw[0].message.usage.cache_read_input_tokens == usage.cache_read_input_tokens


def test_the_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    text = create(client, max_tokens=40).content[0].text
    word = text.split()[3]
    options = {"max_tokens": 40, "stop_sequences": ["nowhere to be found", word]}
    found = create(client, **options)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", word)
    assert found.content[0].text == text[: text.index(word)]
    same(streamed(client, **options)[1], found)


def test_the_context_comes_to_its_end(client: anthropic.Anthropic) -> None:
    never = {"extra_body": {"temperature": 1.0}}
    reasons = {create(client, max_tokens=10_000, **never).stop_reason for _ in range(2)}
    assert reasons <= {"end_turn", "model_context_window_exceeded"}


def test_thoughts_are_blocks_of_their_own(client: anthropic.Anthropic) -> None:
    whole = create(client, max_tokens=60, **THINK)
    thoughts, text = whole.content
    assert (thoughts.type, text.type) == ("thinking", "text")
    assert thoughts.thinking and thoughts.signature and "<" not in text.text
    assert 0 < whole.usage.output_tokens_details.thinking_tokens <= 6
    raw, message = streamed(client, max_tokens=60, **THINK)
    same(message, whole)
    kinds = [e.delta.type for e in raw if e.type == "content_block_delta"]
    assert kinds.index("signature_delta") < kinds.index("text_delta")
    again = [*HELLO, {"role": "assistant", "content": whole.content}, HELLO[0]]
    assert create(client, messages=again).content
    none = create(client, thinking={"type": "disabled"})
    assert [block.type for block in none.content] == ["text"]


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "time"}, {"type": "any"}])
def test_a_tool_that_must_be_called(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    options = {
        "tools": [NOTHING, tool("time")],
        "tool_choice": choice | {"disable_parallel_tool_use": True},
        "max_tokens": 200,
    }
    whole = create(client, **options)
    (call,) = whole.content
    assert whole.stop_reason == "tool_use" and call.type == "tool_use" and call.id
    assert call.name == "time" or choice["type"] == "any"
    assert call.input in ([{"city": "Rome"}, {"city": "Oslo"}] if call.name == "time" else [{}])
    raw, message = streamed(client, **options)
    same(message, whole)
    assert "input_json_delta" in {e.delta.type for e in raw if e.type == "content_block_delta"}
    result = {"type": "tool_result", "tool_use_id": call.id}
    sizes = set()
    for content in ("7 degrees", [{"type": "text", "text": "7 degrees"}]):
        turns = [
            *HELLO,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result | {"content": content}]},
        ]
        given = {"model": "stories", "messages": turns, "tools": options["tools"]}
        sizes.add(client.messages.count_tokens(**given).input_tokens)
    assert len(sizes) == 1
    turns[-1]["content"][0]["is_error"] = True
    assert client.messages.count_tokens(**given).input_tokens > sizes.pop()


def test_tools_may_be_left_alone(client: anthropic.Anthropic) -> None:
    for choice in ("auto", "none"):
        found = create(client, tools=[tool("time")], tool_choice={"type": choice})
        assert [block.type for block in found.content] == ["text"]


def test_a_call_that_is_cut_off(client: anthropic.Anthropic) -> None:
    options = {"tools": [tool("time")], "tool_choice": {"type": "any"}}
    found = create(client, max_tokens=4, **options)
    assert found.stop_reason == "max_tokens"


def test_structure(client: anthropic.Anthropic) -> None:
    wanted = {"type": "json_schema", "schema": tool("time")["input_schema"]}
    found = create(client, output_config={"format": wanted}, max_tokens=80)
    assert json.loads(found.content[0].text)["city"] in ("Rome", "Oslo")


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"messages": []}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Once"}]}, "last message"),
        ({"messages": [*HELLO, {"role": "assistant", "content": [RESULT]}, *HELLO]}, "tool_result"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, "context"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [tool("a")], "tool_choice": {"type": "tool", "name": "b"}}, "tool"),
        ({"tools": [tool("a")], "tool_choice": {"type": "tool"}}, "name"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "display"),
        ({"extra_body": {"mcp_servers": []}}, "mcp_servers"),
        ({"extra_body": {"container": "x"}}, "container"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: anthropic.Anthropic, options: dict[str, Any], message: str
) -> None:
    kinds = anthropic.BadRequestError
    with pytest.raises(kinds, match=message) as refused:
        create(client, **options)
    body: Any = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_errors_in_a_stream_that_has_not_begun(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="context"):
        create(client, messages=[{"role": "user", "content": "a " * 20_000}], stream=True)
    with pytest.raises(anthropic.NotFoundError, match="stories"):
        create(client, model="claude")


def test_errors_in_a_stream_that_has_begun(start: Callable[..., Server]) -> None:
    server = start(limits={"request_seconds": 0.1})
    body = {"messages": HELLO, "max_tokens": 450, "stream": True, "temperature": 1}
    for seed in range(20):  # a story may end by itself
        body["messages"] = [{"role": "user", "content": f"{seed} " + "a" * seed}]
        text = httpx.post(f"{server.url}/v1/messages", json=body).text
        if "event: error" in text:
            break
    assert json.loads(text.strip().split("data: ")[-1])["error"]["type"] == "timeout_error"


def test_keys(start: Callable[..., Server]) -> None:
    server = start(api_keys=("right",))
    right = anthropic.Anthropic(base_url=server.url, api_key="right", max_retries=0)
    assert create(right).content
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        create(wrong)
