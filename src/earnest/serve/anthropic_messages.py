"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface.

Thoughts come in blocks of their own with a signature that proves nothing (clients drop thoughts
without one); given back, they are read whatever their signature. A budget of thoughts is a most: a
model that does not think keeps it. Prefixes are cached without being asked, so `cache_control` says
what is done anyway.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from earnest.engine import SamplingParams
from earnest.serve.answering import Ask, Talk, Usage, answers, ask_of, collected
from earnest.serve.blocks import Block, Blocks, Change
from earnest.serve.bodies import (
    Strict,
    check_model,
    sampling_with,
    thinking_tokens,
    tool,
    tool_call,
    turn,
)
from earnest.serve.http import ApiError, event_stream, sse, until_gone
from earnest.serve.metrics import Finish
from earnest.serve.state import Served

_SIGNATURE = "earnest"


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None = None
    cache_control: Any = None


class ThinkingBlock(Strict):
    """What the model thought earlier."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class Caller(Strict):
    """Who called: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Strict):
    """A call that the model made earlier."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Caller | None = None
    cache_control: Any = None


class ToolResultBlock(Strict):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class Tool(Strict):
    """A tool that may be called."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: Any = None


class ToolChoice(Strict):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """Whether the model thinks, and how long at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0)
    display: Literal["summarized"] | None = None


class OutputFormat(Strict):
    """A schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How the answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    """Who asks."""

    user_id: str | None = None


class CountBody(Strict):
    """A conversation."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None


class MessagesBody(CountBody):
    """A request for the next message."""

    max_tokens: int = Field(ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    # Of no consequence here: they name the caller, or ask for what is done anyway.
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None


def talk_of(served: Served, body: CountBody, sampling: SamplingParams) -> Talk:
    """What the request asks for, in the server's own words."""
    check_model(served, body.model)
    if body.messages[-1].role == "assistant":
        raise ApiError(
            400,
            "the last message is the assistant's: to go on with one that is begun is not supported",
            param="messages",
        )
    messages = [found for message in body.messages for found in _turns(message)]
    if body.system:
        messages.insert(0, turn("system", _text(body.system)))
    choice = body.tool_choice or ToolChoice(type="auto")
    if (choice.name is None) == (choice.type == "tool"):
        raise ApiError(400, "tool_choice: a name goes with type tool", param="tool_choice")
    variables, thinking = _thinking(body)
    return Talk(
        messages=messages,
        sampling=sampling,
        tools=[tool(t.name, t.description, t.input_schema) for t in body.tools or ()],
        strict=frozenset(t.name for t in body.tools or () if t.strict),
        tool_choice="required" if choice.type == "any" else choice.name or choice.type,
        parallel_calls=not choice.disable_parallel_tool_use,
        variables=variables,
        grammar=_grammar(served, body),
        thinking_tokens=thinking,
    )


def _thinking(body: CountBody) -> tuple[dict[str, Any], int | None]:
    """Variables of the template, and most tokens of thoughts."""
    thinking = body.thinking or Thinking(type="adaptive")
    if (thinking.budget_tokens is None) == (thinking.type == "enabled"):
        raise ApiError(400, "thinking: budget_tokens goes with type enabled", param="thinking")
    if thinking.type == "adaptive":
        config = body.output_config
        return {}, None if config is None else thinking_tokens(config.effort)
    if thinking.type == "disabled":
        return {"enable_thinking": False}, 0
    return {"enable_thinking": True}, thinking.budget_tokens


def _grammar(served: Served, body: CountBody) -> Any:
    if body.output_config is None or body.output_config.format is None:
        return None
    schema = body.output_config.format.schema_
    return lambda: served.grammars.json_schema(schema)


def _text(content: str | list[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


def _turns(message: Message) -> list[dict[str, Any]]:
    """A message of the user's holds results of tools as well, which are turns of their own."""
    if isinstance(message.content, str):
        return [turn(message.role, message.content)]
    results, texts, thoughts, calls = [], [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            failed = "Error: " if block.is_error else ""
            results.append(turn("tool", failed + _text(block.content), call_id=block.tool_use_id))
        elif isinstance(block, ToolUseBlock) and message.role == "assistant":
            calls.append(tool_call(block.id, block.name, block.input))
        elif isinstance(block, ThinkingBlock) and message.role == "assistant":
            thoughts.append(block.thinking)
        else:
            raise ApiError(
                400, f"a {block.type} block cannot stand in a message of role {message.role}"
            )
    if results and not texts:
        return results
    own = turn(
        message.role,
        "".join(texts),
        thoughts="".join(thoughts) if thoughts else None,
        calls=calls,
    )
    return [*results, own]


def router(served: Served) -> APIRouter:
    """The endpoints."""
    api = APIRouter()

    @api.post("/v1/messages", tags=["Anthropic"])
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Continue a conversation."""
        ask = await run_in_threadpool(
            lambda: ask_of(served, talk_of(served, body, _sampling(served, body)))
        )
        reply = _Reply(served, body, ask)
        if body.stream:
            return await event_stream(
                request,
                reply.stream(),
                ping=_event({"type": "ping"}),
                wrap_error=_event,
            )
        return JSONResponse(await until_gone(request, reply.whole()))

    @api.post("/v1/messages/count_tokens", tags=["Anthropic"])
    async def count_tokens(body: CountBody) -> dict[str, int]:
        """How many tokens a conversation is."""
        ask = await run_in_threadpool(
            lambda: ask_of(served, talk_of(served, body, served.defaults))
        )
        return {"input_tokens": len(ask.prompt_ids)}

    return api


def _sampling(served: Served, body: MessagesBody) -> SamplingParams:
    return sampling_with(
        served,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=None if body.stop_sequences is None else tuple(body.stop_sequences),
    )


class _Reply:
    def __init__(self, served: Served, body: MessagesBody, ask: Ask) -> None:
        self._served, self._body, self._ask = served, body, ask
        self._id = f"msg_{secrets.token_hex(12)}"

    def _message(self, content: list[Any], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage_of(usage),
        }

    def _stop(self, finish: Finish | None, found: str | None, usage: Usage) -> dict[str, Any]:
        if found is not None:
            reason = "stop_sequence"
        elif finish == "length":
            complete = usage.completion >= self._body.max_tokens
            reason = "max_tokens" if complete else "model_context_window_exceeded"
        else:
            reason = "tool_use" if finish == "tool_calls" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": found}

    async def whole(self) -> dict[str, Any]:
        (answer,), usage = await collected(self._served, self._ask)
        content = [_block(block) for block in answer.blocks.all]
        stop = self._stop(answer.finish, answer.events[-1].stop_string, usage)
        return self._message(content, usage) | stop

    async def stream(self) -> AsyncGenerator[bytes, None]:
        usage, blocks = Usage(prompt=len(self._ask.prompt_ids)), Blocks()
        begun = False
        async with aclosing(answers(self._served, self._ask)) as pieces:
            async for piece in pieces:
                usage.count(piece)
                if not begun:
                    begun = True
                    message = self._message([], usage)
                    yield _event({"type": "message_start", "message": message})
                    yield _event({"type": "ping"})
                changes = blocks.take(piece.deltas)
                for change in changes if piece.finish is None else [*changes, *blocks.end()]:
                    for event in _events(change):
                        yield _event(event)
                if piece.finish is not None:
                    stop = self._stop(piece.finish, piece.event.stop_string, usage)
                    yield _event(
                        {"type": "message_delta", "delta": stop, "usage": _usage_of(usage)}
                    )
        yield _event({"type": "message_stop"})


def _event(data: dict[str, Any]) -> bytes:
    return sse(data, str(data["type"]))


def _usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def _block(block: Block) -> dict[str, Any]:
    if block.kind == "thoughts":
        return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE}
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    return {
        "type": "tool_use",
        "id": block.call_id,
        "name": block.name,
        "input": block.arguments or {},
    }


def _events(change: Change) -> list[dict[str, Any]]:
    at = {"index": change.index}
    if change.what == "begin":
        empty = _block(Block(change.block.kind, "", change.block.call_id, change.block.name))
        if change.block.kind == "thoughts":
            empty["signature"] = ""
        return [{"type": "content_block_start", **at, "content_block": empty}]
    if change.what == "more":
        return [{"type": "content_block_delta", **at, "delta": _delta(change)}]
    ended = [{"type": "content_block_stop", **at}]
    if change.block.kind != "thoughts":
        return ended
    signed = {"type": "signature_delta", "signature": _SIGNATURE}
    return [{"type": "content_block_delta", **at, "delta": signed}, *ended]


def _delta(change: Change) -> dict[str, Any]:
    if change.block.kind == "thoughts":
        return {"type": "thinking_delta", "thinking": change.more}
    if change.block.kind == "text":
        return {"type": "text_delta", "text": change.more}
    return {"type": "input_json_delta", "partial_json": change.more}
