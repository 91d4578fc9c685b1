"""What every connection gets."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from running import Server
from starlette.requests import Request
from uvicorn import Config
from uvicorn.server import ServerState

from earnest.serve.connection import connection_of
from earnest.serve.http import ApiError, until_gone
from earnest.serve.run import Address, listen
from earnest.serve.state import Limits


def test_small_pieces_are_sent_at_once() -> None:
    """Or each answer would take 40 ms: asyncio looks at the protocol of what it accepts."""
    with listen(Address(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            assert accepted.proto == socket.IPPROTO_TCP
            accepted.close()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/messages", "/health", "/nowhere"])
def test_every_answer_has_an_id(start: Callable[..., Server], path: str) -> None:
    server = start(api_keys=("key",))
    for headers in ({}, {"authorization": "Bearer key"}):
        reply = httpx.request("GET", f"{server.url}{path}", headers=headers)
        assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
        if path == "/v1/messages":
            assert reply.headers["request-id"] == reply.headers["x-request-id"]
            assert reply.json()["request_id"] == reply.headers["request-id"]
        given = httpx.get(f"{server.url}{path}", headers={"x-request-id": "mine", **headers})
        assert given.headers["x-request-id"] == "mine"


def test_wrong_methods_are_told_the_right_ones(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v1/completions")
    assert reply.status_code == 405 and reply.headers["allow"] == "POST"


CHUNKED = b"%s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nowhere", b"/health"])
@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
@pytest.mark.parametrize("pause", [0, 0.2])
def test_a_body_that_is_no_http_is_answered_once(
    server: Server, caplog: pytest.LogCaptureFixture, path: bytes, method: bytes, pause: float
) -> None:
    head = CHUNKED % b" ".join([method, path])
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(head if pause else head + b"nonsense\r\n")
        if pause:  # who needs no body has answered by now
            time.sleep(pause)
            client.sendall(b"nonsense\r\n")
        found = b"".join(iter(lambda: client.recv(4096), b""))
    assert found.count(b"HTTP/1.1 ") == 1 and re.match(rb"HTTP/1.1 (4|200)", found), found
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


class Recorded(asyncio.Transport):
    """A transport that writes down what it is told."""

    def __init__(self, happened: list[str]) -> None:
        super().__init__({"peername": ("client", 1), "sockname": ("server", 2)})
        self.happened, self.closing = happened, False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.closing
        lines = [line.decode() for line in data.split(b"\r\n")]
        self.happened.append(" ".join([lines[0], *(x for x in lines if x.startswith("piece"))]))

    def close(self) -> None:
        self.happened.append("closed")
        self.closing = True

    def abort(self) -> None:
        self.happened.append("aborted")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def served(app: Callable[..., Awaitable[None]], clients: int, end: str = "keep-alive") -> list[str]:
    """What happened when so many clients asked an application at once."""
    happened: list[str] = []

    async def ask() -> None:
        config, state = Config(app, http=connection_of(Limits())), ServerState()
        made = [
            config.http(config=config, server_state=state, app_state={"happened": happened})  # type: ignore[operator]
            for _ in range(clients)
        ]
        for connection in made:
            connection.connection_made(Recorded(happened))
            connection.data_received(
                f"GET / HTTP/1.1\r\nhost: x\r\nconnection: {end}\r\n\r\n".encode()
            )
        await asyncio.gather(*state.tasks)
        await asyncio.sleep(0.01)
        for connection in made:
            connection.connection_lost(None)

    asyncio.run(ask())
    return [line for line in happened if line]


async def in_two_pieces(scope: Any, receive: Any, send: Any) -> None:
    scope["state"]["happened"].append("asked")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"piece 1", "more_body": True})
    await send({"type": "http.response.body", "body": b"piece 2"})
    scope["state"]["happened"].append("answered")


@pytest.mark.parametrize(("end", "ends"), [("keep-alive", 0), ("close", 1)])
def test_what_a_turn_brings_is_sent_at_its_end_once_a_connection(end: str, ends: int) -> None:
    happened = served(in_two_pieces, 3, end)
    sent = "HTTP/1.1 200 OK piece 1 piece 2"
    if ends:  # nothing waits when the connection is closed
        assert happened[:6] == ["asked", sent, "closed", "answered", "asked", sent]
    else:
        assert happened[:9] == ["asked", "answered"] * 3 + [sent] * 3
    assert happened.count(sent) == 3


async def of_many_pieces(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(5):
        body = b"piece " + b"x" * 40_000
        await send({"type": "http.response.body", "body": body, "more_body": True})
    scope["state"]["happened"].append("answered")
    await send({"type": "http.response.body"})


def test_much_that_is_written_in_one_turn_does_not_wait() -> None:
    happened = served(of_many_pieces, 1)
    assert sum("piece" in line for line in happened[: happened.index("answered")]) >= 2
    assert sum(line.count("piece") for line in happened) == 5


def test_who_waits_for_an_answer_is_not_looked_at_again_and_again() -> None:
    """200 waiting clients that were took a tenth of the tokens from others."""
    asked = 0
    left = asyncio.Event()

    async def receive() -> dict[str, str]:
        nonlocal asked
        asked += 1
        await left.wait()
        return {"type": "http.disconnect"}

    async def main() -> None:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)  # type: ignore[arg-type]
        assert await until_gone(request, asyncio.sleep(0.6, "done")) == "done"
        assert asked == 1
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        asyncio.get_running_loop().call_later(0.05, left.set)
        with pytest.raises(ApiError, match="went away"):
            await asyncio.wait_for(until_gone(request, work()), 10)
        assert ended.is_set()

    asyncio.run(main())
