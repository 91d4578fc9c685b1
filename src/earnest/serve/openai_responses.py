"""`/v1/responses`: OpenAI's newer interface, without a memory.

Nothing is stored, so whoever goes on with a conversation sends all of it. Thoughts come as
reasoning items whose `content` is their text; `encrypted_content`, where it is asked for, holds the
same text in base64: it is opaque so that clients hand it back, not secret.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from earnest.serve.answering import Ask, Talk, Usage, answers, ask_of, collected
from earnest.serve.blocks import Block, Blocks, Change
from earnest.serve.bodies import (
    Strict,
    arguments_of,
    check_model,
    sampling_with,
    thinking_tokens,
    thinking_variables,
    tool,
    tool_call,
    turn,
)
from earnest.serve.http import ApiError, JsonReply, event_stream, sse, until_gone
from earnest.serve.metrics import Finish
from earnest.serve.openai_chat import Part, text_of
from earnest.serve.openai_common import salt_of
from earnest.serve.state import Served

Status = Literal["in_progress", "completed", "incomplete"]


class ContentPart(Part):
    """A piece of a message; only text is understood."""

    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    refusal: str | None = None
    detail: Any = None
    file_id: Any = None


class MessageItem(Strict):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Strict):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class ResultItem(Strict):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Strict):
    """Thoughts."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    """What the model thought earlier."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: Status | None = None


def _type_of(item: object) -> object:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if given is None else given


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
]


class FunctionTool(Strict):
    """A tool that may be called; strict unless it says otherwise, or no grammar can follow it."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None


class TextConfig(Strict):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """How much the model thinks. There are no summaries: `auto` gives none."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None


class StreamOptions(Strict):
    """How a stream is written; it is never padded."""

    include_obfuscation: Literal[False] | None = None


class ResponsesBody(Strict):
    """A request for a response."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    # Only to be refused with a reason.
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    # Beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    # Of no consequence here: they name the caller, or ask for what is done anyway.
    metadata: dict[str, str] | None = None
    client_metadata: dict[str, Any] | None = None  # Codex's
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


def talk_of(served: Served, body: ResponsesBody) -> Talk:
    """What the request asks for, in the server's own words."""
    check_model(served, body.model)
    for name, given in (
        ("store", body.store),
        ("previous_response_id", body.previous_response_id is not None),
        ("background", body.background),
    ):
        if given:
            raise ApiError(
                400,
                f"{name} is not supported: this server keeps no responses; send the whole "
                "conversation as input",
                param=name,
            )
    messages = _turns([body.input] if isinstance(body.input, str) else body.input)
    if not messages:
        raise ApiError(400, "the input is empty", param="input")
    if body.instructions is not None:
        messages.insert(0, turn("system", body.instructions))
    choice = body.tool_choice or ("auto" if body.tools else "none")
    effort = None if body.reasoning is None else body.reasoning.effort
    return Talk(
        messages=messages,
        sampling=replace(
            sampling_with(
                served,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                min_p=body.min_p,
                seed=body.seed,
            ),
            max_tokens=body.max_output_tokens,
        ),
        tools=[tool(t.name, t.description, t.parameters) for t in body.tools or ()],
        strict=frozenset(t.name for t in body.tools or () if t.strict),
        strict_by_default=frozenset(t.name for t in body.tools or () if t.strict is None),
        tool_choice=choice if isinstance(choice, str) else choice.name,
        parallel_calls=body.parallel_tool_calls is not False,
        variables=thinking_variables(effort),
        grammar=_grammar(served, body),
        thinking_tokens=thinking_tokens(effort),
        salt=salt_of(body.cache_salt),
        priority=body.priority,
    )


def _grammar(served: Served, body: ResponsesBody) -> Callable[[], str] | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return served.grammars.json_object
    if wanted.schema_ is None:
        raise ApiError(400, "text.format json_schema needs a schema", param="text.format")
    schema = wanted.schema_
    return lambda: served.grammars.json_schema(schema)


def _turns(items: Sequence[str | Item]) -> list[dict[str, Any]]:
    """Thoughts, text and calls that follow one another are one turn of the assistant's."""
    found: list[dict[str, Any]] = []
    for own, group in groupby(items, _is_assistants):
        run = list(group)
        found += [_assistant_turn(run)] if own else [_turn(item) for item in run]
    return found


def _is_assistants(item: str | Item) -> bool:
    if isinstance(item, MessageItem):
        return item.role == "assistant"
    return isinstance(item, CallItem | ReasoningItem)


def _turn(item: str | Item) -> dict[str, Any]:
    if isinstance(item, str):
        return turn("user", item)
    if isinstance(item, ResultItem):
        return turn("tool", text_of(item.output), call_id=item.call_id)
    assert isinstance(item, MessageItem)
    role = "system" if item.role == "developer" else item.role
    return turn(role, text_of(item.content))


def _assistant_turn(items: Sequence[str | Item]) -> dict[str, Any]:
    thoughts = [_thoughts(item) for item in items if isinstance(item, ReasoningItem)]
    return turn(
        "assistant",
        "".join(text_of(item.content) for item in items if isinstance(item, MessageItem)),
        thoughts="".join(thoughts) if thoughts else None,
        calls=[
            tool_call(item.call_id, item.name, arguments_of(item.arguments))
            for item in items
            if isinstance(item, CallItem)
        ],
    )


def _thoughts(item: ReasoningItem) -> str:
    if item.content or item.encrypted_content is None:
        return "".join(part.text for part in item.content or item.summary)
    try:
        return base64.b64decode(item.encrypted_content, validate=True).decode()
    except ValueError as error:  # no base64, not ASCII, no UTF-8
        raise ApiError(
            400, "encrypted_content is not from this server", param="encrypted_content"
        ) from error


def router(served: Served) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/responses", tags=["OpenAI"])
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Continue a conversation."""
        ask = await run_in_threadpool(lambda: ask_of(served, talk_of(served, body)))
        reply = _Reply(served, body, ask)
        if body.stream:
            return await event_stream(request, reply.stream(), wrap_error=reply.failed)
        return JsonReply(await until_gone(request, reply.whole()))

    return api


_PREFIX = {"thoughts": "rs", "text": "msg", "call": "fc"}


class _Reply:
    def __init__(self, served: Served, body: ResponsesBody, ask: Ask) -> None:
        self._served, self._body, self._ask = served, body, ask
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._blocks, self._ids = Blocks(), list[str]()
        self._usage = Usage(prompt=len(ask.prompt_ids))
        self._sequence = -1

    async def whole(self) -> dict[str, Any]:
        (answer,), self._usage = await collected(self._served, self._ask)
        self._blocks = answer.blocks
        return self._response(answer.finish)

    def _response(self, finish: Finish | None, error: str | None = None) -> dict[str, Any]:
        body, sampling = self._body, self._ask.sampling
        cut = finish == "length"
        status = "failed" if error else "incomplete" if cut else "completed"
        over = finish is not None
        last = len(self._blocks.all) - 1
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status if over or error else "in_progress",
            "error": {"code": "server_error", "message": error} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._served.name,
            "output": [
                self._item(number, block, "incomplete" if cut and number == last else "completed")
                for number, block in enumerate(self._blocks.all)
            ],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": _dumped(body.reasoning or Reasoning()),
            "store": False,
            "background": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": {"format": {"type": "text"}} | (_dumped(body.text) if body.text else {}),
            "tool_choice": _dumped(body.tool_choice or "auto"),
            "tools": [
                {"strict": one.name not in self._ask.loose} | _dumped(one)
                for one in body.tools or ()
            ],
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "user": body.user,
            "usage": _usage_of(self._usage) if over else None,
        }

    def _item(self, number: int, block: Block, status: Status) -> dict[str, Any]:
        while len(self._ids) <= number:
            kind = self._blocks.all[len(self._ids)].kind
            self._ids.append(f"{_PREFIX[kind]}_{secrets.token_hex(12)}")
        item: dict[str, Any] = {"id": self._ids[number], "status": status}
        begun = status == "in_progress"
        if block.kind == "call":
            return item | {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": "" if begun else block.text,
            }
        content = [] if begun else [_part(block)]
        if block.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": content}
        item |= {"type": "reasoning", "summary": [], "content": content}
        if self._body.include and not begun:
            item["encrypted_content"] = base64.b64encode(block.text.encode()).decode()
        return item

    async def stream(self) -> AsyncGenerator[bytes, None]:
        finish: Finish | None = None
        begun = False
        async with aclosing(answers(self._served, self._ask)) as pieces:
            async for piece in pieces:
                if not begun:
                    begun = True
                    for name in ("response.created", "response.in_progress"):
                        yield self._event(name, response=self._response(None))
                self._usage.count(piece)
                finish = piece.finish
                changes = self._blocks.take(piece.deltas)
                for change in changes if finish is None else [*changes, *self._blocks.end()]:
                    for event in self._events(change, finish):
                        yield event
        name = "response.incomplete" if finish == "length" else "response.completed"
        yield self._event(name, response=self._response(finish))

    def failed(self, error: dict[str, Any]) -> bytes:
        """The end of a stream that came to nothing."""
        message = str(error["error"]["message"])
        return self._event("response.failed", response=self._response(None, message))

    def _event(self, event: str, **data: Any) -> bytes:
        self._sequence += 1
        return sse({"type": event, "sequence_number": self._sequence, **data}, event)

    def _events(self, change: Change, finish: Finish | None) -> list[bytes]:
        number, block = change.index, change.block
        if change.what == "begin":
            item = self._item(number, block, "in_progress")
            added = self._event("response.output_item.added", output_index=number, item=item)
            if block.kind == "call":
                return [added]
            part = _part(Block(block.kind))
            return [added, self._within("response.content_part.added", number, part=part)]
        name = {
            "text": "response.output_text",
            "thoughts": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        if change.what == "more":
            return [self._within(f"{name}.delta", number, delta=change.more)]
        if block.kind == "call":
            ends = [
                self._within(f"{name}.done", number, arguments=block.text, name=block.name),
            ]
        else:
            ends = [
                self._within(f"{name}.done", number, text=block.text),
                self._within("response.content_part.done", number, part=_part(block)),
            ]
        cut = finish == "length" and number == len(self._blocks.all) - 1
        item = self._item(number, block, "incomplete" if cut else "completed")
        return [*ends, self._event("response.output_item.done", output_index=number, item=item)]

    def _within(self, event: str, number: int, **data: Any) -> bytes:
        where: dict[str, Any] = {"item_id": self._ids[number], "output_index": number}
        if self._blocks.all[number].kind != "call":
            where["content_index"] = 0
        if event.startswith("response.output_text."):
            where["logprobs"] = []
        return self._event(event, **where, **data)


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": block.text}


def _dumped(value: Strict | str) -> Any:
    return value if isinstance(value, str) else value.model_dump(by_alias=True, exclude_none=True)


def _usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
