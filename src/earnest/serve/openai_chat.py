"""`/v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from earnest.serve.answering import Answer, Ask, Piece, Talk, Usage, answers, ask_of, collected
from earnest.serve.bodies import (
    Strict,
    arguments_of,
    thinking_tokens,
    thinking_variables,
    tool_call,
    turn,
)
from earnest.serve.formats import Delta
from earnest.serve.http import ApiError, event_stream, sse, until_gone
from earnest.serve.openai_common import (
    Sampled,
    chat_logprobs,
    check_common,
    grammar_of,
    salt_of,
    sampling_of,
    usage_of,
)
from earnest.serve.state import Served


class FunctionCall(Strict):
    """A call that the model made earlier."""

    name: str
    arguments: str = "{}"


class ToolCall(Strict):
    """A call that the model made earlier, with its id."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class Part(Strict):
    """A piece of a message; only text is understood."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    cache_control: Any = None


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class Function(Strict):
    """A tool's description."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """Whom `tool_choice` names."""

    name: str


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the answer follows."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampled):
    """A request for a chat completion."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_max_tokens: int | None = Field(None, ge=0)
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None


# What a request may tell the template, besides the conversation.
_VARIABLES = ("enable_thinking", "thinking", "options", "system_settings")


def talk_of(served: Served, body: ChatBody) -> Talk:
    """What the request asks for, in the server's own words."""
    check_common(served, body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    count = (body.top_logprobs or 0) if body.logprobs else None
    if count is not None and count > served.limits.logprobs:
        raise ApiError(400, f"top_logprobs: at most {served.limits.logprobs}", param="top_logprobs")
    variables = dict(body.chat_template_kwargs or {})
    for name in variables:
        if name not in _VARIABLES:
            raise ApiError(
                400,
                f"chat_template_kwargs: {name!r:.60} is not one of {', '.join(_VARIABLES)}",
                param="chat_template_kwargs",
            )
    variables = thinking_variables(body.reasoning_effort) | variables
    if body.enable_thinking is not None:
        variables["enable_thinking"] = body.enable_thinking
    thinking = body.reasoning_max_tokens
    if thinking is None:
        thinking = thinking_tokens(body.reasoning_effort)
    choice = body.tool_choice or ("auto" if body.tools else "none")
    return Talk(
        messages=[message_of(message) for message in body.messages],
        sampling=sampling_of(
            served, body, max_tokens=_most(body), logprobs=count, prompt_logprobs=None
        ),
        count=body.n,
        tools=tools_of(body.tools),
        strict=frozenset(tool.function.name for tool in body.tools or () if tool.function.strict),
        tool_choice=choice if isinstance(choice, str) else choice.function.name,
        parallel_calls=body.parallel_tool_calls,
        variables=variables,
        grammar=_grammar(served, body),
        thinking_tokens=thinking,
        bad_words=body.bad_words or (),
        salt=salt_of(body.cache_salt),
        priority=body.priority,
    )


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Descriptions as templates take them. That one is strict is not the model's business."""
    without = {"function": {"strict"}}
    return [tool.model_dump(exclude_none=True, exclude=without) for tool in tools or ()]


def _most(body: ChatBody) -> int | None:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
    return given.pop() if given else None


def _grammar(served: Served, body: ChatBody) -> Callable[[], str] | None:
    asked, wanted = grammar_of(served, body), body.response_format
    if wanted is None or wanted.type == "text":
        return asked
    if asked is not None:
        raise ApiError(400, "more than one kind of structured output is asked for")
    if wanted.type == "json_object":
        return served.grammars.json_object
    if wanted.json_schema is None:
        raise ApiError(400, "response_format json_schema needs a json_schema")
    schema = wanted.json_schema.schema_
    return lambda: served.grammars.json_schema(schema)


def message_of(message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it: content a text, arguments of calls as objects."""
    return turn(
        "system" if message.role == "developer" else message.role,
        text_of(message.content),
        thoughts=message.reasoning_content,
        calls=[
            tool_call(call.id, call.function.name, arguments_of(call.function.arguments))
            for call in message.tool_calls or ()
        ],
        call_id=message.tool_call_id,
        name=message.name,
    )


def text_of(content: str | Sequence[Part] | None) -> str:
    """The text of a message; anything else in it is refused by name."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400, f"content of type {part.type!r:.40} is not understood: only text is"
            )
    return "".join(part.text or "" for part in content)


def router(served: Served) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        ask = await run_in_threadpool(lambda: ask_of(served, talk_of(served, body)))
        reply = _Reply(served, body, ask)
        if body.stream:
            return await event_stream(request, reply.stream())
        return JSONResponse(await until_gone(request, reply.whole()))

    return api


class _Reply:
    def __init__(self, served: Served, body: ChatBody, ask: Ask) -> None:
        self._served, self._body, self._ask = served, body, ask
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._served.name,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        found, usage = await collected(self._served, self._ask)
        choices = [self._choice(which, answer) for which, answer in enumerate(found)]
        reply = self._frame("chat.completion") | {"choices": choices, "usage": usage_of(usage)}
        if self._body.return_token_ids:
            reply["prompt_token_ids"] = list(self._ask.prompt_ids)
        return reply

    def _choice(self, which: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if answer.calls and not answer.content else answer.content,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.text},
                }
                for call in answer.calls
            ]
        logprobs = None
        if self._body.logprobs:
            content = [e for event in answer.events for e in chat_logprobs(self._served, event)]
            logprobs = {"content": content, "refusal": None}
        choice = {
            "index": which,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.finish,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [event.token_id for event in answer.events]
        return choice

    async def stream(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        usage = Usage(prompt=len(self._ask.prompt_ids))
        begun: set[int] = set()
        async with aclosing(answers(self._served, self._ask)) as pieces:
            async for piece in pieces:
                usage.count(piece)
                if piece.which not in begun:
                    begun.add(piece.which)
                    first = {"role": "assistant", "content": ""}
                    yield self._chunk(piece.which, first, None, with_usage)
                for chunk in self._chunks(piece, with_usage):
                    yield chunk
        if with_usage:
            frame = self._frame("chat.completion.chunk")
            yield sse(frame | {"choices": [], "usage": usage_of(usage)})
        yield sse("[DONE]")

    def _chunks(self, piece: Piece, with_usage: bool) -> list[bytes]:
        logprobs = None
        if self._body.logprobs:
            content = chat_logprobs(self._served, piece.event)
            logprobs = {"content": content, "refusal": None} if content else None
        token = piece.event.token_id if self._body.return_token_ids else None
        deltas = [_delta(delta) for delta in piece.deltas]
        if not deltas and (logprobs or token is not None):
            deltas = [{"content": ""}]
        found = []
        for index, delta in enumerate(deltas):
            last = index == len(deltas) - 1
            found.append(
                self._chunk(
                    piece.which,
                    delta,
                    logprobs if last else None,
                    with_usage,
                    token=token if last else None,
                )
            )
        if piece.finish is not None:
            found.append(self._chunk(piece.which, {}, None, with_usage, finish=piece.finish))
        return found

    def _chunk(
        self,
        which: int,
        delta: Mapping[str, Any],
        logprobs: object,
        with_usage: bool,
        *,
        finish: str | None = None,
        token: int | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": which,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if token is not None:
            choice["token_ids"] = [token]
        frame = self._frame("chat.completion.chunk") | {"choices": [choice]}
        return sse(frame | {"usage": None} if with_usage else frame)


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.reasoning:
        return {"reasoning_content": delta.reasoning}
    if delta.call is None:
        return {"content": delta.content}
    call: dict[str, Any] = {"index": delta.call}
    if delta.name:
        call |= {"id": delta.call_id, "type": "function"}
        call["function"] = {"name": delta.name, "arguments": ""}
    else:
        call["function"] = {"arguments": delta.arguments}
    return {"tool_calls": [call]}
