"""Guessing changes how long a text takes, never the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
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
    """A drafter that is told what will be written, and guesses it, or before a place anything else;
    only at every so manieth place."""

    def __init__(
        self, texts: dict[tuple[int, ...], list[int]], *, right_from: float = 0, every: int = 1
    ) -> None:
        self._texts, self._right_from, self._every = texts, right_from, every
        self.asked, self.forgotten = 0, set[int]()

    def draft(self, wanted: Sequence[tuple[Running, int]]) -> list[tuple[int, ...]]:
        self.asked += 1
        return [self._draft(sequence, count) for sequence, count in wanted]

    def _draft(self, sequence: Running, count: int) -> tuple[int, ...]:
        assert count > 0
        prompt = sequence.request.prompt_ids
        written = len(sequence.tokens) - len(prompt)
        if written % self._every:
            return ()
        text = self._texts[prompt][written:][:count]
        return tuple(
            token if place >= self._right_from else (token + 1) % 16
            for place, token in enumerate(text, written)
        )

    def forget(self, sequence_id: int) -> None:
        assert sequence_id not in self.forgotten
        self.forgotten.add(sequence_id)


def still() -> float:
    """A clock that stands still: every step takes as long as any other, and asking nothing."""
    return 0.0


def priced(
    runner: FakeRunner,
    each: float,
    drafter: Told | None = None,
    asking: float = 0,
    slow: int = 0,
) -> Callable[[], float]:
    """A clock by which a step takes 1, and `each` for every token, and the drafter `asking`.
    Of 60 steps the last `slow` take thrice as long."""
    now, seen = 0.0, 0

    def clock() -> float:
        nonlocal now, seen
        for number, batch in enumerate(runner.batches[seen:], seen):
            now += (3 if number % 60 >= 60 - slow else 1) * (1 + each * len(batch.tokens))
        seen = len(runner.batches)
        return now + (0 if drafter is None else asking * drafter.asked)

    return clock


def one_text(
    tokens: int, each: float, *, asking: float = 0, slow: int = 0, most: int = 8, **told: Any
) -> tuple[list[int], Told]:
    """The rows of the steps in which one text was written, and who drafted."""
    texts = {(BOS,): [2] * tokens}
    runner = FakeRunner(
        config=tiny_config(context=tokens + 8),
        num_blocks=tokens // 4 + 4,
        logits=lambda history, size: -np.abs(np.arange(size, dtype=np.float32) - 2),
    )
    drafter = Told(texts, **told)
    clock = priced(runner, each, drafter, asking, slow)
    machine = engine(runner, drafter, clock, most=most)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    (events,) = run(machine, [Request((BOS,), params)]).values()
    assert [event.token_id for event in events] == [2] * tokens
    return [len(batch.tokens) for batch in runner.batches], drafter


def run(machine: Engine, requests: Sequence[Request]) -> dict[int, list[TokenEvent]]:
    found: dict[int, list[TokenEvent]] = {machine.add(request): [] for request in requests}
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent), event
            found[number].append(event)
    machine.blocks.check_idle()
    return found


def engine(
    runner: FakeRunner, drafter: Drafter | None, clock: Callable[[], float], most: int = 8
) -> Engine:
    speculation = None if drafter is None else Speculation(drafter, most=most, clock=clock)
    tokenizer: Any = FakeTokenizer()
    return Engine(runner, tokenizer, eos_ids=[EOS], speculation=speculation)


@pytest.mark.parametrize("asking", [0, 0.1])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_always_right_or_always_wrong(
    temperature: float, right: bool, asking: float
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
    plain = list(run(engine(FakeRunner(), None, still), requests).values())
    texts = {
        request.prompt_ids: [event.token_id for event in events if event.token_id is not None]
        for request, events in zip(requests, plain, strict=True)
    }
    drafter = Told(texts, right_from=0 if right else math.inf)
    runner = FakeRunner(num_blocks=64)
    machine = engine(runner, drafter, priced(runner, 0.02, drafter, asking))
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
    machine = engine(runner, PromptLookup(), still)
    machine.add(Request((BOS,), SamplingParams(temperature=0, max_tokens=40)))
    events = [event for _ in range(25) for _, event in machine.step()]
    assert [event.token_id for event in events] == (pattern * 14)[:40]  # type: ignore[union-attr]
    assert not machine.has_work and machine.counters.accepted_tokens > 25


def test_what_does_not_pay_is_tried_again_after_longer_and_longer() -> None:
    rows, _ = one_text(2000, each=100)
    tried = [step for step, count in enumerate(rows) if count > 1]
    gaps = [after - before for before, after in pairwise(tried)]
    assert tried[0] < 5 and gaps == pytest.approx([256, 512, 1024], abs=5)


def test_steps_without_guesses_are_looked_at_again_soon() -> None:
    rows, _ = one_text(1500, each=0.02, most=1)
    plain = [step for step, count in enumerate(rows) if count == 1]
    assert 0 < max(after - before for before, after in pairwise(plain)) <= 258
    assert len(plain) < 10


def test_a_drafter_that_costs_nothing_is_always_asked() -> None:
    rows, drafter = one_text(500, each=100)
    assert len(rows) > 450 and drafter.asked >= len(rows) - 5


@pytest.mark.parametrize("asking", [0.02, 0.5, 3])
def test_asking_in_vain_takes_next_to_nothing(asking: float) -> None:
    rows, drafter = one_text(1500, each=0, right_from=math.inf, asking=asking)
    share = drafter.asked * asking / len(rows)
    begin = 16 * asking / len(rows)  # it is asked some times before its price is known
    assert 0.002 < share < 0.0025 + begin
    assert sum(count > 1 for count in rows) < 10


def test_a_drafter_whose_guesses_are_run_is_always_asked() -> None:
    rows, drafter = one_text(400, each=0.02, asking=1)
    assert len(rows) < 55 and drafter.asked >= len(rows) - 5


def test_what_asking_takes_is_held_against_guesses_only() -> None:
    """A step with one takes 4 and brings 2; one for which the drafter was asked in vain, 1."""
    rows, drafter = one_text(500, each=0, asking=3, most=1)
    assert sum(count > 1 for count in rows) < 8
    assert drafter.asked < 15


@pytest.mark.parametrize(("each", "pays"), [(15.8, False), (5.7, True)])
def test_a_guess_must_bring_more_than_estimates_are_worth(each: float, pays: bool) -> None:
    """It brings 3% and 8% more tokens a second."""
    rows, _ = one_text(500, each=each, most=1)
    guessed = sum(count > 1 for count in rows)
    assert guessed > 230 if pays else guessed < 5


def test_a_few_slow_steps_do_not_make_guesses_look_cheap() -> None:
    rows, _ = one_text(240, each=100, most=1, slow=8)
    assert sum(count > 1 for count in rows) == 1


@pytest.mark.parametrize(("asking", "soon"), [(0, 10), (0.01, 12), (0.5, 400)])
def test_it_is_noticed_when_guesses_begin_to_be_right(asking: float, soon: int) -> None:
    rows, _ = one_text(900, each=0.02, asking=asking, right_from=300)
    before, after = rows[20:300], rows[300:]
    assert max(before) == 1
    assert next(step for step, count in enumerate(after) if count > 1) <= soon


def test_guesses_that_are_not_run_are_held_against_later_steps_too() -> None:
    """The drafter is asked at every fourth step, and five right guesses show that it pays."""
    rows, _ = one_text(300, each=0.5, asking=0.015, right_from=100)
    assert max(rows[20:100]) == 1
    assert next(step for step, count in enumerate(rows[100:]) if count > 1) <= 12


def test_more_guesses_are_expected_after_some() -> None:
    """At every fourth place there is one: of eight askings in vain only one would be made."""
    rows, _ = one_text(400, each=0.02, asking=0.03, most=1, every=4)
    assert sum(count > 1 for count in rows) > 90


def test_few_guesses_are_tried_before_anything_is_known_about_them() -> None:
    rows, _ = one_text(100, each=0.02)
    first = next(count for count in rows if count > 1)
    assert 3 <= first <= 6  # of 9: each is as likely as not if the one before it is right


def test_what_more_guesses_take_is_foreseen_from_fewer() -> None:
    """Two of each are no better value than one; nobody has to try."""
    requests = [Request((BOS, n), SamplingParams(max_tokens=40, ignore_eos=True)) for n in (2, 3)]
    texts = {request.prompt_ids: [4] * 40 for request in requests}
    runner = FakeRunner(num_blocks=64, logits=lambda history, size: np.eye(size)[4] * 100)
    drafter = Told(texts)
    run(engine(runner, drafter, priced(runner, 20)), requests)
    assert sum(len(batch.tokens) > 2 for batch in runner.batches[1:]) == 1


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
    machine = engine(runner, Told(texts), still)
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
    told = Speculation(Told(texts), clock=still)
    right = LanguageModel(plain.checkpoint, plain.runner, speculation=told)
    assert list(right.stream(prompt, params)) == expected
    assert right.engine.counters.accepted_tokens > 150
