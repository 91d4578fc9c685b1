"""What all interfaces share on the wire: errors, event streams, keys, limits, request ids."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from earnest.errors import (
    BusyError,
    DeadlineError,
    EarnestError,
    MemoryBudgetError,
    ShuttingDownError,
    TemplateError,
    UserError,
)
from earnest.log import logger
from earnest.serve.state import Served

T = TypeVar("T")

# Seconds of silence after which a stream says that it is still there.
_KEEP_ALIVE = 15.0
_DISCONNECT_POLL = 0.25

_STATUS: tuple[tuple[type[EarnestError], int], ...] = (
    (BusyError, 429),
    (DeadlineError, 504),
    (ShuttingDownError, 503),
    (MemoryBudgetError, 503),
    (UserError, 400),
    (TemplateError, 400),
)
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for a person.
        param: the parameter that is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def api_error(error: EarnestError) -> ApiError:
    """The answer to an error of the engine or of what was asked."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 500:
        logger.error("a request failed: %s", error)
    return ApiError(status, str(error))


def error_body(path: str, error: ApiError, request_id: str = "") -> dict[str, Any]:
    """An error in the words of the interface that `path` belongs to."""
    kind = _KINDS.get(error.status, "api_error")
    if path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": kind, "message": error.message}}
        return body | {"request_id": request_id}
    if path.startswith("/api/"):
        return {"error": error.message}
    code = "context_length_exceeded" if "room in the context" in error.message else None
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_response(request: Request, error: ApiError) -> Response:
    """The error, and how to come again."""
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    request_id = request.scope.get("request_id", "")
    body = error_body(request.url.path, error, request_id)
    return JSONResponse(body, error.status, headers=headers)


# --- streams ------------------------------------------------------------------------------------


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {text}\n\n".encode()


async def event_stream(
    request: Request,
    source: AsyncGenerator[bytes, None],
    *,
    media_type: str = "text/event-stream",
    ping: bytes = b": still here\n\n",
    wrap_error: Callable[[dict[str, Any]], bytes] = sse,
) -> Response:
    """Stream `source`. What goes wrong before its first piece is a plain error; later ones become a
    piece of the stream. A client that goes away ends the source."""
    try:
        first = await until_gone(request, anext(source))
    except StopAsyncIteration:
        first = b""
    except EarnestError as error:
        raise api_error(error) from error

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(source):
            yield first
            try:
                async for piece in _with_pings(source, ping):
                    yield piece
            except (EarnestError, ApiError) as error:
                found = error if isinstance(error, ApiError) else api_error(error)
                yield wrap_error(error_body(request.url.path, found))

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(body(), media_type=media_type, headers=headers)


async def _with_pings(source: AsyncGenerator[bytes, None], ping: bytes) -> AsyncIterator[bytes]:
    following = asyncio.ensure_future(anext(source))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=_KEEP_ALIVE if ping else None)
            if not done:
                yield ping
                continue
            try:
                piece = following.result()
            except StopAsyncIteration:
                return
            yield piece
            following = asyncio.ensure_future(anext(source))
    finally:
        if not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_DISCONNECT_POLL)
            if not task.done() and await request.is_disconnected():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise ApiError(499, "the client went away")
    finally:
        if not task.done():
            task.cancel()
    return task.result()


# --- keys and limits ----------------------------------------------------------------------------

# What can be asked without a key: whether the server is there, and the page that asks for the key.
_OPEN = ("/", "/health", "/ready", "/favicon.ico")


class Gate:
    """Looks at every request before the application does: its key, its size, how long it takes to
    arrive. Gives it an id.

    Args:
        app: the application.
        served: whose keys and limits.
    """

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app, self._served = app, served
        self._keys = [_hashed(key) for key in served.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")[:128]
        scope["request_id"] = given if given.isprintable() and given else secrets.token_hex(16)
        request = Request(scope)
        problem = self._problem(scope, headers)
        if problem is not None:
            await error_response(request, problem)(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [
                        *message.get("headers", []),
                        (b"x-request-id", scope["request_id"].encode("latin-1", "replace")),
                    ],
                }
            await send(message)

        limits = self._served.limits
        await self._app(scope, _Bounded(receive, limits.body_bytes, limits.body_seconds), named)

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        limit = self._served.limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return _too_large(limit)
        if not self._keys or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return None
        bearer = headers.get(b"authorization", b"")
        key = bearer[7:] if bearer[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
        # All are compared, each in constant time: neither which key nor how much of it was right
        # shows in how long it takes.
        known = [hmac.compare_digest(_hashed(key.decode("latin-1").strip()), k) for k in self._keys]
        if any(known):
            return None
        return ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")


class _Bounded:
    """A request's body, of bounded size and time. Its errors are of the kind that the framework
    passes on from the reading of a body."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._left = receive, most, most
        self._until = asyncio.get_running_loop().time() + seconds
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request did not arrive in time") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._left < 0:
                raise HTTPException(413, _too_large(self._most).message)
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is too large: at most {limit:,} bytes are taken")


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
