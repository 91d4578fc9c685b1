"""`create_app`: all endpoints in one ASGI application."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from earnest.errors import EarnestError
from earnest.serve import (
    anthropic_messages,
    ollama,
    ollama_embed,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    page,
    plain,
)
from earnest.serve.description import describe
from earnest.serve.http import ApiError, Gate, api_error, error_response
from earnest.serve.state import Served


def create_app(served: Served) -> FastAPI:
    """The server's application; whoever runs it closes `served.service` at the end.

    Args:
        served: what is served, and how.
    """
    # The framework's own pages load scripts of other hosts; `page` has one that does not.
    app = FastAPI(title="Earnest", version=version("earnest"), docs_url=None, redoc_url=None)
    for part in (
        *(openai_chat, openai_completions, openai_responses, openai_embeddings),
        *(anthropic_messages, ollama, ollama_models, ollama_embed, plain),
    ):
        app.include_router(part.router(served))
    app.include_router(page.router())

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error_response(request, error)

    @app.exception_handler(EarnestError)
    async def refused(request: Request, error: EarnestError) -> Response:
        return error_response(request, api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(request, _invalid(request.url.path, error))

    @app.exception_handler(HTTPException)
    async def plainly(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, str(error.detail))
        return error_response(request, found, error.headers)

    describe(app, served.name)
    app.add_middleware(Gate, served=served)
    if served.origins:  # outermost, so that pages can read refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(served.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _invalid(path: str, error: RequestValidationError) -> ApiError:
    """The first few things that are wrong with a body, each by name.

    400, as OpenAI, Anthropic and Ollama answer; on paths of our own 422 for JSON that is none of
    what was asked for (docs/serve.md).
    """
    problems = []
    first = None
    for found in error.errors()[:5]:
        name = ".".join(str(part) for part in found["loc"][1:]) or "the body"
        first = first or name[:100]
        if found["type"] == "extra_forbidden":
            problems.append(f"{name:.100}: this parameter is not supported")
        else:
            problems.append(f"{name:.100}: {found['msg']:.200}")
    broken = any(found["type"] == "json_invalid" for found in error.errors())
    status = 400 if broken or path.startswith(("/v1/", "/api/")) else 422
    return ApiError(status, "; ".join(problems), param=first)
