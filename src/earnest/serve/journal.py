"""What happened to each request: one `Record`, one line in the log when it ends.

A line never holds a prompt, an answer or a key. Of refusals it has the status and the parameter:
their messages may quote what was sent.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import secrets
import sys
import threading
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from earnest.engine import SamplingParams, TokenEvent
from earnest.log import logger

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")

_requests = logger.getChild("serve")
_MOST_LINES, _FLUSH_SECONDS = 10_000, 2.0
# Asked every few seconds by whoever watches a server: worth a line only to whoever looks closely.
_PROBES = ("/health", "/ready", "/metrics")
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_PLAIN = re.compile(r"[A-Za-z0-9._:/+=@,\[\]-]+")


@dataclass
class Record:
    """One request, from its arrival to its end. Times are of `time.monotonic()`.

    Attributes:
        id: the client's own, or a fresh one; in every reply as `x-request-id`.
        method, path, client: of HTTP; the client is an address.
        trace: headers that tell of the trace it belongs to.
        tenant: a hash of its API key; nothing where there are no keys. Different tenants share no
            computed prefixes.
        began, began_at: when it came, and the same by the calendar (seconds since 1970).
        status: of the reply, or of the error that ended a stream; 499 if the client had gone before
            it began.
        complete: whether the whole reply was sent.
        error: the kind of what went wrong, and `param`, what was wrong about the request.
        model, sampling, answers: what the engine was asked for; None: it was not.
        prompt, cached, completion: tokens.
        submitted, admitted, first, last: when the engine got it, when the first of its answers took
            KV blocks, the times of its first and last token.
        finish: how each answer ended.
    """

    id: str
    method: str = ""
    path: str = ""
    client: str = ""
    trace: dict[str, str] = field(default_factory=dict)
    tenant: bytes = field(default=b"", repr=False)
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    status: int = 0
    complete: bool = False
    error: str | None = None
    param: str | None = None
    model: str | None = None
    sampling: SamplingParams | None = None
    answers: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    submitted: float | None = None
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    finish: list[str] = field(default_factory=list)

    def asks(self, model: str, prompt: int, sampling: SamplingParams | None, answers: int) -> None:
        """The engine is asked, without `sampling` only to read; requests with several prompts ask
        several times."""
        self.model, self.sampling = model, sampling
        self.prompt += prompt
        self.answers += answers
        if self.submitted is None:
            self.submitted = time.monotonic()

    def took(self, which: int, event: TokenEvent, now: float, finish: str | None) -> None:
        """A token of one of the answers came."""
        if event.token_id is not None:
            self.completion += 1
        if self.first is None:
            self.first = now
        if self.admitted is None:
            self.admitted = event.admitted_at
        if event.cached_tokens and which == 0:
            self.cached += event.cached_tokens
        self.last = now
        if finish is not None:
            self.finish.append(finish)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what does not apply; times in seconds."""
        found: dict[str, Any] = {
            "request_id": self.id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "duration": _seconds(self.began, time.monotonic()),
            "client": self.client,
        }
        if self.submitted is not None:
            found |= {
                "model": self.model,
                "prompt_tokens": self.prompt,
                "cached_tokens": self.cached,
                "completion_tokens": self.completion,
                "finish_reason": ",".join(self.finish) or None,
                "queue_time": _seconds(self.submitted, self.admitted),
                "time_to_first_token": _seconds(self.began, self.first),
            }
        if not self.complete:
            found["incomplete"] = True
        found |= {"error": self.error, "param": self.param}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def is_probe(self) -> bool:
        """Whether somebody only looked whether the server is there."""
        return self.path in _PROBES

    def write(self) -> None:
        """The line in the log."""
        level = logging.DEBUG if self.is_probe else logging.INFO
        if self.status >= 500:
            level = logging.ERROR
        if _requests.isEnabledFor(level):
            _requests.log(level, "request", extra={"fields": self.to_dict()})


def _seconds(start: float, end: float | None) -> float | None:
    return None if end is None else round(max(0.0, end - start), 6)


# The request on whose behalf something is done.
_current: ContextVar[Record | None] = ContextVar("earnest_request", default=None)


def begin(record: Record) -> None:
    """From now on, in this task and those it starts, this is the request."""
    _current.set(record)


def current() -> Record:
    """The request on whose behalf this is done; outside of any, one that nobody reads."""
    return _current.get() or Record("")


def request_id(given: str) -> str:
    """The client's id for a request if it is one that can be written anywhere, else a fresh one."""
    return given if _GOOD_ID.fullmatch(given) else secrets.token_hex(16)


# --- how lines look -----------------------------------------------------------------------------


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()}"
        for name, value in _fields(record).items():
            text = str(value)
            line += f" {name}={text if _PLAIN.fullmatch(text) else json.dumps(text)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    mine = _current.get()
    if fields or mine is None:
        return fields
    return {"request_id": mine.id}  # whatever else is told on a request's behalf


class _Aside(logging.Handler):
    """Writes on a thread of its own: whoever stops reading a server's standard error must not stop
    the server. What there is no room for is counted, and told of when there is."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._lost = stream, 0
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_LINES)  # None: look up
        self._closing = False
        threading.Thread(target=self._write, name="earnest-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            logger.warning("%d lines of this log were lost: nobody read them in time", lost)

    def _write(self) -> None:
        while not (self._closing and self._lines.empty()):
            line = self._lines.get()
            if line is not None:
                with suppress(OSError, ValueError):  # nobody is there to read it
                    self._stream.write(line + "\n")
                    self._stream.flush()
            self._lines.task_done()

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        done = self._lines.all_tasks_done
        with done:
            done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_SECONDS)

    def close(self) -> None:
        """End the thread, once it has written what there is; nobody waits for that here."""
        self._closing = True
        with suppress(queue.Full):  # then the thread has lines to take, and sees it after them
            self._lines.put_nowait(None)
        super().close()


def configure(level: str, style: LogFormat, stream: TextIO | None = None) -> None:
    """Have what Earnest and uvicorn tell written to standard error, each thing once.

    So is whatever else the process logs and nobody handles. Python would write that at once, on the
    thread that logs: asyncio tells of every piece written to a client that has gone, and stopped
    the event loop for good when a pipe that nobody read was full of it.

    Told again, it takes the place of what it did before, which is written first.

    Args:
        level: one of `LEVELS`; of uvicorn only warnings and errors are of interest, of asyncio
            only errors.
        style: "text", for people, or "json", an object on each line.
        stream: in place of standard error.
    """
    names = ("earnest", "uvicorn", "asyncio", None)
    loggers = [logging.getLogger(name) for name in names]
    former = {one for found in loggers for one in found.handlers if isinstance(one, _Aside)}
    for one in former:
        one.flush()
    handler = _Aside(stream or sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Text())
    for name, least in (("earnest", level), ("uvicorn", "warning"), ("asyncio", "error")):
        found = logging.getLogger(name)
        found.handlers = [handler]
        found.propagate = False
        found.setLevel(
            max(logging.getLevelName(level.upper()), logging.getLevelName(least.upper()))
        )
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if one not in former] or [handler]
    for one in former:  # whatever came to it meanwhile is still written
        one.close()
    logging.captureWarnings(True)
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
