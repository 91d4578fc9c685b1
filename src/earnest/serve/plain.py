"""The small endpoints: what is served, tokens, how the server is."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from earnest.serve.bodies import Strict, check_model
from earnest.serve.http import ApiError
from earnest.serve.openai_chat import ChatMessage, message_of
from earnest.serve.openai_common import token_text
from earnest.serve.state import Served

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizeBody(Strict):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


def router(served: Served) -> APIRouter:
    """The endpoints."""
    api = APIRouter()

    @api.get("/health", tags=["server"])
    async def health() -> Response:
        """Whether the process can answer: 200, or 503 once the engine's thread is gone."""
        return PlainTextResponse(
            "ok\n" if served.service.alive else "gone\n", _status(served.service.alive)
        )

    @api.get("/ready", tags=["server"])
    async def ready() -> Response:
        """Whether requests are taken: 200, or 503 while the server ends."""
        accepting = served.service.accepting
        return PlainTextResponse("ready\n" if accepting else "ending\n", _status(accepting))

    @api.get("/version", tags=["server"])
    async def show_version() -> dict[str, str]:
        """Version of Earnest and of Python."""
        return {"version": version("earnest"), "python": platform.python_version()}

    @api.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return PlainTextResponse(
            served.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @api.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [_card(served)]}

    @api.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        """The model of a name."""
        check_model(served, name)
        return _card(served)

    @api.get("/tokenizer_info", tags=["tokens"])
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and the chat template: what a client needs that makes prompts itself."""
        tokenizer = served.model.tokenizer
        template = tokenizer.chat_template
        return {
            **{name: tokenizer.special_tokens.get(name) for name in _SPECIAL},
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": served.model.max_context,
            "chat_template": None if template is None else template.source,
        }

    @api.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Text to token ids."""
        check_model(served, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages")
        return await run_in_threadpool(lambda: JSONResponse(_tokenized(served, body)))

    @api.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """Token ids to text."""
        check_model(served, body.model)
        decode = served.model.tokenizer.decode
        return await run_in_threadpool(lambda: JSONResponse({"prompt": decode(body.tokens)}))

    return api


def _status(good: bool) -> int:
    return 200 if good else 503


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "earnest",
        "max_model_len": served.model.max_context,
    }


def _tokenized(served: Served, body: TokenizeBody) -> dict[str, Any]:
    ids = _tokens(served, body)
    found = {"count": len(ids), "max_model_len": served.model.max_context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [token_text(served, token) for token in ids]
    return found


def _tokens(served: Served, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        messages = [message_of(message) for message in body.messages]
        return served.model.chat_ids(messages, add_generation_prompt=body.add_generation_prompt)
    return served.model.tokenizer.encode(
        body.prompt or "", add_special_tokens=body.add_special_tokens, parse_special=True
    )
