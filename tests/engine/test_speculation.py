"""Guessing changes how long a text takes, never the text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_runner import BOS, EOS, FakeRunner, FakeTokenizer, tiny_config

from earnest.engine import LanguageModel, load
from earnest.engine.engine import Engine
from earnest.engine.request import Request, SamplingParams, TokenEvent
from earnest.engine.sequence import Sequence as Running
from earnest.engine.speculation import Drafter, PromptLookup, Speculation
from earnest.errors import UserError
from earnest.runners.native import isa

needs_kernels = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")


class Told:
    """A drafter that is told what will be written, and guesses it, or anything else."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], *, right: bool, free: bool) -> None:
        self._texts, self._right, self.is_free = texts, right, free
        self.asked, self.forgotten = 0, set[int]()

    def draft(self, wanted: Sequence[tuple[Running, int]]) -> list[tuple[int, ...]]:
        self.asked += 1
        return [self._draft(sequence, count) for sequence, count in wanted]

    def _draft(self, sequence: Running, count: int) -> tuple[int, ...]:
        assert count > 0
        prompt, written = sequence.request.prompt_ids, len(sequence.tokens)
        text = self._texts[prompt][written - len(prompt) :][:count]
        return tuple(text) if self._right else tuple((token + 1) % 16 for token in text)

    def forget(self, sequence_id: int) -> None:
        assert sequence_id not in self.forgotten
        self.forgotten.add(sequence_id)


def steady() -> Callable[[], float]:
    """A clock by which every step takes as long as any other."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def priced(runner: FakeRunner, each: float) -> Callable[[], float]:
    """A clock by which a step takes 1, and `each` for every token."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1 + each * len(runner.batches[-1].tokens) if runner.batches else 1
        return now

    return clock


def run(machine: Engine, requests: Sequence[Request]) -> dict[int, list[TokenEvent]]:
    found: dict[int, list[TokenEvent]] = {machine.add(request): [] for request in requests}
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent), event
            found[number].append(event)
    machine.blocks.check_idle()
    return found


def engine(runner: FakeRunner, drafter: Drafter | None, clock: Callable[[], float]) -> Engine:
    speculation = None if drafter is None else Speculation(drafter, clock=clock)
    tokenizer: Any = FakeTokenizer()
    return Engine(runner, tokenizer, eos_ids=[EOS], speculation=speculation)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_always_right_or_always_wrong(
    temperature: float, right: bool, free: bool
) -> None:
    def asked(*prompt: int) -> Request:
        params = SamplingParams(
            max_tokens=45, temperature=temperature, seed=5, logprobs=2, ignore_eos=True
        )
        return Request(prompt, params)

    requests = [
        asked(BOS, 2, 3),
        asked(4, 5),
        asked(
            6,
        ),
    ]
    plain = list(run(engine(FakeRunner(), None, steady()), requests).values())
    texts = {
        request.prompt_ids: [event.token_id for event in events if event.token_id is not None]
        for request, events in zip(requests, plain, strict=True)
    }
    drafter = Told(texts, right=right, free=free)
    runner = FakeRunner(num_blocks=64)
    machine = engine(runner, drafter, priced(runner, 0.02))
    found = run(machine, requests)
    assert list(found.values()) == plain  # text, ids, log-probabilities, ends
    assert drafter.forgotten == set(found)
    counters = machine.counters
    assert counters.generated_tokens == 3 * 45
    assert sum(counters.accepted_at) == counters.accepted_tokens <= counters.drafted_tokens
    if right:
        assert counters.accepted_tokens == counters.drafted_tokens > 80
        assert counters.accepted_at[0] == counters.drafts
        assert len(runner.batches) < 15
    else:
        assert counters.accepted_tokens == 0 < counters.drafted_tokens
        # All are tried once, to see what it takes, and fewer and fewer after that.
        assert len(runner.batches) == 45 and counters.drafted_tokens < 100


def test_prompt_lookup_saves_steps() -> None:
    pattern = [2, 3, 6]

    def logits(history: Sequence[int], size: int) -> Any:
        wanted = pattern[(len(history) - 1) % 3]
        return -np.abs(np.arange(size, dtype=np.float32) - wanted)

    runner = FakeRunner(logits=logits)
    machine = engine(runner, PromptLookup(), steady())
    machine.add(Request((BOS,), SamplingParams(temperature=0, max_tokens=40)))
    events = [event for _ in range(25) for _, event in machine.step()]
    assert [event.token_id for event in events] == (pattern * 14)[:40]  # type: ignore[union-attr]
    assert not machine.has_work and machine.counters.accepted_tokens > 25


@pytest.mark.parametrize("free", [True, False])
def test_guesses_that_do_not_pay_are_given_up(free: bool) -> None:
    runner = FakeRunner(config=tiny_config(context=600), num_blocks=150)
    drafter = Told({(BOS,): [2] * 600}, right=True, free=free)
    machine = engine(runner, drafter, priced(runner, 100.0))
    run(machine, [Request((BOS,), SamplingParams(max_tokens=500, ignore_eos=True, seed=0))])
    guessed = sum(len(batch.tokens) > 1 for batch in runner.batches[1:])
    # Prices are looked at again from time to time; a drafter that costs something is left alone.
    assert 0 < guessed < 30
    assert drafter.asked > 480 if free else drafter.asked < 40


def test_the_longest_match_is_taken_and_goes_on_in_circles() -> None:
    def draft(tokens: list[int], count: int) -> tuple[int, ...]:
        class Text:
            id = 1

        Text.tokens = tokens  # type: ignore[attr-defined]
        (found,) = PromptLookup().draft([(Text, count)])  # type: ignore[list-item]
        return found

    assert draft([9, 1, 2, 3, 7, 8, 2, 3, 5, 1, 2, 3], 3) == (7, 8, 2)  # not the later 5
    assert draft([4, 2, 3, 7, 4, 2, 3, 8, 6, 2, 3], 1) == (8,)  # of equals the latest
    assert draft([1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)
    assert draft([1, 2, 3, 4], 5) == ()
    assert draft([1], 5) == () and draft([1, 1], 5) == ()


def test_nobody_is_put_off_for_a_guess() -> None:
    requests = [Request((BOS, n), SamplingParams(max_tokens=13, ignore_eos=True)) for n in (2, 3)]
    texts = {request.prompt_ids: [4] * 13 for request in requests}
    runner = FakeRunner(num_blocks=8, block_size=4)  # as many as both take in the end
    machine = engine(runner, Told(texts, right=True, free=True), steady())
    run(machine, requests)
    assert machine.counters.drafted_tokens > 0 == machine.counters.preemptions


def test_names() -> None:
    with pytest.raises(UserError, match="no such speculation"):
        load("stories", speculation="magic")  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_native_runner_gives_the_same_bits(temperature: float) -> None:
    prompt = "Lily had a red ball. Tim had a red ball. Lily had a"
    params = SamplingParams(max_tokens=200, temperature=temperature, seed=1, logprobs=3)
    plain = load("stories", threads=1, speculation=None)
    guessing = load("stories", threads=1)
    expected = list(plain.stream(prompt, params))
    assert list(guessing.stream(prompt, params)) == expected
    assert plain.engine.counters.drafted_tokens == 0
    ids = tuple(plain.text_ids(prompt))
    texts = {ids: [event.token_id for event in expected if event.token_id is not None]}
    told = Speculation(Told(texts, right=True, free=True), clock=steady())
    right = LanguageModel(plain.checkpoint, plain.runner, speculation=told)
    assert list(right.stream(prompt, params)) == expected
    assert right.engine.counters.accepted_tokens > 150
