"""`/api/embed` and the older `/api/embeddings`: Ollama's way to ask for vectors."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from earnest.engine import PoolingKind
from earnest.serve.bodies import Strict
from earnest.serve.embedding import MAX_INPUTS, embedded
from earnest.serve.http import ApiError, until_gone
from earnest.serve.ollama import check_name
from earnest.serve.state import Served


class EmbedOptions(Strict):
    """How much of a text is read."""

    num_ctx: int | None = Field(None, ge=1)


class EmbedBody(Strict):
    """A request for the vectors of texts; `pooling` is not Ollama's."""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = None
    pooling: PoolingKind = "mean"
    options: EmbedOptions | None = None
    # Of no consequence: the model is always there.
    keep_alive: float | str | None = None


class EmbeddingsBody(Strict):
    """A request for one vector, as older clients write it."""

    model: str
    prompt: str = ""
    pooling: PoolingKind = "mean"
    options: EmbedOptions | None = None
    # Of no consequence: the model is always there.
    keep_alive: float | str | None = None


def router(served: Served) -> APIRouter:
    """The endpoints."""
    api = APIRouter()

    @api.post("/api/embed", tags=["Ollama"])
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Vectors for texts, of length 1."""
        begun = time.monotonic_ns()
        _check(served, body.model, body.dimensions)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if len(texts) > MAX_INPUTS:
            raise ApiError(400, f"too many texts: at most {MAX_INPUTS:,}", param="input")
        limit = _limit(served, body.options)
        prompts = await run_in_threadpool(
            lambda: [_prompt(served, text, limit, body.truncate) for text in texts if text]
        )
        work = embedded(served, prompts, body.pooling, normalize=True)
        vectors, _ = await until_gone(request, work)
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": [vector.tolist() for vector in vectors],
                "total_duration": time.monotonic_ns() - begun,
                "load_duration": 0,
                "prompt_eval_count": sum(map(len, prompts)),
            }
        )

    @api.post("/api/embeddings", tags=["Ollama"])
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """The vector of one text, of whatever length."""
        _check(served, body.model, None)
        found: list[float] = []
        if body.prompt:
            limit = _limit(served, body.options)
            ids = await run_in_threadpool(lambda: _prompt(served, body.prompt, limit, cut=True))
            work = embedded(served, [ids], body.pooling, normalize=False)
            (vector,), _ = await until_gone(request, work)
            found = vector.tolist()
        return JSONResponse({"embedding": found})

    return api


def _check(served: Served, name: str, dimensions: Any) -> None:
    check_name(served, name)
    size = served.model.config.hidden_size
    if dimensions not in (None, 0, size):
        raise ApiError(
            400,
            f"dimensions is not supported: this model's vectors have {size:,}",
            param="dimensions",
        )


def _limit(served: Served, options: EmbedOptions | None) -> int:
    room, asked = served.model.max_context, None if options is None else options.num_ctx
    if asked is not None and asked > room:
        raise ApiError(
            400,
            f"num_ctx: this server has room for {room:,} tokens; start it with a larger --context",
            param="num_ctx",
        )
    return room if asked is None else asked


def _prompt(served: Served, text: str, limit: int, cut: bool) -> list[int]:
    ids = served.model.text_ids(text)
    if len(ids) > limit and not cut:
        raise ApiError(
            400, f"the input has {len(ids):,} tokens, more than {limit:,}", param="input"
        )
    return ids[:limit]
