"""A server as a process, for long and through its end: nothing grows, nothing is left behind.

`EARNEST_SOAK_SECONDS=1800 pytest tests/serve/test_soak.py -m slow` is the half hour; without the
variable a few seconds of the same are run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Process

HALF_AN_HOUR = float(os.environ.get("EARNEST_SOAK_SECONDS", "0"))
CLIENTS = 12
QUIET = ("--port", "0", "--log-level", "error")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="what a process holds is read from /proc"
)


class Held:
    """What a process holds just now."""

    def __init__(self, pid: int) -> None:
        self.files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        status = Path(f"/proc/{pid}/status").read_text()
        (threads,) = re.findall(r"^Threads:\s+(\d+)", status, re.M)
        (resident,) = re.findall(r"^VmRSS:\s+(\d+)", status, re.M)
        self.threads, self.bytes = int(threads), 1024 * int(resident)


class Clients:
    """Good ones and bad ones, each at random."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.rng = url, random.Random(seed)
        self.host, port = url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)
        self.seen: Counter[str] = Counter()

    def body(self, **given: Any) -> dict[str, Any]:
        words = " ".join(self.rng.choice(("cat", "dog", "sun", "tree")) for _ in range(30))
        most = self.rng.choice([1, 20, 200])
        return {
            "prompt": words[: self.rng.randrange(1, 200)],
            "max_tokens": most,
            "seed": self.rng.randrange(999),
            "temperature": 1,
            "cache_salt": self.rng.choice([None, "a", "b"]),
        } | given

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._one(until))

    async def _one(self, until: float) -> None:
        kinds = (self.good, self.good, self.vanishes, self.half_a_body, self.reads_slowly)
        kinds = (*kinds, self.bad_body, self.structured, self.says_nothing)
        async with httpx.AsyncClient(timeout=120) as client:
            while time.monotonic() < until:
                kind = self.rng.choice(kinds)
                await kind(client)
                self.seen[kind.__name__] += 1

    async def good(self, client: httpx.AsyncClient) -> None:
        stream = self.rng.random() < 0.5
        reply = await client.post(f"{self.url}/v1/completions", json=self.body(stream=stream, n=2))
        assert reply.status_code == 200, reply.text
        assert not stream or reply.text.endswith("data: [DONE]\n\n")

    async def structured(self, client: httpx.AsyncClient) -> None:
        pattern = f"[a-z]{{{self.rng.randrange(1, 30)}}}"
        body = self.body(guided_regex=pattern, max_tokens=100, temperature=0.5)
        reply = await client.post(f"{self.url}/v1/completions", json=body)
        assert re.fullmatch(pattern, reply.json()["choices"][0]["text"]), reply.text

    async def vanishes(self, client: httpx.AsyncClient) -> None:
        body = self.body(stream=True, max_tokens=400, ignore_eos=True)
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as reply:
            async for _ in reply.aiter_raw():
                if self.rng.random() < 0.3:
                    return

    async def reads_slowly(self, client: httpx.AsyncClient) -> None:
        body = self.body(stream=True, max_tokens=60, logprobs=5)
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as reply:
            async for _ in reply.aiter_raw(200):
                await asyncio.sleep(0.01)

    async def bad_body(self, client: httpx.AsyncClient) -> None:
        content = self.rng.choice(
            [b"", b"{", b"[" * 5000, b"\xff", b"null", b'{"prompt": 1.5}', b'{"max_tokens": -1}']
        )
        path = self.rng.choice(["completions", "chat/completions", "messages", "responses"])
        reply = await client.post(f"{self.url}/v1/{path}", content=content)
        assert reply.status_code == 400, reply.text

    async def half_a_body(self, client: httpx.AsyncClient) -> None:
        data = json.dumps(self.body()).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data)
        await self._raw((head + data)[: self.rng.randrange(len(head + data))])

    async def says_nothing(self, client: httpx.AsyncClient) -> None:
        await self._raw(b"")

    async def _raw(self, data: bytes) -> None:
        _, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(data)
        await asyncio.sleep(self.rng.random() / 20)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def at_rest(url: str, pid: int) -> Held:
    """What is held once nothing runs any more."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        page = httpx.get(f"{url}/metrics").text
        used = [
            float(value)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.M)
        ]
        assert len(used) == 3
        if not any(used):
            return Held(pid)
        time.sleep(0.05)
    raise AssertionError(f"never at rest: {used}")


def soak(server: Process, seconds: float) -> None:
    url, pid = server.where(), server.process.pid
    clients = Clients(url, seed=1)
    asyncio.run(clients.run(max(3.0, seconds / 10)))  # caches fill, threads start
    begun = at_rest(url, pid)
    asyncio.run(clients.run(seconds))
    ended = at_rest(url, pid)
    assert len(clients.seen) == 7 and min(clients.seen.values()) > 0, clients.seen
    assert ended.files <= begun.files + 2, f"{begun.files} files, then {ended.files}"
    # A request is read in a thread, which stays for a while: never more of them than clients.
    most = begun.threads + CLIENTS
    assert ended.threads <= most, f"{begun.threads} threads, then {ended.threads}"
    grown = ended.bytes - begun.bytes
    assert grown < 24e6, f"{grown:,} bytes more"
    print(f"{clients.seen}; {grown:,} bytes more, {ended.files} files, {ended.threads} threads")
    assert server.end() == 0


def test_a_short_soak(start_process: Callable[..., Process]) -> None:
    soak(start_process(*QUIET), 6)


@pytest.mark.slow
@pytest.mark.timeout(HALF_AN_HOUR * 1.2 + 300)
@pytest.mark.skipif(not HALF_AN_HOUR, reason="EARNEST_SOAK_SECONDS does not ask for it")
def test_a_long_soak(start_process: Callable[..., Process]) -> None:
    soak(start_process(*QUIET), HALF_AN_HOUR)


# --- the end ------------------------------------------------------------------------------------


def test_sigterm_lets_streams_finish_and_takes_no_more(
    start_process: Callable[..., Process],
) -> None:
    server = start_process(*QUIET, "--threads", "1")
    url = server.where()
    body = {"prompt": "Once", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 32}

    async def drained() -> tuple[list[str], int, str]:
        one = {"prompt": "a", "max_tokens": 1}
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as reply,
        ):
            lines = reply.aiter_lines()
            first = await anext(lines)
            server.process.send_signal(signal.SIGTERM)
            refused = None
            while refused is None or refused.status_code == 200:  # until it is seen
                refused = await client.post(f"{url}/v1/completions", json=one)
            assert (await client.get(f"{url}/ready")).status_code == 503
            assert (await client.get(f"{url}/health")).status_code == 200
            rest = [line async for line in lines]
        assert refused.headers["retry-after"] == "1"
        return [first, *rest], refused.status_code, refused.json()["error"]["type"]

    lines, status, kind = asyncio.run(drained())
    assert (status, kind) == (503, "overloaded_error")
    assert "data: [DONE]" in lines[-3:]
    assert sum(bool(re.search('"finish_reason": ?"length"', line)) for line in lines) == 32
    assert server.process.wait(30) == 0


def test_sigkill_leaves_nothing_behind(
    start_process: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "EARNEST_CACHE"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    server = start_process(*QUIET)
    url = server.where()
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
        next(reply.iter_raw())
        server.end(signal.SIGKILL)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    if before:
        assert set(Path("/dev/shm").iterdir()) <= before
    port = url.rsplit(":", 1)[1]
    again = start_process("--port", port, "--log-level", "error")
    assert again.where() == url  # and its port is free at once
