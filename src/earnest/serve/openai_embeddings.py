"""`/v1/embeddings`: a vector for a text. By default the mean of its tokens' hidden states after the
final norm, of length 1; `pooling` and `normalize` say otherwise."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from earnest.engine import PoolingKind
from earnest.runners.base import Float32
from earnest.serve.bodies import Strict, check_model
from earnest.serve.embedding import MAX_INPUTS, embedded
from earnest.serve.http import ApiError, until_gone
from earnest.serve.openai_common import salt_of
from earnest.serve.state import Served


class EmbeddingsBody(Strict):
    """A request for vectors."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: PoolingKind = "mean"
    normalize: bool = True
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None
    # Of no consequence: it names the caller.
    user: str | None = None


def router(served: Served) -> APIRouter:
    """The endpoint."""
    api = APIRouter()

    @api.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Vectors for texts.

        The mean of the hidden states of all tokens, after the model's final norm (`pooling`
        "mean"), or that of the last token ("last"); scaled to length 1 unless `normalize` is false.
        """
        prompts = await run_in_threadpool(lambda: _prompts(served, body))
        work = embedded(
            served,
            prompts,
            body.pooling,
            normalize=body.normalize,
            salt=salt_of(body.cache_salt),
            priority=body.priority,
        )
        vectors, cached = await until_gone(request, work)
        tokens = sum(map(len, prompts))
        usage = {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        written = await run_in_threadpool(lambda: _written(served, body, vectors, usage))
        return Response(written, media_type="application/json")

    return api


def _prompts(served: Served, body: EmbeddingsBody) -> list[list[int]]:
    check_model(served, body.model)
    size = served.model.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(
            400,
            f"dimensions is not supported: this model's vectors have {size:,}, and were not made "
            "to be cut",
            param="dimensions",
        )
    given: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    if given and isinstance(given[0], int):
        given = [given]
    if not given or not all(given):
        raise ApiError(400, "input is empty, or a part of it", param="input")
    if len(given) > MAX_INPUTS:
        raise ApiError(400, f"too many texts: at most {MAX_INPUTS:,}", param="input")
    return [_encoded(served, body, part) if isinstance(part, str) else part for part in given]


def _encoded(served: Served, body: EmbeddingsBody, text: str) -> list[int]:
    return served.model.tokenizer.encode(
        text, add_special_tokens=body.add_special_tokens, parse_special=True
    )


def _written(
    served: Served, body: EmbeddingsBody, vectors: list[Float32], usage: dict[str, Any]
) -> bytes:
    def shown(vector: Float32) -> str | list[float]:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers

    data = [
        {"object": "embedding", "index": index, "embedding": shown(vector)}
        for index, vector in enumerate(vectors)
    ]
    reply = {
        "object": "list",
        "data": data,
        "model": served.name,
        "usage": usage,
        "pooling": body.pooling,
        "normalized": body.normalize,
    }
    return json.dumps(reply).encode()
