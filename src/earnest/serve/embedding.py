"""Vectors for texts: what the interfaces that ask for them share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from earnest.engine import Pooling, PoolingKind, Request, SamplingParams
from earnest.engine.reading import normalized
from earnest.runners.base import Float32
from earnest.serve.journal import current
from earnest.serve.state import Served

# Texts of one request: as many as OpenAI takes.
MAX_INPUTS = 2048
# Of those, so many are with the engine at a time; others' requests get in between.
_AT_A_TIME = 64


async def embedded(
    served: Served,
    prompts: Sequence[Sequence[int]],
    kind: PoolingKind,
    *,
    normalize: bool,
    salt: bytes = b"",
    priority: int = 0,
) -> tuple[list[Float32], int]:
    """A vector float32 `[hidden_size]` for each prompt, and how many tokens were not computed
    again.

    Raises:
        PromptError: one of the prompts cannot be run; nothing has been.
    """
    requests = [
        Request(
            tuple(ids),
            SamplingParams(max_tokens=0),
            priority=priority,
            salt=current().tenant + salt,
            reading=Pooling(kind),
        )
        for ids in prompts
    ]
    for request in requests:
        served.model.engine.check(request)
    turn = asyncio.Semaphore(max(1, min(_AT_A_TIME, served.limits.waiting)))
    record, cached = current(), 0

    async def one(request: Request) -> Float32:
        nonlocal cached
        async with turn:
            record.asks(served.name, len(request.prompt_ids), None, 1)
            watch = served.metrics.clock()
            stream = served.service.stream([request], timeout=served.limits.request_seconds)
            async with aclosing(stream):
                async for _, event in stream:
                    if event.embedding is not None:
                        record.took(0, event, watch.read(event), None)
                        cached += event.cached_tokens or 0
                        return normalized(event.embedding) if normalize else event.embedding
        raise AssertionError("a prompt was read without a result")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in requests]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    record.finish.append("stop")
    return [task.result() for task in tasks], cached
