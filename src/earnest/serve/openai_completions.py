"""`/v1/completions`: text or token ids go on; with `echo` and `logprobs`, what the model thinks of
a text, which evaluation needs."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from earnest import engine
from earnest.engine import TokenEvent, TokenLogprobs
from earnest.serve.answering import Answer, Ask, Usage, answers, banning, collected
from earnest.serve.http import ApiError, event_stream, sse, until_gone
from earnest.serve.openai_common import (
    Sampled,
    check_common,
    check_count,
    grammar_of,
    salt_of,
    sampling_of,
    token_text,
    top_of,
    usage_of,
)
from earnest.serve.state import Served


class CompletionBody(Sampled):
    """A request for a completion."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = None
    suffix: None = None
    add_special_tokens: bool = True


def router(served: Served) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        asks = await run_in_threadpool(lambda: _asks(served, body))
        reply = _Reply(served, body, asks)
        if body.stream:
            return await event_stream(request, reply.stream())
        return JSONResponse(await until_gone(request, reply.whole()))

    return api


def _asks(served: Served, body: CompletionBody) -> list[Ask]:
    check_common(served, body)
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(400, "best_of is not supported, unless it equals n", param="best_of")
    if body.logprobs is not None and body.logprobs > served.limits.logprobs:
        raise ApiError(400, f"logprobs: at most {served.limits.logprobs}", param="logprobs")
    prompts = _prompts(served, body)
    if len(prompts) > served.limits.answers:
        raise ApiError(400, f"too many prompts: at most {served.limits.answers}", param="prompt")
    check_count(served, body.n, len(prompts))
    grammar = grammar_of(served, body)
    constraint = None if grammar is None else served.grammars.constraint(grammar())
    constraint = banning(served, body.bad_words or (), constraint)
    sampling = sampling_of(
        served,
        body,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    asks = [
        Ask(
            prompt_ids=tuple(ids),
            sampling=sampling,
            count=body.n,
            constraint=constraint,
            salt=salt_of(body.cache_salt),
            priority=body.priority,
        )
        for ids in prompts
    ]
    for ask in asks:  # before any of them runs
        served.model.engine.check(engine.Request(ask.prompt_ids, ask.sampling))
    return asks


def _prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if not given:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if isinstance(given[0], int):
        return [given]
    return [_encoded(served, body, part) if isinstance(part, str) else part for part in given]


def _encoded(served: Served, body: CompletionBody, text: str) -> list[int]:
    return served.model.tokenizer.encode(
        text, add_special_tokens=body.add_special_tokens, parse_special=True
    )


@dataclass
class _Table:
    """`logprobs` of a completion, token by token."""

    served: Served
    offset: int = 0

    def rows(self, tokens: list[tuple[int, TokenLogprobs | None]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, value in tokens:
            text = token_text(self.served, token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if value is None else value.logprob)
            found["top_logprobs"].append(None if value is None else top_of(self.served, value))
            found["text_offset"].append(self.offset)
            self.offset += len(text)
        return found


class _Reply:
    def __init__(self, served: Served, body: CompletionBody, asks: list[Ask]) -> None:
        self._served, self._body, self._asks = served, body, asks
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._served.name,
        }

    async def whole(self) -> dict[str, Any]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(collected(self._served, ask)) for ask in self._asks]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        choices: list[dict[str, Any]] = []
        total = Usage()
        for ask, task in zip(self._asks, tasks, strict=True):
            found, usage = task.result()
            total.prompt += usage.prompt
            total.cached += usage.cached
            total.completion += usage.completion
            choices += [self._choice(len(choices) + i, ask, a) for i, a in enumerate(found)]
        return self._frame() | {"choices": choices, "usage": usage_of(total)}

    def _choice(self, index: int, ask: Ask, answer: Answer) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = _Table(self._served).rows(
                [*self._of_prompt(ask, answer.events[0]), *_of_answer(answer.events)]
            )
        choice = {
            "index": index,
            "text": self._echo(ask) + answer.content,
            "logprobs": logprobs,
            "finish_reason": answer.finish,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(ask.prompt_ids)
            choice["token_ids"] = [e.token_id for e in answer.events if e.token_id is not None]
        return choice

    def _echo(self, ask: Ask) -> str:
        if not self._body.echo or self._served.tokenizer is None:
            return ""
        return self._served.tokenizer.decode(ask.prompt_ids)

    def _of_prompt(self, ask: Ask, first: TokenEvent) -> list[tuple[int, TokenLogprobs | None]]:
        if not self._body.echo or first.prompt_logprobs is None:
            return []
        return list(zip(ask.prompt_ids, first.prompt_logprobs, strict=True))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        if len(self._asks) > 1:
            raise ApiError(400, "a stream takes one prompt", param="prompt")
        (ask,) = self._asks
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        usage = Usage(prompt=len(ask.prompt_ids))
        tables: dict[int, _Table] = {}
        async with aclosing(answers(self._served, ask)) as pieces:
            async for piece in pieces:
                usage.count(piece)
                first = piece.which not in tables
                table = tables.setdefault(piece.which, _Table(self._served))
                text = "".join(delta.content for delta in piece.deltas)
                tokens = _of_answer([piece.event])
                if first:
                    text = self._echo(ask) + text
                    tokens = [*self._of_prompt(ask, piece.event), *tokens]
                logprobs = None if self._body.logprobs is None else table.rows(tokens)
                if not text and logprobs is None and piece.finish is None:
                    continue
                choice = {
                    "index": piece.which,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": piece.finish,
                }
                if self._body.return_token_ids:
                    choice["token_ids"] = [token for token, _ in tokens]
                frame = self._frame() | {"choices": [choice]}
                yield sse(frame | {"usage": None} if with_usage else frame)
        if with_usage:
            yield sse(self._frame() | {"choices": [], "usage": usage_of(usage)})
        yield sse("[DONE]")


def _of_answer(events: list[TokenEvent]) -> list[tuple[int, TokenLogprobs | None]]:
    return [(event.token_id, event.logprobs) for event in events if event.token_id is not None]
