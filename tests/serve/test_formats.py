"""Thoughts, answers and calls in a text that is cut anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earnest.serve.formats import Form, OutputParser, calls_schema, form_of, with_tools

CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "a \\"b\\" }", "n": [1]}}\n</tool_call>'
)


def parsed(
    pieces: list[str], *, thinks: bool, tools: bool
) -> tuple[str, str, list[tuple[str, str]]]:
    parser = OutputParser(thinks=thinks, tools=tools)
    content = reasoning = ""
    calls: list[list[str]] = []
    for delta in [d for piece in pieces for d in parser.push(piece)] + parser.finish():
        content += delta.content
        reasoning += delta.reasoning
        if delta.name:
            assert delta.call == len(calls) and delta.call_id
            calls.append([delta.name, ""])
        elif delta.call is not None:
            calls[delta.call][1] += delta.arguments
    assert parser.called == bool(calls)
    return content, reasoning, [(name, arguments) for name, arguments in calls]


WEATHER = ("weather", '{"city": "a \\"b\\" }", "n": [1]}')
CASES = [
    ("hello\nthere", False, True, ("hello\nthere", "", [])),
    ("2 < 3 <b>", False, True, ("2 < 3 <b>", "", [])),
    ("<think>\nhm\n</think>\n\nyes", False, False, ("yes", "hm", [])),
    ("hm\n</think>\n<response>\nyes\n</response>\n", True, False, ("yes", "hm", [])),
    ("hm", True, True, ("", "hm", [])),
    (f"a\n</think>\n<response>\nb\n</response>\n{CALL}\n", True, True, ("b", "a", [WEATHER])),
    (f"{CALL}\n\n{CALL}", False, True, ("", "", [WEATHER, WEATHER])),
    (CALL, False, False, (CALL, "", [])),
    (
        '<tool_call>[{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]</tool_call>',
        False,
        True,
        ("", "", [("f", '{"x": 1}'), ("g", "{}")]),
    ),
    (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        False,
        True,
        ("", "", [("f", '{"x": 1}')]),
    ),
    ("<tool_call>no json</tool_call>", False, True, ("<tool_call>no json</tool_call>", "", [])),
    ('<tool_call>{"name": "f", "arguments": {"x"', False, True, ("", "", [("f", '{"x"')])),
]


@pytest.mark.parametrize(("text", "thinks", "tools", "expected"), CASES)
@given(data=st.data())
def test_wherever_it_is_cut(
    text: str,
    thinks: bool,
    tools: bool,
    expected: tuple[str, str, list[tuple[str, str]]],
    data: st.DataObject,
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces, thinks=thinks, tools=tools) == expected


def test_arguments_are_passed_on_as_they_are_written() -> None:
    parser = OutputParser(thinks=False, tools=True)
    assert parser.push('<tool_call>{"name": "f", "arg') == []
    (begun,) = parser.push('uments": ')[:1] or parser.push("{")[:1]
    assert (begun.name, begun.call) == ("f", 0)
    seen = "".join(d.arguments for d in parser.push('"x": 12'))
    assert seen.endswith('"x": 12')
    assert "".join(d.arguments for d in parser.push("}}")) == "}"


@given(st.text(alphabet='<>/thinkresponsetool_call\n{}"a', max_size=80), st.booleans())
def test_any_text_whole_or_in_characters(text: str, tools: bool) -> None:
    whole = parsed([text], thinks=False, tools=tools)
    assert parsed(list(text), thinks=False, tools=tools) == whole


def test_tools_for_a_template_without_a_place_for_them() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    found = with_tools(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7"},
        ],
        tools,
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert found[0]["content"].startswith("Be brief.") and '"f"' in found[0]["content"]
    assert json.loads(found[2]["content"][11:-12]) == [{"name": "f", "arguments": {"x": 1}}]
    assert found[3]["content"] == "<tool_response>7</tool_response>"


def test_forms() -> None:
    assert form_of("{{ messages }}") == Form(thinks=False, takes_tools=False)
    assert form_of("{% if tools %}", "..<think>\n") == Form(thinks=True, takes_tools=True)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert calls_schema([tool], Form(False, takes_tools=True))["properties"]["name"]["const"] == "f"
    assert calls_schema([tool, tool], Form(False, takes_tools=False))["type"] == "array"


def test_references_inside_a_tools_parameters_stay_inside() -> None:
    parameters = {
        "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/City"},
            "again": {"$ref": "#"},
            "$ref": {"type": "string"},
        },
    }
    tools = [{"function": {"name": n, "parameters": parameters}} for n in ("a", "b")]
    schema = calls_schema(tools, Form(thinks=False, takes_tools=True))
    moved = schema["$defs"]["1"]["properties"]
    assert moved["city"] == {"$ref": "#/$defs/1/$defs/City"}
    assert moved["again"] == {"$ref": "#/$defs/1"}
    assert moved["$ref"] == {"type": "string"}
    assert parameters["properties"]["city"] == {"$ref": "#/$defs/City"}
