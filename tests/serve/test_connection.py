"""What every connection gets."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from running import Server

from earnest.serve.run import Address, listen


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
