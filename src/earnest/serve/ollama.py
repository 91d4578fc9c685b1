"""`/api/chat` and `/api/generate`: Ollama's interface, streams of JSON lines unless told otherwise.

The model is always there: `keep_alive` and a request without a question (which loads it) change
nothing. Options about the machine are the business of whoever starts the server, and refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from earnest.engine import SamplingParams
from earnest.serve.answering import Ask, Piece, Talk, Usage, answers, ask_of
from earnest.serve.blocks import Blocks, Change
from earnest.serve.bodies import (
    Strict,
    check_model,
    sampling_with,
    thinking_tokens,
    thinking_variables,
    tool_call,
    turn,
)
from earnest.serve.http import ApiError, event_stream, until_gone
from earnest.serve.openai_chat import Tool, tools_of
from earnest.serve.openai_common import chat_logprobs
from earnest.serve.state import Served


class Options(Strict):
    """How tokens are chosen; what is not given is as the model's authors recommend."""

    num_predict: int | None = Field(None, ge=-2)
    num_ctx: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Literal[-1] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class CalledFunction(Strict):
    """What was called."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None


class Call(Strict):
    """A call that the model made earlier."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | None = None


class OllamaBody(Strict):
    """What both endpoints take."""

    model: str
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    stream: bool = True
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    keep_alive: float | str | None = None


class ChatBody(OllamaBody):
    """A request for the next message."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[Tool] | None = None


class GenerateBody(OllamaBody):
    """A request for an answer to one prompt."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    images: list[Any] | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None


def router(served: Served) -> APIRouter:
    """The endpoints."""
    api = APIRouter()

    @api.post("/api/chat", tags=["Ollama"])
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        check_name(served, body.model)
        if not body.messages:
            return _loaded(served, body, _message)
        ask = await run_in_threadpool(lambda: ask_of(served, _chat_talk(served, body)))
        return await _answer(_Reply(served, body, ask, _message), request)

    @api.post("/api/generate", tags=["Ollama"])
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Answer a prompt."""
        check_name(served, body.model)
        if not body.prompt:
            return _loaded(served, body, _plain)
        ask = await run_in_threadpool(lambda: _generate_ask(served, body))
        return await _answer(_Reply(served, body, ask, _plain), request)

    return api


def check_name(served: Served, name: str) -> None:
    """Refuse the name of a model that is not here; `:latest` goes without saying."""
    check_model(served, name if name == served.name else name.removesuffix(":latest"))


def _chat_talk(served: Served, body: ChatBody) -> Talk:
    return _talk(
        served,
        body,
        [_turn(message) for message in body.messages],
        body.tools or [],
    )


def _generate_ask(served: Served, body: GenerateBody) -> Ask:
    _check_images(body.images)
    plain = served.model.tokenizer.chat_template is None and not body.system
    if not (body.raw or plain):
        system = [turn("system", body.system)] if body.system else []
        return ask_of(served, _talk(served, body, [*system, turn("user", body.prompt)], []))
    for name, given in (("system", body.system), ("think", body.think)):
        if given:
            raise ApiError(400, f"{name} needs a chat template, and none is used", param=name)
    grammar = _grammar(served, body)
    return Ask(
        prompt_ids=tuple(served.model.text_ids(body.prompt)),
        sampling=_sampling(served, body),
        constraint=None if grammar is None else served.grammars.constraint(grammar()),
    )


def _talk(
    served: Served, body: OllamaBody, messages: list[dict[str, Any]], tools: list[Tool]
) -> Talk:
    if isinstance(body.think, str):
        effort: str | None = body.think
    else:
        effort = {None: None, True: "high", False: "none"}[body.think]
    return Talk(
        messages=messages,
        sampling=_sampling(served, body),
        tools=tools_of(tools),
        strict=frozenset(tool.function.name for tool in tools if tool.function.strict),
        variables=thinking_variables(effort),
        grammar=_grammar(served, body),
        thinking_tokens=thinking_tokens(effort),
    )


def _turn(message: Message) -> dict[str, Any]:
    _check_images(message.images)
    return turn(
        message.role,
        message.content or "",
        thoughts=message.thinking,
        calls=[
            tool_call(call.id or f"call_{number}", call.function.name, call.function.arguments)
            for number, call in enumerate(message.tool_calls or ())
        ],
        call_id=message.tool_call_id,
        name=message.tool_name,
    )


def _check_images(images: list[Any] | None) -> None:
    if images:
        raise ApiError(400, "images are not understood: only text is", param="images")


def _sampling(served: Served, body: OllamaBody) -> SamplingParams:
    options = body.options or Options.model_validate({})
    room = served.model.max_context
    if options.num_ctx is not None and options.num_ctx > room:
        raise ApiError(
            400,
            f"num_ctx: this server has room for {room:,} tokens; start it with a larger --context",
            param="num_ctx",
        )
    if body.top_logprobs > served.limits.logprobs:
        raise ApiError(400, f"top_logprobs: at most {served.limits.logprobs}", param="top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    most = options.num_predict
    stop = (options.stop,) if isinstance(options.stop, str) else options.stop
    sampling = sampling_with(
        served,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=None if options.seed == -1 else options.seed,  # Ollama's way to say: any
        stop=None if stop is None else tuple(stop),
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logprobs=body.top_logprobs if body.logprobs else None,
    )
    return replace(sampling, max_tokens=None if most is None or most < 0 else most)


def _grammar(served: Served, body: OllamaBody) -> Callable[[], str] | None:
    wanted = body.format
    if not wanted:
        return None
    if isinstance(wanted, str):
        return served.grammars.json_object
    return lambda: served.grammars.json_schema(wanted)


# What an endpoint calls text, thoughts and calls.
_Words = Callable[[str, str, list[dict[str, Any]]], dict[str, Any]]


def _message(text: str, thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thoughts:
        message["thinking"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _plain(text: str, thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text, "thinking": thoughts} if thoughts else {"response": text}


def _frame(served: Served) -> dict[str, Any]:
    return {"model": served.name, "created_at": datetime.now(UTC).isoformat()}


def _loaded(served: Served, body: OllamaBody, words: _Words) -> Response:
    """A request without a question loads the model, or unloads it."""
    if body.keep_alive is not None and str(body.keep_alive).strip("hms.0") == "":
        raise ApiError(400, "keep_alive: this server does not unload its model", param="keep_alive")
    return JSONResponse(_frame(served) | words("", "", []) | {"done": True, "done_reason": "load"})


async def _answer(reply: _Reply, request: Request) -> Response:
    if not reply.body.stream:
        return JSONResponse(await until_gone(request, reply.whole()))
    return await event_stream(
        request,
        reply.stream(),
        media_type="application/x-ndjson",
        ping=b"",
        wrap_error=_line,
    )


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode() + b"\n"


class _Reply:
    def __init__(self, served: Served, body: OllamaBody, ask: Ask, words: _Words) -> None:
        self._served, self.body, self._ask, self._words = served, body, ask, words
        self._usage, self._blocks = Usage(prompt=len(ask.prompt_ids)), Blocks()
        self._calls: list[dict[str, Any]] = []
        self._begun = time.monotonic_ns()
        self._first: int | None = None
        self._reason = "stop"

    async def _steps(self) -> AsyncGenerator[tuple[Piece, list[Change]], None]:
        async with aclosing(answers(self._served, self._ask)) as pieces:
            async for piece in pieces:
                self._first = self._first or time.monotonic_ns()
                self._usage.count(piece)
                changes = self._blocks.take(piece.deltas)
                if piece.finish is not None:
                    changes += self._blocks.end()
                    self._reason = "length" if piece.finish == "length" else "stop"
                yield piece, changes

    async def whole(self) -> dict[str, Any]:
        logprobs: list[dict[str, Any]] = []
        async with aclosing(self._steps()) as steps:
            async for piece, changes in steps:
                logprobs += chat_logprobs(self._served, piece.event)
                for change in changes:
                    self._call_of(change)
        text, thoughts = (
            "".join(block.text for block in self._blocks.all if block.kind == kind)
            for kind in ("text", "thoughts")
        )
        found = self._frame(text, thoughts, self._calls) | self._end()
        return found | {"logprobs": logprobs} if self.body.logprobs else found

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._steps()) as steps:
            async for piece, changes in steps:
                frames = [frame for change in changes if (frame := self._frame_of(change))]
                if self.body.logprobs and piece.event.logprobs is not None:
                    frames = frames or [self._frame("", "", [])]
                    frames[-1]["logprobs"] = chat_logprobs(self._served, piece.event)
                for frame in frames:
                    yield _line(frame | {"done": False})
        yield _line(self._frame("", "", []) | self._end())

    def _frame(self, text: str, thoughts: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return _frame(self._served) | self._words(text, thoughts, calls)

    def _frame_of(self, change: Change) -> dict[str, Any] | None:
        kind = change.block.kind
        if kind == "call":
            call = self._call_of(change)
            return None if call is None else self._frame("", "", [call])
        if not change.more:
            return None
        return self._frame(*((change.more, "") if kind == "text" else ("", change.more)), [])

    def _call_of(self, change: Change) -> dict[str, Any] | None:
        """A call when it is complete; one that is cut off is none."""
        block = change.block
        if block.kind != "call" or change.what != "end" or block.arguments is None:
            return None
        self._calls.append(
            {
                "id": block.call_id,
                "function": {
                    "index": len(self._calls),
                    "name": block.name,
                    "arguments": block.arguments,
                },
            }
        )
        return self._calls[-1]

    def _end(self) -> dict[str, Any]:
        now = time.monotonic_ns()
        first = self._first or now
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": now - self._begun,
            "load_duration": 0,
            "prompt_eval_count": self._usage.prompt,
            "prompt_eval_duration": first - self._begun,
            "eval_count": self._usage.completion,
            "eval_duration": now - first,
        }
