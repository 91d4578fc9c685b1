"""`connection_of`: what a connection may keep waiting.

uvicorn bounds how long a connection may lie idle between requests, and the `Gate` how long a body
may take. Two things are left, either of which would hold a connection for ever: a head that comes
byte by byte or not at all (the "slow loris"), and an answer that nobody reads.

Beside that, a request whose body turns out to be no HTTP is answered once: uvicorn says 400, and
would let the application answer the same request.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from earnest.serve.state import Limits


def connection_of(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol, bounded by `limits.head_seconds` and `limits.unread_seconds`."""

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head, self._answer = _Timer(self), _Timer(self)
            self._head.start(limits.head_seconds)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head.stop()
            elif self.timeout_keep_alive_task is None:  # the beginning of a request
                self._head.start(limits.head_seconds)

        def send_400_response(self, msg: str) -> None:
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:  # or it would answer, too
                cycle.disconnected = True
                cycle.message_event.set()
            try:
                super().send_400_response(msg)
            except h11.LocalProtocolError:  # an answer has begun or is over, or HEAD takes no text
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer.start(limits.unread_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._answer.stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.stop()
            self._answer.stop()
            super().connection_lost(exc)

    return Connection


class _Timer:
    """Ends a connection, unless it is stopped in time."""

    def __init__(self, connection: H11Protocol) -> None:
        self._connection = connection
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begin to count; goes on where it was if it does already."""
        if self._handle is None:
            connection = self._connection
            self._handle = connection.loop.call_later(seconds, connection.transport.abort)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
