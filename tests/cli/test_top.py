"""`earnest top` with a real server, with none, and with things that are no server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pexpect
import pytest

pytest.importorskip("fastapi", reason="earnest[serve] is not installed")

from earnest.errors import NetworkError, UserError
from earnest.serve.watching import Reading, Server, percentile, view

EARNEST = [sys.executable, "-m", "earnest"]
KEY = "a-key"


def top(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EARNEST, "top", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k != "EARNEST_API_KEY"} | variables,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = subprocess.Popen(
        [*EARNEST, "serve", "stories", "--port", "0", "--api-key", KEY, "--log-level", "warning"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    yield found[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


def ask(url: str, tokens: int) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    assert json.load(urllib.request.urlopen(request, timeout=60))["choices"]


def test_once_as_json(server: str) -> None:
    watched = Server(server, api_key=KEY)
    before = watched.read()
    for tokens in (50, 70):
        ask(server, tokens)
    found = view(server, before, watched.read())
    assert found.generation_rate is not None and found.generation_rate > 0
    assert found.finished == {"length": 2} and found.running == found.waiting == 0
    assert found.prompt_rate is not None and found.prompt_rate > 0
    done = top(server, "--once", "--json", "--interval", "0.2", "--api-key", KEY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    assert told["models"] == ["stories"] and told["ready"] is True and told["version"]
    assert told["generation_rate"] == 0.0 and told["finished"] == {"length": 2}
    assert told["kv_used"] == 0 and told["kv_blocks"] > 0 and told["block_size"] == 32
    for name in ("first_token", "between_tokens", "queue"):
        times = told[name]  # of all so far
        assert 0 <= times["p50"] <= times["p90"] <= times["p99"] < 60
    assert told["preemptions"] == 0 and told["prefix_hits"] is not None
    if sys.platform == "linux":
        assert told["memory"] > 2**24 and told["processors"] >= 0


def test_once_for_people_and_the_key_from_the_environment(server: str) -> None:
    done = top(server, "--once", "--interval", "0.1", EARNEST_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    for text in ("stories at http://127.0.0.1:", ": ready, Earnest", "first token", "KV cache"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout


def test_live(server: str) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "earnest", "top", server, "--api-key", KEY, "--interval", "0.2"],
        encoding="utf-8",
        timeout=60,
        dimensions=(30, 100),
    )
    child.expect("stories at http")
    thread = threading.Thread(target=ask, args=(server, 400))
    thread.start()
    child.expect(r"[1-9][\d,.]* written")
    child.expect("█")
    thread.join()
    child.sendintr()
    child.expect("interrupted")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_it_wants_a_key(server: str) -> None:
    for key in ((), ("--api-key", "wrong")):
        done = top(server, "--once", *key)
        assert done.returncode == 2 and "asks for an API key" in done.stderr
        assert "--api-key" in done.stderr


def test_over_a_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    missing = top(f"unix:{path}", "--once")
    assert missing.returncode == 4 and "no server answers at unix:" in missing.stderr
    process = subprocess.Popen(
        [*EARNEST, "serve", "stories", "--unix-socket", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    done = top(f"unix:{path}", "--once", "--json", "--interval", "0.1")
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()
    assert done.returncode == 0 and json.loads(done.stdout)["models"] == ["stories"], done.stderr


class Broken:
    """Something that answers, but as it likes."""

    def __init__(self, status: int, body: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> str:
        self._thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"no", "status 404"),
        (200, b"<html>hello</html>", "not in the format of Prometheus"),
        (200, b"\xff\xfe\x00 1\n{{{", "not in the format of Prometheus"),
        (200, b"up 1\n", "serves no model"),
        (200, b"", "serves no model"),
    ],
)
def test_what_is_no_server_of_ours(status: int, body: bytes, message: str) -> None:
    with Broken(status, body) as url, pytest.raises(NetworkError, match=message):
        Server(url).read()


def test_nothing_listens_and_no_addresses() -> None:
    done = top("http://127.0.0.1:9", "--once")
    assert done.returncode == 4 and "no server answers at http://127.0.0.1:9" in done.stderr
    assert "earnest serve" in done.stderr and "Traceback" not in done.stderr
    for url in (
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://h:99999",
    ):
        with pytest.raises(UserError, match="no address"):
            Server(url)


def test_another_server_with_the_same_metrics_and_a_hostile_name() -> None:
    body = (
        b'vllm:num_requests_running{model_name="a\x1b[31m"} 2\n'
        b'vllm:num_requests_running{model_name="b"} 1\n'
        b"vllm:kv_cache_usage_perc NaN\n"
    )
    with Broken(200, body) as url:
        reading = Server(url).read()
        found = view(url, reading, reading)
        assert found.running == 3 and found.models == ("a\x1b[31m", "b")
        assert found.version is None and found.generation_rate is None
        done = top(url, "--once", "--interval", "0.1")
    assert done.returncode == 0 and "a?[31m, b at http" in done.stdout and "\x1b" not in done.stdout


def test_a_server_that_was_started_anew() -> None:
    name = ("vllm:generation_tokens_total", ())
    found = view("x", Reading(1.0, {name: 500.0}), Reading(2.0, {name: 3.0}))
    assert found.generation_rate is None
    found = view("x", Reading(1.0, {name: 500.0}), Reading(3.0, {name: 600.0}))
    assert found.generation_rate == 50


def test_percentiles() -> None:
    buckets = [(1.0, 0.0), (2.0, 10.0), (4.0, 20.0), (float("inf"), 20.0)]
    assert percentile(buckets, 0.5) == 2.0
    assert percentile(buckets, 0.75) == 3.0
    assert percentile(buckets, 0.25) == 1.5
    assert percentile([(1.0, 1.0), (float("inf"), 9.0)], 0.9) == 1.0
    assert percentile([(1.0, 0.0), (float("inf"), 0.0)], 0.5) is None
    assert percentile([], 0.5) is None
