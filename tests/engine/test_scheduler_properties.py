"""Whatever is asked, cancelled, put off or broken: no block leaks, none has two owners, all end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from fake_runner import EOS, VOCAB, FakeRunner, FakeTokenizer, hashed_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.engine.blocks import keyed_digest
from earnest.engine.engine import Engine
from earnest.engine.request import Request, SamplingParams, TokenEvent
from earnest.engine.scheduler import PATIENCE
from earnest.engine.speculation import PromptLookup, Speculation

BAD = 13  # a prompt that begins with this token ends in an error somewhere


def logits(history: Any, vocab_size: int) -> Any:
    row = hashed_logits(history, vocab_size)
    if history[0] == BAD and len(history) % 7 == 0:
        row[:] = np.nan
    return row


def engine_of(
    blocks: int, size: int, sequences: int, budget: int, guesses: int, bits: int
) -> Engine:
    # By a clock that stands still guesses pay as soon as one is right.
    guessing = Speculation(PromptLookup(2, 1), most=guesses, clock=lambda: 0.0)
    machine = Engine(
        FakeRunner(num_blocks=blocks, block_size=size, logits=logits),
        FakeTokenizer(),  # type: ignore[arg-type]
        eos_ids=[EOS],
        max_sequences=sequences,
        max_batch_tokens=sequences + budget,
        speculation=guessing if guesses else None,
    )
    mask = (1 << bits) - 1
    machine.blocks._digest = lambda key, content: (
        int.from_bytes(keyed_digest(key, content)) & mask
    ).to_bytes(16)
    return machine


engines = st.builds(
    engine_of,
    blocks=st.integers(16, 30),
    size=st.integers(4, 6),
    sequences=st.integers(1, 5),
    budget=st.integers(0, 30),
    guesses=st.sampled_from([0, 2]),
    bits=st.sampled_from([0, 4, 128]),
)
prompts = st.lists(st.sampled_from([2, 3, BAD]), min_size=1, max_size=24) | st.lists(
    st.integers(0, VOCAB - 1), min_size=1, max_size=24
)
asked = st.builds(
    Request,
    prompts.map(tuple),
    st.builds(
        SamplingParams,
        max_tokens=st.none() | st.integers(0, 20),
        seed=st.integers(0, 99),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 1]),
    ),
    priority=st.integers(-1, 1),
    salt=st.sampled_from([b"", b"one"]),
)
# What happens between steps: a request with so many answers comes, one of those alive is cancelled.
happenings = st.lists(
    st.tuples(st.just("ask"), asked, st.integers(1, 3))
    | st.tuples(st.just("cancel"), st.integers(0, 99), st.just(0))
    | st.tuples(st.just("step"), st.integers(1, 6), st.just(0))
    | st.tuples(st.just("borrow"), st.integers(1, 40), st.just(0)),
    max_size=30,
)


def check_blocks(machine: Engine) -> None:
    """The books at this moment: every block is free, remembered or used, and used by exactly those
    who say so; who shares one shares all that came before it."""
    pool = machine.blocks
    owners: Counter[int] = Counter()
    holders: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
    for sequence in machine._scheduler.running:
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        size = machine._scheduler._block_size
        for index, block in enumerate(sequence.blocks):
            owners[block] += 1
            beginning = tuple(sequence.tokens[: (index + 1) * size])
            holders.setdefault(block, []).append((sequence.request.salt, beginning))
            if pool._users[block] > 1:
                assert (index + 1) * size <= len(sequence.tokens)
    assert [owners[block] for block in range(pool.num_blocks)] == pool._users
    assert all(len(set(found)) == 1 for found in holders.values())
    idle = [*pool._free, *pool._unused]
    assert len(idle) + len(owners) == pool.num_blocks and not set(idle) & set(owners)
    for sequence in machine._scheduler._waiting.values():
        assert not sequence.blocks


@settings(max_examples=150, deadline=None)
@given(engines, happenings, st.data())
def test_the_books_are_right_at_every_moment(
    machine: Engine, events: list[tuple[str, Any, int]], data: st.DataObject
) -> None:
    alive: set[int] = set()

    def step() -> None:
        for number, event in machine.step():
            assert number in alive
            if not isinstance(event, TokenEvent) or event.finish_reason is not None:
                alive.discard(number)
        check_blocks(machine)

    for what, given_, count in events:
        if what == "ask":
            leader = None
            for _ in range(count):
                number = machine.add(given_, after=leader)
                leader = leader or number
                alive.add(number)
        elif what == "cancel" and alive:
            number = sorted(alive)[given_ % len(alive)]
            assert machine.cancel(number)
            alive.discard(number)
        elif what == "borrow":
            with machine.borrowed(given_) as blocks:
                assert not {b for s in machine._scheduler.running for b in s.blocks} & set(blocks)
        else:
            for _ in range(given_ if what == "step" else 1):
                step()
    for _ in range(20_000):
        if not machine.has_work:
            break
        step()
    assert not alive and not machine.has_work
    machine.blocks.check_idle()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(16, 24),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.integers(1, 24),
)
def test_nobody_starves(sequences: int, blocks: int, levels: list[int], length: int) -> None:
    """However many more urgent ones keep coming, and whoever takes all blocks."""
    machine = engine_of(blocks, 4, sequences, 8, 0, 128)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
    humble = {machine.add(Request((2,) * length, params, priority=level)) for level in levels}
    worst = (max(levels) + 3) * PATIENCE + 2000
    for _ in range(worst):
        while machine.num_waiting < len(humble) + 2:
            machine.add(Request((3,) * 20, params, priority=-1))
        humble -= {
            number
            for number, event in machine.step()
            if isinstance(event, TokenEvent) and event.finish_reason
        }
        if not humble:
            return
    raise AssertionError("somebody waits for ever")
