"""`earnest serve` as a process: it starts, says where, ends as it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

STORY = {"prompt": "Once upon a time", "max_tokens": 450, "ignore_eos": True, "seed": 1}


class Process:
    """A server of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "earnest", "serve", "stories", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
        )

    def where(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"(https?://\S+|unix:\S+)", line)
        assert found, (line, self.process.stderr.read() if self.process.stderr else "")
        return found[1]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def make(*arguments: str) -> Process:
        running.append(Process(*arguments))
        return running[-1]

    yield make
    for found in running:
        if found.process.poll() is None:
            found.process.kill()
        found.process.communicate()


def test_it_answers_drains_and_ends(start: Callable[..., Process]) -> None:
    server = start("--port", "0")
    url = server.where()
    replies: list[Any] = []
    begun = threading.Event()

    def ask() -> None:
        begun.set()
        replies.append(httpx.post(f"{url}/v1/completions", json=STORY, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait()
    while httpx.get(f"{url}/metrics").text.count("num_requests_running{") == 0 or (
        'num_requests_running{model_name="stories"} 1.0' not in httpx.get(f"{url}/metrics").text
    ):
        assert thread.is_alive()
    assert server.end() == 0
    thread.join()
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 450


def test_two_servers_on_one_port(start: Callable[..., Process]) -> None:
    port = start("--port", "0").where().rsplit(":", 1)[1]
    second = start("--port", port)
    _, problem = second.process.communicate(timeout=60)
    assert second.process.returncode == 4
    assert f"another program listens on 127.0.0.1:{port}" in problem and "--port" in problem


def test_a_socket_file_survives_a_kill(start: Callable[..., Process], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    killed = start("--unix-socket", str(path))
    killed.where()
    killed.end(signal.SIGKILL)
    assert path.is_socket()
    again = start("--unix-socket", str(path))
    assert again.where() == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://server/v1/models").json()["data"][0]["id"] == "stories"
    third = start("--unix-socket", str(path))
    _, problem = third.process.communicate(timeout=60)
    assert third.process.returncode == 4 and "another program" in problem
    assert again.end(signal.SIGINT) == 0
    assert not path.exists()


def test_keys_from_a_file_and_the_environment(
    start: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    monkeypatch.setenv("EARNEST_API_KEY", "three")
    url = start("--port", "0", "--api-key-file", str(keys), "--name", "mine").where()
    for key, status in (("one", 200), ("two", 200), ("three", 200), ("four", 401)):
        reply = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == status
    assert reply.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--host", "no such host"), 2, "no address"),
        (("--tls-certificate", __file__), 2, "belong together"),
        (("--unix-socket", "/nowhere/at/all"), 4, "cannot be used"),
    ],
)
def test_what_cannot_be_served(
    start: Callable[..., Process], arguments: tuple[str, ...], status: int, message: str
) -> None:
    server = start(*arguments)
    _, problem = server.process.communicate(timeout=60)
    assert server.process.returncode == status and message in problem
