"""Heads of requests that are no heads, or almost: whatever comes, the server stays.

`EARNEST_FUZZ_HEADS=1000000 pytest tests/serve/test_fuzzed_heads.py` is the long way; without the
variable some thousands are sent.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
from running import Process

HEADS = int(os.environ.get("EARNEST_FUZZ_HEADS", "3000"))
CLIENTS = 48
# Connections after which somebody asks whether the server is well.
ROUND = 500
# Seconds of silence after which a client says that nothing more will come, and then waits.
PATIENCE, END = 0.5, 30.0

PATHS = [
    *(b"/", b"/health", b"/ready", b"/v1/models", b"/v1/models/%2e%2e/x", b"/version", b"*"),
    *(b"/v1/completions", b"/v1/chat/completions", b"/v1/messages", b"/v1/responses?a=1&a=%ff"),
    *(b"/api/tags", b"/api/chat", b"/%00%0d%0aset-cookie:x", b"/../../etc/passwd", b"//health"),
    *(b"http://other/health", b"other:443", b"/\xc3\xa9?\xf0\x9f\x98\x80", b"/" + b"a" * 5000),
]
METHODS = b"GET POST HEAD OPTIONS PUT DELETE PATCH CONNECT TRACE PRI get G\xffT".split()
FIELDS = [
    *(b"host: 127.0.0.1", b"host: [::1]:x", b"host:", b"host: a, b", b"host: \xff"),
    *(b"content-length: 0", b"content-length: 5", b"content-length: -1", b"content-length: +1"),
    *(b"content-length: 99999999999999999999", b"content-length: 1, 2", b"content-length: 0x1"),
    *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"transfer-encoding: x"),
    *(b"connection: close", b"connection: keep-alive, upgrade", b"expect: 100-continue"),
    *(b"upgrade: websocket", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    *(b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", b"sec-websocket-version: 13"),
    *(b"content-type: application/json", b"content-type: ;;;", b"content-encoding: gzip"),
    *(b"authorization: Bearer \xe9", b"authorization: Basic :", b"x-api-key: a", b"cookie: a=\x01"),
    *(b"x-request-id: a\tb", b"x-request-id: " + b"\xff" * 300, b"traceparent: 00-zz-zz-zz"),
    *(b"origin: null", b"origin: http://[", b"accept: text/html;q=x", b"accept-encoding: gzip"),
    *(b"access-control-request-method: \xff", b"last-event-id: 1", b"range: bytes=0-0,-1"),
    *(
        b"x: " + b"y" * 9000,
        b" folded: 1",
        b"no colon",
        b": no name",
        b"sp ace: 1",
        b"te: trailers",
    ),
]
BITS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\t", b"\x0b", b"\x7f", b"\xff", b"%", b"%zz"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"0\r\n\r\n", b"5\r\nhello\r\n"),
    *(b"ffffffffffffffff\r\n", b"{}", b'{"prompt":1}', b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"?", b"#", b"\xe2\x80\xa8", b"\x1b[2J", b"a" * 70_000),
]
LAST = b"\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [\w '-]*\r\n")


class Heads:
    """Draws them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def sound(self) -> bytes:
        """Of the right form, though its parts may be odd."""
        rng = self.rng
        version = rng.choice([b"1.1"] * 8 + [b"1.0", b"0.9", b"2.0", b"1.10"])
        line = b"%s %s HTTP/%s" % (rng.choice(METHODS), rng.choice(PATHS), version)
        fields = rng.choices(FIELDS, k=rng.choice([0, 1, 1, 2, 2, 3, 12, 120]))
        if rng.random() < 0.8:
            fields.insert(0, b"Host: x")
        return b"\r\n".join([line, *fields]) + b"\r\n\r\n"

    def plain(self) -> bytes:
        """As a client would send it."""
        path = self.rng.choice([b"/health", b"/v1/models", b"/v1/completions", b"/nowhere"])
        return b"%s %s HTTP/1.1\r\nhost: x\r\n\r\n" % (self.rng.choice(METHODS[:4]), path)

    def mutated(self) -> bytes:
        """Almost of the right form."""
        rng = self.rng
        head = bytearray(rng.choice([self.plain, self.sound])())
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            at = rng.randrange(len(head) + 1)
            end = min(len(head), at + rng.choice([1, 2, 10, 100]))
            kind = rng.randrange(6)
            if kind == 0:
                head[at:end] = rng.randbytes(end - at)
            elif kind == 1:
                del head[at:end]
            elif kind == 2:
                head[at:at] = head[at:end] * rng.choice([1, 2, 50])
            elif kind == 3:
                head[at:at] = rng.choice(BITS)
            elif kind == 4:
                head[at:end] = rng.choice(FIELDS)
            elif at < len(head):
                head[at] ^= 1 << rng.randrange(8)
        return bytes(head)

    def noise(self) -> bytes:
        """Of no form."""
        return self.rng.randbytes(self.rng.choice([1, 10, 100, 1000]))

    def draw(self) -> bytes:
        kinds = [self.plain] * 4 + [self.sound] * 2 + [self.mutated] * 3
        return self.rng.choice([*kinds, self.noise])()

    def connection(self) -> list[bytes]:
        """What one connection sends."""
        return [self.draw() for _ in range(self.rng.choice([1, 1, 2, 3, 6]))]


async def answered(port: int, data: bytes) -> tuple[bytes, bool]:
    """What comes back until the connection ends, and whether the server ended it unasked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found, unasked = bytearray(), True
    try:
        # No port of the client's is kept for connections that have ended.
        tcp = writer.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(data)
        while True:
            try:
                piece = await asyncio.wait_for(reader.read(2**16), PATIENCE if unasked else END)
            except TimeoutError:
                assert unasked, f"neither answered nor ended: {data[:2000]!r}"
                unasked = False
                writer.write_eof()
                continue
            if not piece:
                break
            found += piece
    except ConnectionError:  # of what is no request the rest is not read
        pass
    finally:
        writer.close()
    return bytes(found), unasked


async def fuzz(port: int, heads: Heads, count: int) -> Counter[str]:
    """Send at least so many heads, and count what comes of the connections."""
    seen: Counter[str] = Counter()

    async def client(left: list[list[bytes]]) -> None:
        while left:
            sent = left.pop()
            data = b"".join(sent) + LAST
            found, unasked = await answered(port, data)
            statuses = [int(status) for status in STATUS.findall(found)]
            assert not found or found.startswith(b"HTTP/1.1 "), (data, found)
            assert all(status < 500 for status in statuses), (data, found)
            seen.update(map(str, statuses))
            seen["heads"] += len(sent)
            seen["connections"] += 1
            seen["silent"] += not statuses
            seen["told to end"] += not unasked

    async with httpx.AsyncClient(timeout=END) as good:
        while seen["heads"] < count:
            work, planned = list[list[bytes]](), seen["heads"]
            while len(work) < ROUND and planned < count:
                work.append(heads.connection())
                planned += len(work[-1])
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(client(work))
            reply = await good.get(f"http://127.0.0.1:{port}/health")
            assert reply.status_code == 200
    return seen


@pytest.mark.timeout(HEADS // 50 + 120)
def test_whatever_comes_the_server_stays(start_process: Callable[..., Process]) -> None:
    server = start_process("--port", "0", "--threads", "1")  # it tells of each request
    url = server.where()
    told = list[str]()

    def listen() -> None:
        assert server.process.stderr is not None
        follows = False  # one of the lines of a traceback
        for line in server.process.stderr:
            follows = "Traceback" in line or (follows and line.startswith(" "))
            if follows or " error " in line or not line.rstrip("\n").isprintable():
                told.append(line)

    listener = threading.Thread(target=listen)
    listener.start()
    seen = asyncio.run(fuzz(int(url.rsplit(":", 1)[1]), Heads(seed=1), HEADS))
    print(dict(sorted(seen.items())))
    assert server.process.poll() is None
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=END)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 3
    assert seen["heads"] >= HEADS
    for status in ("200", "400", "404", "405"):  # all ways were gone
        assert seen[status] > HEADS // 1000, seen
    assert server.end() == 0
    listener.join(10)
    assert told == []


def test_heads_are_the_same_each_time() -> None:
    first, again, other = Heads(seed=7), Heads(seed=7), Heads(seed=8)
    drawn = [first.connection() for _ in range(50)]
    assert drawn == [again.connection() for _ in range(50)]
    assert drawn != [other.connection() for _ in range(50)]
