"""Two hundred different requests, one after the other and all at once: the same bytes.

Native kernels, few KV blocks (so that requests are put off and taken up again), guesses, answers
that share prompts, clients that go away in the middle.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from running import Server

from earnest import hub
from earnest.checkpoint.open import open_checkpoint
from earnest.engine.language_model import LanguageModel
from earnest.engine.speculation import PromptLookup, Speculation
from earnest.errors import EarnestError
from earnest.runners.native import isa
from earnest.runners.native.runner import NativeRunner
from earnest.serve.state import Limits, Served

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

WORDS = [
    "Once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "girl",
    "boy",
    "dog",
    "who",
    "liked",
    "to",
    "play",
    "the",
    "big",
    "red",
    "ball",
    "and",
]


def drawn(rng: random.Random, longest: int) -> dict[str, Any]:
    """A request for a completion, in any of the ways there are."""
    count = rng.choice([1, 3, 10, 40, longest])
    beginning = "Once upon a time there was a little girl named Lily. " * rng.choice([0, 0, 1, 3])
    body: dict[str, Any] = {
        "prompt": beginning + " ".join(rng.choice(WORDS) for _ in range(count)),
        "max_tokens": rng.choice([0, 1, 5, 20, 60]),
        "temperature": rng.choice([0, 0.7, 1.3]),
        "top_p": rng.choice([1, 0.9]),
        "top_k": rng.choice([0, 5]),
        "seed": rng.randrange(2**32),
        "n": rng.choice([1, 1, 1, 2, 4]),
        "priority": rng.randrange(-1, 2),
        "stream": rng.random() < 0.5,
        "return_token_ids": True,
        "cache_salt": rng.choice([None, None, "a"]),
        "ignore_eos": rng.random() < 0.3,
    }
    for name, values in (
        ("stop", (["."], ["the", "ball"])),
        ("logprobs", (0, 3)),
        ("repetition_penalty", (1.2,)),
        ("frequency_penalty", (0.4,)),
        ("min_tokens", (1,)),
        ("echo", (True,)),
        ("guided_regex", ("[a-z ]{4,20}",)),
        ("bad_words", (["the"],)),
    ):
        if rng.random() < 0.2:
            body[name] = rng.choice(values)
    if body.get("min_tokens") and not body["max_tokens"]:
        body["max_tokens"] = 1
    return body


def essence(reply: httpx.Response) -> Any:
    """All of an answer but its name, its time, and what was found in the cache."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        found = reply.json()
        return found["choices"], found["usage"]["completion_tokens"]
    events = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices: dict[int, list[Any]] = {}  # answers are written beside each other, in any order
    for event in events:
        for choice in json.loads(event)["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    return choices


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], patience: float) -> Any:
    """With patience, the answer; without, nothing: it is left in the middle."""
    if patience == float("inf"):
        return essence(await client.post(url, json=body))
    try:
        async with asyncio.timeout(patience):
            await client.post(url, json=body)
    except TimeoutError:
        return None
    return None


def compare(path: str, *, requests: int, blocks: int, longest: int, context: int) -> None:
    rng = random.Random(7)
    bodies = [drawn(rng, longest) for _ in range(requests)]
    leaving = [rng.random() / 3 if rng.random() < 0.15 else float("inf") for _ in bodies]
    checkpoint = open_checkpoint(path)
    runner = NativeRunner(checkpoint, num_blocks=blocks, block_size=16, threads=2)
    model = LanguageModel(
        checkpoint, runner, max_context=context, speculation=Speculation(PromptLookup())
    )
    server = Server(Served(model, "small", limits=Limits(waiting=4096)))
    url = f"{server.url}/v1/completions"

    async def alone() -> list[Any]:
        async with httpx.AsyncClient(timeout=120) as client:
            return [await ask(client, url, body, float("inf")) for body in bodies]

    async def together() -> list[Any]:
        order = list(range(requests))
        rng.shuffle(order)
        limits = httpx.Limits(max_connections=requests)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            found = await asyncio.gather(*(ask(client, url, bodies[n], leaving[n]) for n in order))
        return [answer for _, answer in sorted(zip(order, found, strict=True))]

    try:
        expected = asyncio.run(alone())
        model.engine.blocks.forget()
        before = model.engine.counters.preemptions
        found = asyncio.run(together())
        for n, body in enumerate(bodies):
            if leaving[n] == float("inf"):
                assert found[n] == expected[n], body
        assert model.engine.counters.preemptions > before, "nobody was put off: too many blocks"
        assert sum(patience < 1 for patience in leaving) > requests // 20
    finally:
        server.close()


def test_two_hundred_requests_alone_and_together() -> None:
    path = str(hub.locate("stories"))
    compare(path, requests=200, blocks=32, longest=60, context=512)


@pytest.mark.slow
def test_on_a_model_that_people_use() -> None:
    try:
        path = str(hub.locate("smollm2"))
    except EarnestError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error.problem}")
    compare(path, requests=50, blocks=64, longest=300, context=1024)
