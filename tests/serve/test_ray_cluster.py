"""`earnest deploy` on a cluster of this machine: two replicas answer as one server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from earnest.engine import SamplingParams, load

pytest.importorskip("ray", reason="Ray is not installed")

LONG = "Once upon a time there was a little girl who lived in a big house. " * 8
STORY = {"prompt": "Once upon a time", "max_tokens": 450, "ignore_eos": True, "seed": 1}
_REPLICA = b"ray::ServeReplica:earnest:Model"


class Cluster:
    """A running deployment of two replicas."""

    def __init__(self, keys: Path, home: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.logs = home / "ray" / "session_latest" / "logs"
        arguments = ("--replicas", "2", "--port", str(port), "--api-key-file", str(keys))
        arguments += ("--kv", "int8", "--activation-bits", "8", "--speculation", "off")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "earnest", "deploy", "stories", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "RAY_TMPDIR": str(home)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "2 replicas" not in line:
            self.process.kill()
            raise AssertionError((line, *self.process.communicate()))

    def client(self) -> httpx.Client:
        headers = {"authorization": "Bearer secret"}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        ours, found = {self.process.pid}, []
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(status[1])
            except OSError:
                continue
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        for pid in ours:
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(_REPLICA):
                    found.append(pid)
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("the test finds the replicas' processes in /proc")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two replicas want two CPUs")
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret\n")
    home = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets need short names
    running = Cluster(keys, home)
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
    running.process.communicate(timeout=60)
    shutil.rmtree(home, ignore_errors=True)


def replica(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.headers["x-earnest-replica"]


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    """A number of each replica."""
    found: dict[str, float] = {}
    while len(found) < 2:
        reply = client.get("/metrics")
        values = re.search(rf"^vllm:{name}{{.*}} (\S+)$", reply.text, re.MULTILINE)
        found[replica(reply)] = float(values[1]) if values else 0.0
    return found


def last_line(lines: Iterator[str]) -> str:
    """How a stream ends: its last event, or what broke it."""
    last = ""
    try:
        for line in lines:
            last = line or last
    except httpx.RemoteProtocolError as error:
        return str(error)
    return last


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"max_tokens": 12} | body)


def both(client: httpx.Client) -> dict[str, str]:
    """What each replica answers to the same question."""
    found: dict[str, str] = {}
    for _ in range(200):
        reply = complete(client, prompt="One day", seed=5, temperature=1.0, max_tokens=30)
        text = reply.json()["choices"][0]["text"]
        assert found.setdefault(replica(reply), text) == text
        if len(found) == 2:
            return found
    raise AssertionError(found)


def both_replicas_answer_with_the_same_bytes(cluster: Cluster, client: httpx.Client) -> None:
    one, other = both(client).values()
    assert one == other and len(one) > 20
    asked = SamplingParams(seed=5, temperature=1.0, max_tokens=30)
    told, usual = (load("stories", **how) for how in ({"kv": "int8", "activation_bits": 8}, {}))
    assert one == told.generate("One day", asked).text != usual.generate("One day", asked).text


def prompts_that_begin_alike_go_to_the_same_replica(cluster: Cluster, client: httpx.Client) -> None:
    for name in ("a", "b", "c"):
        replies = [complete(client, prompt=f"{name} {LONG}{tail}") for tail in range(4)]
        assert len({replica(reply) for reply in replies}) == 1
        cached = [r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies]
        assert cached[0] == 0 and all(count > 100 for count in cached[1:])


def streams_come_piece_by_piece(cluster: Cluster, client: httpx.Client) -> None:
    whole = complete(client, **STORY).json()["choices"][0]["text"]
    text, pieces = "", 0
    with client.stream("POST", "/v1/completions", json=STORY | {"stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                pieces += 1
    assert text == whole and pieces > 100


def errors_and_keys_are_the_servers_own(cluster: Cluster, client: httpx.Client) -> None:
    reply = complete(client, prompt="x", nonsense=1)
    assert reply.status_code == 400 and "nonsense" in reply.json()["error"]["message"]
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
    assert client.get("/v1/models").json()["data"][0]["id"] == "stories"
    assert httpx.get(f"{cluster.url}/health").text == "ok\n"
    large = client.post("/v1/messages", content=b" " * (2**24 + 1))
    assert large.status_code == 413 and large.json()["type"] == "error"


def a_client_that_goes_away_ends_its_request(cluster: Cluster, client: httpx.Client) -> None:
    before = metric(client, "generation_tokens_total")
    with client.stream("POST", "/v1/completions", json=STORY | {"stream": True}) as reply:
        assert len(next(reply.iter_lines())) > 10
    while sum(metric(client, "num_requests_running").values()):
        time.sleep(0.05)
    after = metric(client, "generation_tokens_total")
    assert 0 < sum(after.values()) - sum(before.values()) < STORY["max_tokens"]


def a_replica_that_is_killed_is_not_missed(cluster: Cluster, client: httpx.Client) -> None:
    before = both(client)
    streams: dict[str, Iterator[str]] = {}
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        long = STORY | {"n": 3, "temperature": 1.5}
        while len(streams) < 2:
            asked = client.stream("POST", "/v1/completions", json=long | {"stream": True})
            reply = stack.enter_context(asked)
            streams[replica(reply)] = reply.iter_lines()
        asks = [pool.submit(complete, client, **long | {"seed": 10 * n}) for n in range(6)]
        for lines in streams.values():  # the other requests arrive meanwhile
            assert all(next(lines) is not None for _ in range(60))
        os.kill(cluster.replicas()[0], signal.SIGKILL)
        for ask in asks:  # none of them had begun to answer
            assert ask.result().status_code == 200, ask.result().text
        ends = [last_line(lines) for lines in streams.values()]
        assert ends.count("data: [DONE]") == 1, ends  # the other one's replica died
    for n in range(5):
        assert complete(client, prompt=f"Now {n}").status_code == 200
    until = time.monotonic() + 60
    while len(cluster.replicas()) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    after: set[str] = set()
    while len(after) < 2 and time.monotonic() < until:
        after |= {replica(complete(client, prompt="Hi", max_tokens=1))}
    assert len(after) == 2 and len(after & set(before)) == 1


def the_end_lets_streams_come_to_theirs(cluster: Cluster, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=STORY | {"stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        cluster.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    _, problems = cluster.process.communicate(timeout=60)
    assert cluster.process.returncode == 0, problems
    assert cluster.replicas() == []
    told = "".join(path.read_text() for path in cluster.logs.rglob("*.err"))
    assert " path=/v1/completions " in told and "Once upon" not in told
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_two_replicas_are_one_server(cluster: Cluster) -> None:
    # One test, because a cluster takes its time to start and runners share tests out.
    with cluster.client() as client:
        for step in (
            both_replicas_answer_with_the_same_bytes,
            prompts_that_begin_alike_go_to_the_same_replica,
            streams_come_piece_by_piece,
            errors_and_keys_are_the_servers_own,
            a_client_that_goes_away_ends_its_request,
            a_replica_that_is_killed_is_not_missed,
            the_end_lets_streams_come_to_theirs,
        ):
            step(cluster, client)
