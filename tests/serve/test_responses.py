"""The official client drives `/v1/responses`."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from running import Server

HELLO = "Tell me a story."
THINK = {"extra_body": {"reasoning": {"effort": "minimal"}}, "max_output_tokens": 300}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "time", "parameters": SCHEMA, "strict": True}
FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client: openai.OpenAI, given: Any = HELLO, **options: Any) -> Any:
    options = {"model": "stories", "temperature": 0, "max_output_tokens": 16} | options
    return client.responses.create(input=given, **options)


def plain(response: Any) -> dict[str, Any]:
    """Without what is drawn or measured."""
    found = response.model_dump(exclude={"id", "created_at", "usage"})
    for item in found["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return dict(found)


def test_a_response_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = create(client)
    assert whole.output_text == whole.output[0].content[0].text != ""
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.output_tokens == 16 and whole.output[0].status == "incomplete"
    assert whole.id.startswith("resp_") and whole.store is False
    events = list(create(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == [
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type.endswith("text.delta")) == whole.output_text
    assert plain(events[-1].response) == plain(whole)
    assert events[0].response.status == "in_progress" and not events[0].response.output
    assert len({e.item_id for e in events if hasattr(e, "item_id")}) == 1


def test_items_are_read_as_the_text_they_are(client: openai.OpenAI) -> None:
    def count(given: Any, **options: Any) -> int:
        return int(create(client, given, **options).usage.input_tokens)

    part = {"type": "input_text", "text": HELLO}
    for content in (HELLO, [part]):
        for kind in ({}, {"type": "message"}):
            assert count([{"role": "user", "content": content} | kind]) == count(HELLO)
    assert count(HELLO, extra_body={"client_metadata": {"session": "1"}}) == count(HELLO)
    told = count(HELLO, instructions="Be brief.")
    assert told == count([{"role": "developer", "content": "Be brief."}, *[
        {"role": "user", "content": HELLO}
    ]]) > count(HELLO)  # fmt: skip


def test_thoughts_are_items_of_their_own_and_come_back(client: openai.OpenAI) -> None:
    whole = create(client, include=["reasoning.encrypted_content"], **THINK)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    thoughts = whole.output[0]
    assert thoughts.content[0].text and thoughts.encrypted_content
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens <= 256
    *_, last = create(client, include=["reasoning.encrypted_content"], stream=True, **THINK)
    assert plain(last.response) == plain(whole)
    kinds = {event.type for event in create(client, stream=True, **THINK)}
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= kinds
    opaque = [item.model_dump(exclude={"content"}, exclude_unset=True) for item in whole.output[:1]]
    short = {"role": "user", "content": "?"}
    for items in (whole.output[:1], opaque):
        assert create(client, [short, *items, short], max_output_tokens=2).output
    assert create(client, reasoning={"effort": "none"}).output[0].type == "message"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "time"}])
def test_a_tool_that_must_be_called(client: openai.OpenAI, choice: Any) -> None:
    options = {
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    whole = create(client, **options)
    (call,) = whole.output
    assert (whole.status, call.type, call.name) == ("completed", "function_call", "time")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    events = list(create(client, stream=True, **options))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (done,) = (e for e in events if e.type == "response.function_call_arguments.done")
    assert "".join(deltas) == done.arguments == call.arguments
    assert plain(events[-1].response) == plain(whole)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    again = [{"role": "user", "content": HELLO}, *whole.output, result]
    assert create(client, again, max_output_tokens=2).output
    left = create(client, tools=[TOOL], max_output_tokens=4)
    assert [item.type for item in left.output] == ["message"]


NONSENSE = {"type": "function", "name": "odd", "parameters": {"type": "nonsense"}}
BY_DEFAULT = {k: v for k, v in TOOL.items() if k != "strict"}


@pytest.mark.parametrize(
    ("tools", "strict"),
    [
        ([BY_DEFAULT], [True]),
        ([TOOL | {"strict": None}], [True]),
        ([TOOL | {"strict": False}], [False]),
        ([BY_DEFAULT, NONSENSE], [True, False]),
        ([TOOL, NONSENSE], [True, False]),
        ([NONSENSE], [False]),
        ([NONSENSE | {"strict": False}], [False]),
    ],
)
def test_which_tools_are_strict(
    client: openai.OpenAI, tools: list[dict[str, Any]], strict: list[bool]
) -> None:
    found = create(client, max_output_tokens=2, tools=tools)
    assert [tool.strict for tool in found.tools] == strict


def test_strict_is_refused_where_it_was_asked_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the tool odd cannot be strict"):
        create(client, tools=[TOOL, NONSENSE | {"strict": True}])


def test_structure(client: openai.OpenAI) -> None:
    found = create(client, text={"format": FORMAT}, max_output_tokens=80)
    assert found.status == "completed"
    assert json.loads(found.output_text)["city"] in ("Rome", "Oslo")
    assert found.text.format.schema_ == SCHEMA


def test_the_stream_helper_understands_it(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="stories", input=HELLO, temperature=0, max_output_tokens=80, text={"format": FORMAT}
    ) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output_text)["city"] in ("Rome", "Oslo")


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
STRANGE = [{"type": "reasoning", "summary": [], "encrypted_content": "%"}]
FOREIGN = [{"type": "reasoning", "summary": [], "encrypted_content": "é"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"conversation": "x"}}, "conversation"),
        ({"given": IMAGE}, "input_image"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"given": []}, "input"),
        ({"given": STRANGE}, "encrypted_content"),
        ({"given": FOREIGN}, "encrypted_content"),
        ({"given": "a " * 20_000}, "context"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": FORMAT | {"schema": {"type": "no"}}}}, "grammar"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "summary"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    kinds = openai.BadRequestError
    for stream in (False, True):
        with pytest.raises(kinds, match=message):
            create(client, **options, stream=stream)


def test_errors_in_a_stream_that_has_begun(start: Any) -> None:
    server = start(limits={"request_seconds": 0.1})
    slow = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for seed in range(20):  # a story may end by itself
        options = {"temperature": 1, "max_output_tokens": 450, "extra_body": {"seed": seed}}
        *_, last = create(slow, stream=True, **options)
        if last.type == "response.failed":
            break
    assert last.response.status == "failed" and last.response.error.message
