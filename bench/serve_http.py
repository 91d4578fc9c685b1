"""What the HTTP layer of `earnest serve` costs: ratios of one run, as JSON.

    python bench/serve_http.py [MODEL] [--rounds 5]

- `health_ms`, `empty_ms`: from sending a request on an open connection to the head of the answer,
  while nothing else runs: of `/health`, and of a completion of no tokens, which goes all the way to
  the engine and back but for the model. `token_ms` is the same with a token.
- `idle`: share of one core, and wake-ups a second, of a server that nobody asks anything, without
  and with 200 connections whose streams have come to their end.
- `throughput_ratio`: tokens a second of 8 clients while those 200 connections are open, over the
  same without them; rounds of both take turns.
- `prefix_ratio`: time to the first token of a prompt that begins with 1,000 tokens nobody sent
  before, over that of a second prompt that begins alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from statistics import median
from typing import Any

CONNECTIONS = 200
CLIENTS = 8


class Server:
    """`earnest serve` as a process."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-m", "earnest", "serve", model, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--log-level", "error"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        self.port = int(found[1])

    def connection(self) -> HTTPConnection:
        """A new one."""
        return HTTPConnection("127.0.0.1", self.port, timeout=300)

    def spent(self) -> tuple[float, int]:
        """CPU seconds and voluntary context switches so far."""
        proc = Path(f"/proc/{self.process.pid}")
        fields = (proc / "stat").read_text().rsplit(")", 1)[1].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        switches = sum(
            int(found[1])
            for task in (proc / "task").iterdir()
            if (found := re.search(r"^voluntary\S+\s+(\d+)", (task / "status").read_text(), re.M))
        )
        return seconds, switches

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)


def ask(connection: HTTPConnection, path: str, body: dict[str, Any] | None) -> HTTPResponse:
    """The head of an answer; its body is still to be read."""
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body).encode())
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"{path}: {reply.status} {reply.read()!r}")
    return reply


def first_bytes(server: Server, path: str, body: dict[str, Any] | None, times: int) -> float:
    """Median milliseconds to the head of an answer."""
    connection, found = server.connection(), []
    for number in range(times + 10):
        begun = time.perf_counter()
        reply = ask(connection, path, body)
        if number >= 10:
            found.append(time.perf_counter() - begun)
        reply.read()
    connection.close()
    return 1e3 * median(found)


def idle(server: Server, seconds: float = 10) -> dict[str, float]:
    """What a server takes that has nothing to do."""
    time.sleep(1)
    before, begun = server.spent(), time.monotonic()
    time.sleep(seconds)
    after, elapsed = server.spent(), time.monotonic() - begun
    return {
        "core_share": round((after[0] - before[0]) / elapsed, 4),
        "wakeups_per_second": round((after[1] - before[1]) / elapsed, 1),
    }


def open_streams(server: Server) -> list[HTTPConnection]:
    """Connections that had a stream and stay open."""
    body = {"prompt": "Once", "max_tokens": 1, "stream": True}
    found = [server.connection() for _ in range(CONNECTIONS)]
    for connection in found:
        ask(connection, "/v1/completions", body).read()
    return found


def throughput(server: Server, tokens: int = 48, requests: int = 3) -> float:
    """Tokens a second of several clients."""

    def client(number: int) -> None:
        connection = server.connection()
        for turn in range(requests):
            prompt = f"The story of number {number} and {turn}:"
            body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
            ask(connection, "/v1/completions", body).read()
        connection.close()

    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return CLIENTS * requests * tokens / (time.perf_counter() - begun)


def prefix(server: Server, salt: str) -> tuple[float, float]:
    """Seconds to the first token without and with the prompt's beginning in the cache."""
    connection = server.connection()
    beginning = [10 + (7 * n + len(salt)) % 400 for n in range(1000)]
    found = []
    for last in ([5, 6, 7], [8, 9, 10]):
        body = {
            "prompt": [*beginning, *last],
            "max_tokens": 1,
            "stream": True,
            "cache_salt": salt,
            "temperature": 0,
        }
        begun = time.perf_counter()
        reply = ask(connection, "/v1/completions", body)
        reply.read(1)
        found.append(time.perf_counter() - begun)
        reply.read()
    connection.close()
    return found[0], found[1]


def measure(server: Server, rounds: int) -> dict[str, Any]:
    """All of it."""
    one = {"prompt": "Once", "max_tokens": 1, "temperature": 0}
    first_bytes(server, "/v1/completions", one, 20)
    health = first_bytes(server, "/health", None, 300)
    empty = first_bytes(server, "/v1/completions", one | {"max_tokens": 0}, 300)
    token = first_bytes(server, "/v1/completions", one, 100)
    alone = idle(server)
    plain, among = [], []
    throughput(server)
    for turn in range(rounds):
        plain.append(throughput(server))
        streams = open_streams(server)
        among.append(throughput(server))
        if turn == rounds - 1:
            crowded = idle(server)
        for connection in streams:
            connection.close()
    prefixes = [prefix(server, f"salt {turn}") for turn in range(rounds)]
    return {
        "health_ms": round(health, 3),
        "empty_ms": round(empty, 3),
        "token_ms": round(token, 3),
        "idle": {"no connections": alone, f"{CONNECTIONS} connections": crowded},
        "tokens_per_second": round(median(plain), 1),
        "throughput_ratio": round(median(b / a for a, b in zip(plain, among, strict=True)), 3),
        "prefix_ms": [round(1e3 * median(times), 2) for times in zip(*prefixes, strict=True)],
        "prefix_ratio": round(median(first / second for first, second in prefixes), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2", help="of a context over 1,024")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    server = Server(given.model)
    try:
        found = measure(server, given.rounds)
    finally:
        server.close()
    load = os.getloadavg()[0]
    print(json.dumps({"model": given.model, "load_average": round(load, 1), **found}, indent=2))


if __name__ == "__main__":
    main()
