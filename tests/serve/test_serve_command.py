"""`earnest serve` as a process: it starts, says where, ends as it should."""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Process

STORY = {"prompt": "Once upon a time", "max_tokens": 450, "ignore_eos": True, "seed": 1}


def test_it_answers_drains_and_ends(start_process: Callable[..., Process]) -> None:
    server = start_process("--port", "0")
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


def test_two_servers_on_one_port(start_process: Callable[..., Process]) -> None:
    port = start_process("--port", "0").where().rsplit(":", 1)[1]
    second = start_process("--port", port)
    _, problem = second.process.communicate(timeout=60)
    assert second.process.returncode == 4
    assert f"another program listens on 127.0.0.1:{port}" in problem and "--port" in problem


def test_a_socket_file_survives_a_kill(
    start_process: Callable[..., Process], tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    killed = start_process("--unix-socket", str(path))
    killed.where()
    killed.end(signal.SIGKILL)
    assert path.is_socket()
    again = start_process("--unix-socket", str(path))
    assert again.where() == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://server/v1/models").json()["data"][0]["id"] == "stories"
    third = start_process("--unix-socket", str(path))
    _, problem = third.process.communicate(timeout=60)
    assert third.process.returncode == 4 and "another program" in problem
    assert "--unix-socket" in problem
    assert again.end(signal.SIGINT) == 0
    assert not path.exists()


def test_keys_from_a_file_and_the_environment(
    start_process: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    monkeypatch.setenv("EARNEST_API_KEY", "three")
    url = start_process("--port", "0", "--api-key-file", str(keys), "--name", "mine").where()
    for key, status in (("one", 200), ("two", 200), ("three", 200), ("four", 401)):
        reply = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == status
    assert reply.json()["error"]["type"] == "authentication_error"


def test_keys_that_are_no_text(start_process: Callable[..., Process], tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe", "no text"), (b" \n", "no keys")):
        keys = tmp_path / "keys"
        keys.write_bytes(content)
        server = start_process("--api-key-file", str(keys))
        _, problem = server.process.communicate(timeout=60)
        assert server.process.returncode == 2 and message in problem


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--host", "no such host"), 2, "no address"),
        (("--tls-certificate", __file__), 2, "belong together"),
        (("--unix-socket", "/nowhere/at/all"), 4, "cannot be used"),
        (("--tls-certificate", __file__, "--tls-key", __file__), 2, "for TLS"),
    ],
)
def test_what_cannot_be_served(
    start_process: Callable[..., Process], arguments: tuple[str, ...], status: int, message: str
) -> None:
    server = start_process(*arguments)
    _, problem = server.process.communicate(timeout=60)
    assert server.process.returncode == status and message in problem


def test_all_that_is_told_is_json_on_request(start_process: Callable[..., Process]) -> None:
    server = start_process("--port", "0", "--log-format", "json")
    url = server.where()
    for number in range(3):
        headers = {"x-request-id": str(number)}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
    assert server.end() == 0
    lines = [json.loads(line) for line in server.process.stderr.read().splitlines() if "{" in line]
    asked = [line["request_id"] for line in lines if line["message"] == "request"]
    assert asked == ["0", "1", "2"]
    assert any("ending" in line["message"] for line in lines)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits are read from /proc")
def test_many_connections_are_possible(start_process: Callable[..., Process]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    server = start_process("--port", "0")
    server.where()
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
    assert int(line.split()[3]) == min(most, 2**16)
