"""What a model's text means: thoughts, answer, calls of tools.

Three forms are known, all made of the same tags: plain text (Base models and the non-thinking
post-trained ones, which bracket thoughts with `<think>` if at all), ERNIE's Thinking form
(`<think>..</think><response>..</response>` and a `<tool_call>` with one JSON object for each call),
and SmolLM2's (a `<tool_call>` with a JSON list of calls). Tags may be cut anywhere by tokens, so
text that could still become one is held back.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN_THOUGHTS, _CLOSE_THOUGHTS = "<think>", "</think>"
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
# Calls in one answer that must call: a small model might never come to an end.
_MOST_CALLS = 16
_WRAPPERS = ("<response>", "</response>")


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer; one of the fields is set.

    Attributes:
        content: text of the answer.
        reasoning: text of the thoughts.
        call: number of a tool call, counted from 0; `name` begins it, `arguments` go on with it.
        call_id: with `name`.
        name: of the tool.
        arguments: a piece of its JSON.
    """

    content: str = ""
    reasoning: str = ""
    call: int | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Form:
    """How a model marks thoughts and calls.

    Attributes:
        thinks: its prompt leaves a block of thoughts open.
        takes_tools: its chat template has a place for descriptions of tools.
    """

    thinks: bool
    takes_tools: bool


def form_of(template: str | None, prompt: str = "") -> Form:
    """What a chat template, and a prompt made with it, tell of the form.

    Args:
        template: source of the template; None: there is none.
        prompt: the text that the model is to go on from.
    """
    source = template or ""
    return Form(
        thinks=prompt.rstrip().endswith(_OPEN_THOUGHTS),
        takes_tools="tools" in source,
    )


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """A conversation for a model whose template has no place for tools: the system message tells of
    them, calls and results become text. The form is the one that SmolLM2 was trained on."""
    told = (
        "You can call functions. They are described here as JSON:\n<tools>"
        + json.dumps(list(tools), ensure_ascii=False)
        + "</tools>\nTo call some, answer with nothing but a JSON list of calls:\n"
        '<tool_call>[{"name": "the function", "arguments": {"argument": "value"}}]</tool_call>\n'
        "If none of them helps, answer in words."
    )
    rest = [_without_calls(message) for message in messages]
    if rest and rest[0].get("role") == "system":
        told = f"{rest[0]['content']}\n\n{told}"
        rest = rest[1:]
    return [{"role": "system", "content": told}, *rest]


def _without_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    plain = [call["function"] for call in calls]
    text = f"{_OPEN_CALL}{json.dumps(plain, ensure_ascii=False)}{_CLOSE_CALL}"
    return {"role": message["role"], "content": (message.get("content") or "") + text}


def calls_schema(
    tools: Sequence[Mapping[str, Any]], form: Form, *, several: bool = True
) -> dict[str, Any]:
    """A JSON schema of what stands in a `<tool_call>` block when calling one of `tools`, or several
    where the form has them in one block."""
    defined: dict[str, Any] = {}
    each = []
    for number, tool in enumerate(tools):
        arguments: Any = {"type": "object"}
        if parameters := tool["function"].get("parameters"):
            # A tool's own references start at its own root, which is moved here.
            arguments = {"$ref": f"#/$defs/{number}"}
            defined[str(number)] = _moved(parameters, arguments["$ref"])
        each.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": arguments,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    one: dict[str, Any] = each[0] if len(each) == 1 else {"anyOf": each}
    if not form.takes_tools:
        most = _MOST_CALLS if several else 1
        one = {"type": "array", "items": one, "minItems": 1, "maxItems": most}
    return {**one, "$defs": defined} if defined else one


def _moved(schema: Any, root: str) -> Any:
    """A schema whose root is elsewhere now; without recursion, since it is a stranger's."""
    top: list[Any] = [schema]
    todo: list[tuple[Any, Any]] = [(top, 0)]
    while todo:
        place, key = todo.pop()
        value = place[key]
        if isinstance(value, Mapping):
            place[key] = value = dict(value)
            todo += [(value, name) for name in value]
        elif isinstance(value, list):
            place[key] = value = list(value)
            todo += [(value, index) for index in range(len(value))]
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            place[key] = root + value[1:]
    return top[0]


class OutputParser:
    """Splits a growing text into thoughts, answer and calls.

    Args:
        thinks: the text begins inside a block of thoughts.
        tools: `<tool_call>` blocks are calls; otherwise they are text like any other.
    """

    def __init__(self, *, thinks: bool, tools: bool) -> None:
        self._tags = (_OPEN_THOUGHTS, *_WRAPPERS, *((_OPEN_CALL,) if tools else ()))
        self._state = "thoughts" if thinks else "text"
        self._held = ""
        self._fresh = True  # nothing but white space since the last tag
        self._calls = 0
        self._call: _Call | None = None

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    def push(self, text: str) -> list[Delta]:
        """Take more text; what is certain by now."""
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[Delta]:
        """No more comes: what was held back."""
        return list(self._read(final=True))

    def _read(self, *, final: bool) -> Iterator[Delta]:
        while True:
            tags = {
                "text": self._tags,
                "thoughts": (_CLOSE_THOUGHTS,),
                "call": (_CLOSE_CALL,),
            }[self._state]
            at, tag = min(
                ((self._held.find(tag), tag) for tag in tags if tag in self._held),
                default=(-1, ""),
            )
            if at < 0:
                keep = 0 if final else _held_back(self._held, tags)
                ready = self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                yield from self._spoken(ready, closed=final)
                return
            ready, self._held = self._held[:at], self._held[at + len(tag) :]
            yield from self._spoken(ready.rstrip("\n") if self._state != "call" else ready, True)
            self._fresh = True
            self._turn(tag)

    def _turn(self, tag: str) -> None:
        if tag == _OPEN_THOUGHTS:
            self._state = "thoughts"
        elif tag == _OPEN_CALL:
            self._state, self._call = "call", _Call(self._calls)
        elif tag in (_CLOSE_THOUGHTS, _CLOSE_CALL):
            self._state = "text"

    def _spoken(self, text: str, closed: bool) -> Iterator[Delta]:
        if self._state == "call":
            assert self._call is not None
            yield from self._call.push(text, closed)
            self._calls = self._call.next_number
            return
        if self._fresh:
            text = text.lstrip("\n")
        if not text:
            return
        self._fresh = False
        yield Delta(reasoning=text) if self._state == "thoughts" else Delta(content=text)


def _held_back(text: str, tags: Sequence[str]) -> int:
    """Characters at the end that may still become a tag, with the line ends before them."""
    longest = 0
    for tag in tags:
        for length in range(min(len(tag) - 1, len(text)), 0, -1):
            if text.endswith(tag[:length]):
                longest = max(longest, length)
                break
    body = text[: len(text) - longest]
    return longest + len(body) - len(body.rstrip("\n"))


class _Call:
    """The inside of a `<tool_call>` block: one call or a list of them.

    The arguments of a call that begins with its name are passed on as they are written; anything
    else is read when it is complete.
    """

    def __init__(self, number: int) -> None:
        self.next_number = number
        self._text = ""
        self._streaming = False
        self._sent = 0

    def push(self, text: str, closed: bool) -> Iterator[Delta]:
        self._text += text
        if not self._streaming and not self._text.lstrip().startswith("["):
            yield from self._begin()
        if self._streaming:
            end = _end_of_value(self._text, self._sent)
            stop = len(self._text) if end is None else end
            # White space at the end may belong to what follows the value.
            piece = self._text[self._sent : stop]
            if piece and self._sent <= stop and not self._done:
                self._sent = stop
                yield Delta(call=self.next_number - 1, arguments=piece)
            self._done = self._done or end is not None
            return
        if closed:
            yield from self._complete()

    _done = False

    def _begin(self) -> Iterator[Delta]:
        head = self._text.lstrip()
        try:
            if not head.startswith("{"):
                return
            key, at = json.JSONDecoder().raw_decode(head[1:].lstrip())
            rest = head[1:].lstrip()[at:].lstrip()
            if key != "name" or not rest.startswith(":"):
                return
            value = rest[1:].lstrip()
            name, at = json.JSONDecoder().raw_decode(value)
            rest = value[at:].lstrip()
            if not isinstance(name, str) or not rest.startswith(","):
                return
            rest = rest[1:].lstrip()
            key, at = json.JSONDecoder().raw_decode(rest)
            rest = rest[at:].lstrip()
            if key not in ("arguments", "parameters") or not rest.startswith(":"):
                return
            rest = rest[1:].lstrip()
        except ValueError:
            return  # not yet
        if not rest.startswith("{"):
            return
        self._text, self._sent, self._streaming = rest, 0, True
        self.next_number += 1
        yield Delta(call=self.next_number - 1, call_id=new_call_id(), name=name)

    def _complete(self) -> Iterator[Delta]:
        try:
            found = json.loads(self._text)
        except ValueError:
            yield Delta(content=f"{_OPEN_CALL}{self._text}{_CLOSE_CALL}")
            return
        for call in found if isinstance(found, list) else [found]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                continue
            arguments = call.get("arguments", call.get("parameters", {}))
            text = (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
            number, self.next_number = self.next_number, self.next_number + 1
            yield Delta(call=number, call_id=new_call_id(), name=call["name"])
            yield Delta(call=number, arguments=text)


def new_call_id() -> str:
    """An id as the servers that people know give them."""
    return f"call_{secrets.token_hex(12)}"


def _end_of_value(text: str, _from: int) -> int | None:
    """Where the JSON object or list that `text` begins with ends; None: not yet."""
    depth, quoted, escaped = 0, False, False
    for position, character in enumerate(text):
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return position + 1
    return None
