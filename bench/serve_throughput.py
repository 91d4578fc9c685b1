"""Many clients at once: `earnest serve`, llama-cpp-python's server, and the bare runner.

    python bench/serve_throughput.py                                    # SmolLM2, 8 and 32 clients
    python bench/serve_throughput.py --model model.gguf --clients 8 --rounds 5 --json
    python bench/serve_throughput.py --no-peer                          # ours only

Each client sends one request after the other over a socket of its own, streams the answer, and
there is always the next request until the load is used up. Lengths of prompts and answers are drawn
from log-normal distributions like those of conversations people shared (`--scale` makes all
longer or shorter); the load is the same for everybody, and for every round of a seed.

Three sides take turns, each a process with as many threads:

  - earnest: `earnest serve MODEL`, with nothing but the context set;
  - llama.cpp: `python -m llama_cpp.server` (--peer-python says whose), its batch size the default,
    requests not interrupting each other;
  - engine: the same requests in the engine without HTTP. Of it the time within `Runner.step` is
    also told: that is what `earnest bench` times, for the very batches of this load, and so what a
    server could reach if everything around the kernels cost nothing.

Random weights have no vocabulary, and servers take text: a file of true shape for both is made by

    earnest synth ./shape --preset 0.3b --seed 1
    cp TOKENIZER/{tokenizer.model,tokenizer_config.json,added_tokens.json} ./shape
    earnest quantize ./shape 0.3b.gguf --codec q4_0

Told are medians over the rounds, of tokens written per second of wall time, and ratios of the sides
within a round. The client shares the processors with the servers; it does as little as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from earnest import hub

WORDS = (  # noqa: SIM905
    "the of and to in a is that for it as was with be by on not he this are at from his or they an "
    "which you one we all would there their more if when will time about out up them then she many "
    "some so these two may into has her like him see could no make than first been its who now my "
    "made over did down only way find use water long little very after words called just where most"
).split()


@dataclass(frozen=True)
class Job:
    """One request: a prompt of so many words, and tokens wanted."""

    prompt: str
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What one side did with a load.

    Attributes:
        seconds: from the first request to the last token.
        tokens: written.
        first: median seconds to the first token.
        runner_seconds: of `engine`: those within `Runner.step`.
        client_seconds: of a server: processor time that the clients took from it.
    """

    seconds: float
    tokens: int
    first: float
    runner_seconds: float | None = None
    client_seconds: float | None = None

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def load_of(count: int, seed: int, scale: float) -> list[Job]:
    """A load of so many requests; about a token a word."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(scale * rng.lognormal(np.log(90), 0.9, count), 8, 768).astype(int)
    answers = np.clip(scale * rng.lognormal(np.log(80), 0.8, count), 4, 384).astype(int)
    return [
        Job(" ".join(rng.choice(WORDS, words)), int(tokens))
        for words, tokens in zip(prompts, answers, strict=True)
    ]


# --- over HTTP ----------------------------------------------------------------------------------


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], port: int, extra: dict[str, Any]) -> None:
        self._port, self._extra = port, extra
        # A file: a pipe that nobody reads would fill up.
        self._told = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=self._told, stderr=self._told)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).read()
                return
            except OSError:
                if self._process.poll() is not None:
                    self._told.seek(0)
                    raise SystemExit(f"{command}: {self._told.read()[-4000:]}") from None
                time.sleep(0.2)
        self._process.kill()
        raise SystemExit(f"{command} does not answer")

    def run(self, jobs: list[Job], clients: int) -> Outcome:
        """Have a load answered."""
        return asyncio.run(self._run(deque(jobs), clients))

    async def _run(self, jobs: deque[Job], clients: int) -> Outcome:
        begun, first, tokens = time.perf_counter(), [], 0
        used = time.process_time()

        async def client() -> None:
            nonlocal tokens
            while jobs:
                seconds, count = await self._ask(jobs.popleft())
                first.append(seconds)
                tokens += count

        await asyncio.gather(*(client() for _ in range(clients)))
        return Outcome(
            time.perf_counter() - begun,
            tokens,
            statistics.median(first),
            client_seconds=time.process_time() - used,
        )

    async def _ask(self, job: Job) -> tuple[float, int]:
        body = {"prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0.0, "stream": True}
        sent = json.dumps(body | self._extra).encode()
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
        writer.write(head.encode() + sent)
        parts, first = [], None
        while part := await reader.read(2**16):
            if first is None and b"data: " in part:
                first = time.perf_counter() - begun
            parts.append(part)
        writer.close()
        return first or 0.0, _tokens_in(b"".join(parts))

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


def _tokens_in(reply: bytes) -> int:
    """Tokens of a stream: as its usage says, or as many as there are pieces of text."""
    if not reply.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"refused: {reply[:500]!r}")
    pieces = 0
    for line in reply.split(b"\n"):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event.get("usage"):
                return int(event["usage"]["completion_tokens"])
            pieces += bool(event["choices"] and event["choices"][0]["text"])
    return pieces


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# --- without HTTP -------------------------------------------------------------------------------


class Bare:
    """The engine in a process of its own: loads go in, outcomes come out, a line each."""

    def __init__(self, model: str, context: int, threads: int) -> None:
        command = [sys.executable, __file__, "--bare", model, "--context", str(context)]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, jobs: list[Job], clients: int) -> Outcome:
        """Have a load answered."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"clients": clients, "jobs": [asdict(job) for job in jobs]}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def bare(model: str, context: int, threads: int) -> None:
    """The process of `Bare`."""
    from earnest.engine import Request, SamplingParams, load

    opened = load(model, max_context=context, threads=threads)
    engine, runner = opened.engine, opened.runner
    step, inside = runner.step, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal inside
        begun = time.perf_counter()
        logits = step(*arguments)
        inside += time.perf_counter() - begun
        return logits

    runner.step = timed  # type: ignore[method-assign]
    for line in sys.stdin:
        asked = json.loads(line)
        requests = deque(
            Request(
                tuple(opened.text_ids(job["prompt"])),
                SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True),
            )
            for job in asked["jobs"]
        )
        engine.blocks.forget()
        inside, tokens, first = 0.0, 0, []
        begun, added = time.perf_counter(), {}
        while requests or engine.has_work:
            while requests and engine.num_running + engine.num_waiting < asked["clients"]:
                added[engine.add(requests.popleft())] = time.perf_counter()
            for number, event in engine.step():
                tokens += event.token_id is not None  # type: ignore[union-attr]
                if number in added:
                    first.append(time.perf_counter() - added.pop(number))
        seconds = time.perf_counter() - begun
        found = Outcome(seconds, tokens, statistics.median(first), inside)
        print(json.dumps(asdict(found)), flush=True)


# --- taking turns -------------------------------------------------------------------------------


def start(options: argparse.Namespace, path: str, sides: dict[str, Server | Bare]) -> None:
    """Start all sides."""
    port, peer_port = _free_port(), _free_port()
    threads, context = str(options.threads), str(options.context)
    ours = [sys.executable, "-m", "earnest", "serve", path, "--port", str(port)]
    ours += ["--threads", threads, "--context", context]
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    sides["earnest"] = Server(ours, port, extra)
    sides["engine"] = Bare(path, options.context, options.threads)
    if options.peer:
        peer = [options.peer_python, "-m", "llama_cpp.server", "--model", path]
        peer += ["--port", str(peer_port), "--n_ctx", context, "--n_threads", threads]
        peer += ["--n_threads_batch", threads, "--interrupt_requests", "false"]
        sides["llama.cpp"] = Server([*peer, "--verbose", "false"], peer_port, {})


def measured(options: argparse.Namespace, path: str) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    sides: dict[str, Server | Bare] = {}
    rows = []
    try:
        start(options, path, sides)
        names = list(sides)
        for side in sides.values():
            side.run(load_of(options.clients[0], 999, options.scale / 2), options.clients[0])
        for clients in options.clients:
            outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
            for number in range(options.rounds):
                # A prefix that was kept would be found again: other prompts in every round.
                jobs = load_of(options.per_client * clients, options.seed + number, options.scale)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    found = sides[name].run(jobs, clients)
                    outcomes[name].append(found)
                    print(
                        f"{clients} clients, round {number + 1}: {name} {found.rate:.1f} tokens/s, "
                        f"first token after {found.first:.2f} s",
                        file=sys.stderr,
                    )
            rows.append({"clients": clients, **_summary(outcomes)})
    finally:
        for side in sides.values():
            side.close()
    return rows


def _summary(outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    ours = outcomes["earnest"]
    runner = [o.tokens / (o.runner_seconds or o.seconds) for o in outcomes["engine"]]
    row: dict[str, Any] = {
        name: {
            "tokens_per_second": statistics.median(o.rate for o in found),
            "first_token_seconds": statistics.median(o.first for o in found),
        }
        for name, found in outcomes.items()
    }
    row["runner"] = {"tokens_per_second": statistics.median(runner)}
    row["earnest"]["client_processors"] = statistics.median(
        (o.client_seconds or 0.0) / o.seconds for o in ours
    )
    row["ratios"] = {
        "of the engine": _ratio(ours, [o.rate for o in outcomes["engine"]]),
        "of the runner": _ratio(ours, runner),
    }
    if "llama.cpp" in outcomes:
        row["ratios"]["over llama.cpp"] = _ratio(ours, [o.rate for o in outcomes["llama.cpp"]])
    return row


def _ratio(ours: list[Outcome], theirs: list[float]) -> float:
    return statistics.median(o.rate / other for o, other in zip(ours, theirs, strict=True))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, or a built-in name")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--per-client", type=int, default=3, help="requests of each, on average")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers are ended, too
    if options.bare:
        bare(options.bare, options.context, options.threads)
        return
    rows = measured(options, str(hub.locate(options.model)))
    if options.json:
        print(json.dumps({"model": options.model, "threads": options.threads, "rows": rows}))
        return
    for row in rows:
        rates = ", ".join(
            f"{name} {found['tokens_per_second']:.0f}"
            for name, found in row.items()
            if name not in ("clients", "ratios")
        )
        ratios = ", ".join(f"{ratio:.2f} {name}" for name, ratio in row["ratios"].items())
        clients = f"the clients took {row['earnest']['client_processors']:.0%} of a processor"
        print(f"{row['clients']} clients: {rates} tokens/s; earnest serve is {ratios}; {clients}")


if __name__ == "__main__":
    main()
