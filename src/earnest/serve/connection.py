"""`connection_of`: what a connection may keep waiting, and when it is written to.

uvicorn bounds how long a connection may lie idle between requests, and the `Gate` how long a body
may take. Two things are left, either of which would hold a connection for ever: a head that comes
byte by byte or not at all (the "slow loris"), and an answer that nobody reads.

Beside that, a request whose body turns out to be no HTTP is answered once: uvicorn says 400, and
would let the application answer the same request. And what is written in one turn of the event loop
is sent at its end, all connections together.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from earnest.serve.state import Limits


def connection_of(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol, bounded by `limits.head_seconds` and `limits.unread_seconds`, for the
    connections of one server."""
    together = _Together()

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            held: Any = _Transport(transport, together, self.loop)
            super().connection_made(held)
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


class _Together:
    """The connections that have something to send when the event loop's turn is over.

    A step of the engine brings a piece to every stream. Sent one by one, each wakes its reader
    while the next is still being made; readers on this machine then take a processor from the
    kernels once a piece instead of once a step (docs/log.md, 2026-11-29).
    """

    def __init__(self) -> None:
        self._waiting: list[_Transport] = []

    def add(self, transport: _Transport, loop: asyncio.AbstractEventLoop) -> None:
        """Have it send what it holds after all that is to be done in this turn."""
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.append(transport)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            transport.send()


class _Transport:
    """asyncio's transport, whose writes wait for the end of the event loop's turn."""

    # Beyond it, what is written goes out at once: asyncio's own bound tells the writer to wait.
    MOST_HELD = 65_536

    def __init__(
        self, transport: Any, together: _Together, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport, self._together, self._loop = transport, together, loop
        self._pieces: list[bytes] = []
        self._held = 0

    def write(self, data: bytes) -> None:
        """Send it soon."""
        if not data:
            return
        if not self._pieces:
            self._together.add(self, self._loop)
        self._pieces.append(data)
        self._held += len(data)
        if self._held > self.MOST_HELD:
            self.send()

    def send(self) -> None:
        """Send what is held."""
        if self._pieces:
            pieces, self._pieces, self._held = self._pieces, [], 0
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        """End the connection when all is sent."""
        self.send()
        self._transport.close()

    def abort(self) -> None:
        """End the connection now."""
        self._pieces, self._held = [], 0
        self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


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
