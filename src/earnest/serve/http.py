"""What all interfaces share on the wire: errors, event streams, keys, limits, request ids."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
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
from earnest.serve.journal import Record, begin, current, request_id
from earnest.serve.state import Served
from earnest.serve.traces import TRACE_HEADERS

T = TypeVar("T")

# Seconds of silence after which a stream says that it is still there.
_KEEP_ALIVE = 15.0
_LONGEST_MESSAGE = 4000  # characters of an error
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

_STATUS: tuple[tuple[type[EarnestError], int], ...] = (
    (BusyError, 429),
    (DeadlineError, 504),
    (ShuttingDownError, 503),
    (MemoryBudgetError, 503),
    (UserError, 400),
    (TemplateError, 400),
)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for a person.
        param: the parameter that is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        if len(message) > _LONGEST_MESSAGE:  # it may quote what was sent
            message = message[:_LONGEST_MESSAGE] + "…"
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def api_error(error: EarnestError) -> ApiError:
    """The answer to an error of the engine or of what was asked."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 500:
        logger.error("a request failed: %s", error)
    return ApiError(status, str(error))


def _kind(error: ApiError) -> str:
    other = "invalid_request_error" if error.status < 500 else "api_error"
    return _KINDS.get(error.status, other)


def error_body(path: str, error: ApiError, request_id: str = "") -> dict[str, Any]:
    """An error in the words of the interface that `path` belongs to."""
    kind = _kind(error)
    if path.startswith("/v1/messages"):
        body = {"type": "error", "error": {"type": kind, "message": error.message}}
        return body | {"request_id": request_id}
    if path.startswith("/api/"):
        return {"error": error.message}
    code = "context_length_exceeded" if "room in the context" in error.message else None
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_response(
    request: Request, error: ApiError, headers: Mapping[str, str] | None = None
) -> Response:
    """The error, and how to come again."""
    record, headers = current(), dict(headers or {})
    record.error, record.param = _kind(error), error.param
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    request_id = request.scope.get("request_id", "")
    body = error_body(request.url.path, error, request_id)
    return JsonReply(body, error.status, headers=headers)


def json_bytes(data: object) -> bytes:
    """Compact JSON. Half a surrogate pair, which a client's JSON may hold and UTF-8 cannot, is
    written as it came: `\\ud800`."""
    return _JSON.encode(data).encode("utf-8", "backslashreplace")


class JsonReply(JSONResponse):
    """A reply of `json_bytes`."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_bytes(content)


# --- streams ------------------------------------------------------------------------------------


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event."""
    text = data.encode() if isinstance(data, str) else json_bytes(data)
    head = f"event: {event}\n".encode() if event else b""
    return b"%sdata: %s\n\n" % (head, text)


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

    return _Stream(request, first, source, media_type, ping, wrap_error)


class _Stream(Response):
    """Pieces as they come. One task sends them, without another for each; one more waits for the
    client to go away, and one for silence."""

    def __init__(
        self,
        request: Request,
        first: bytes,
        source: AsyncGenerator[bytes, None],
        media_type: str,
        ping: bytes,
        wrap_error: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._path, self._first, self._source = request.url.path, first, source
        self._ping, self._wrap_error = ping, wrap_error
        self._silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        others = [asyncio.ensure_future(_gone(receive))]
        if self._ping:
            others.append(asyncio.ensure_future(self._say_so(send, sending)))
        try:
            await asyncio.wait({sending, others[0]}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, *others):
                task.cancel()
            await asyncio.gather(sending, *others, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._source):
            await send(_body(self._first))
            try:
                async for piece in self._source:
                    await send(_body(piece))
                    self._silent = False
            except (EarnestError, ApiError) as error:
                found = error if isinstance(error, ApiError) else api_error(error)
                record = current()
                record.error, record.status = _kind(found), found.status
                await send(_body(self._wrap_error(error_body(self._path, found))))
        self._ping = b""
        await send(_body(b"", more=False))

    async def _say_so(self, send: Send, sending: asyncio.Future[None]) -> None:
        while True:
            self._silent = True
            await asyncio.sleep(_KEEP_ALIVE)
            if self._silent and self._ping and not sending.done():
                await send(_body(self._ping))


def _body(piece: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        # Not asked now and then: 200 that waited took a tenth of the tokens (docs/log.md).
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    return task.result()


# --- keys and limits ----------------------------------------------------------------------------

# What can be asked without a key: whether the server is there, and the pages that ask for the key.
_OPEN = ("/", "/docs", "/health", "/ready", "/favicon.ico")
# Where the scripts and styles of those pages are.
PAGE_PARTS = "/web/"


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
        record = _record(scope, headers)
        scope["request_id"] = record.id
        begin(record)
        name = record.id.encode()
        own = [(b"x-request-id", name)]
        if record.path.startswith("/v1/messages"):
            own.append((b"request-id", name))  # as Anthropic's clients know it

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)
            if message["type"] == "http.response.body":
                record.complete = not message.get("more_body", False)

        try:
            await self._answer(scope, headers, receive, named)
        except Exception as error:
            record.error = type(error).__name__
            if record.status:  # all that is left is to cut the connection, which uvicorn does
                raise
            logger.exception("a request failed in a way that nobody foresaw")
            failed = ApiError(500, f"the server failed; its log tells more, under {record.id}")
            await error_response(Request(scope), failed)(scope, receive, named)
        finally:
            record.write()
            if self._served.traces is not None:
                self._served.traces.ended(record, time.monotonic())

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        problem = self._problem(scope, headers)
        if problem is not None:
            await error_response(Request(scope), problem)(scope, receive, send)
            return

        # Unless told otherwise, curl calls every body a form, and few examples tell it. Here all
        # are JSON; web pages, which must not be able to post forms, were dealt with above.
        kept = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-type"]
        scope = {**scope, "headers": [*kept, (b"content-type", b"application/json")]}
        limits = self._served.limits
        if self._keys:
            current().tenant = _hashed(key_of(headers))[:16]
        await self._app(scope, _Bounded(receive, limits.body_bytes, limits.body_seconds), send)

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        limit = self._served.limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return _too_large(limit)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return ApiError(
                415, "the body is compressed: send it as it is, without content-encoding"
            )
        path = scope["path"]
        if path.startswith(PAGE_PARTS):  # browsers fetch scripts with an origin, even their own
            return None
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not self._may_call(origin, headers.get(b"host", b"").decode("latin-1")):
            return ApiError(403, f"pages of {origin:.200} may not call this server; see --cors")
        if not self._keys or path in _OPEN or scope["method"] == "OPTIONS":
            return None
        # All are compared, each in constant time: neither which key nor how much of it was right
        # shows in how long it takes.
        key = _hashed(key_of(headers))
        known = [hmac.compare_digest(key, k) for k in self._keys]
        if any(known):
            return None
        return ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

    def _may_call(self, origin: str, host: str) -> bool:
        """Whether a web page may: it is listed, of this machine, or the server's own.

        A name in `host` proves nothing, since whoever owns the name can let it point here; an
        address does.
        """
        if origin in self._served.origins or "*" in self._served.origins:
            return True
        name = ""
        try:
            page = urlsplit(origin)
            name = page.hostname or ""
            address = ip_address(name)
        except ValueError:  # a name, or nothing at all
            return name == "localhost"
        return address.is_loopback or page.netloc == host


def _record(scope: Scope, headers: dict[bytes, bytes]) -> Record:
    client = scope.get("client")
    return Record(
        request_id(headers.get(b"x-request-id", b"").decode("latin-1")),
        method=scope["method"],
        path=scope["path"],
        client=client[0] if client else "unix",
        trace={
            name: headers[name.encode()].decode("latin-1")
            for name in TRACE_HEADERS
            if name.encode() in headers
        },
    )


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


def key_of(headers: Mapping[bytes, bytes]) -> str:
    """The API key that a request shows; "": none. Names of headers are in lower case."""
    bearer = headers.get(b"authorization", b"")
    key = bearer[7:] if bearer[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
    return key.decode("latin-1").strip()


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
