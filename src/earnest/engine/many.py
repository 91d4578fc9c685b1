"""Many requests that are all known: run at once, what they have in common once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from earnest.engine.engine import Engine
from earnest.engine.request import Request, TokenEvent
from earnest.errors import EarnestError

# Requests that are in the engine at a time: enough that it never lacks any, and few enough that its
# queue, which is looked through at every step, stays short.
WINDOW = 256


def run_all(
    engine: Engine, requests: Sequence[Request], *, block_size: int
) -> Iterator[tuple[int, list[TokenEvent]]]:
    """Run requests to their ends.

    A request waits for the first one that begins with the same whole blocks (of its salt, and as
    many as it shares with any before it), and then reads those blocks. Leaving the loop gives up
    the rest.

    Args:
        engine: nobody else may step it meanwhile.
        requests: what to run.
        block_size: positions in a KV block of the engine's runner.

    Yields:
        (index in `requests`, all its events), in the order in which they end.

    Raises:
        PromptError, SamplingError: a request does not fit; nothing has been run.
        EarnestError: a request failed; the others are given up.
    """
    for request in requests:
        engine.check(request)
    order = sorted(range(len(requests)), key=lambda i: (requests[i].salt, requests[i].prompt_ids))
    leaders = leaders_of([(requests[i].salt, requests[i].prompt_ids) for i in order], block_size)
    numbers: list[int] = []  # the engine's, in this order
    running: dict[int, tuple[int, list[TokenEvent]]] = {}
    try:
        while running or len(numbers) < len(order):
            while len(numbers) < len(order) and len(running) < WINDOW:
                index, leader = order[len(numbers)], leaders[len(numbers)]
                after = None if leader is None else numbers[leader]
                numbers.append(engine.add(requests[index], after=after))
                running[numbers[-1]] = index, []
            for number, event in engine.step():
                if isinstance(event, EarnestError):
                    del running[number]
                    raise event
                running[number][1].append(event)
                if event.finish_reason is not None:
                    yield running.pop(number)
    finally:
        for number in running:
            engine.cancel(number)


def leaders_of(prompts: Sequence[tuple[bytes, Sequence[int]]], block_size: int) -> list[int | None]:
    """For each of sorted (salt, prompt), the first one that shares with it as many whole blocks as
    any before it does; None if none shares any."""
    leaders: list[int | None] = []
    path: list[tuple[int, int]] = []  # (blocks in common, first that has them) down to the last one
    for index, (salt, prompt) in enumerate(prompts):
        shared = 0
        if index and prompts[index - 1][0] == salt:
            shared = _common(prompts[index - 1][1], prompt) // block_size
        first = index - 1
        while path and path[-1][0] > shared:
            first = path.pop()[1]
        if shared and (not path or path[-1][0] < shared):
            path.append((shared, first))
        leaders.append(path[-1][1] if shared else None)
    return leaders


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))
