"""The scheduler, driven with a model whose output for a sequence is known without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_runner import BOS, EOS, VOCAB, FakeRunner, FakeTokenizer, hashed_logits, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.engine.blocks import keyed_digest
from earnest.engine.engine import Engine
from earnest.engine.request import Request, SamplingParams, TokenEvent, TokenLogprobs
from earnest.engine.sampler import Sampler, token_logprobs
from earnest.engine.scheduler import PATIENCE
from earnest.engine.speculation import PromptLookup, Speculation
from earnest.errors import CheckpointError, EarnestError, PromptError, SamplingError, UserError

CONTEXT = 64


def engine(runner: FakeRunner | None = None, **options: Any) -> Engine:
    options = {"eos_ids": [EOS]} | options
    return Engine(runner or FakeRunner(), FakeTokenizer(), **options)  # type: ignore[arg-type]


@dataclass
class Result:
    """What came out of one request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def take(self, event: TokenEvent) -> None:
        assert self.reason is None, "an event after the end"
        self.text += event.text
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            self.prompt_logprobs = event.prompt_logprobs
        self.reason = event.finish_reason


def drive(machine: Engine, most_steps: int = 10_000) -> dict[int, Result]:
    results: dict[int, Result] = {}
    for _ in range(most_steps):
        if not machine.has_work:
            machine.blocks.check_idle()
            return results
        for number, event in machine.step():
            assert isinstance(event, TokenEvent), event
            results.setdefault(number, Result()).take(event)
    raise AssertionError("the engine does not come to an end")


def alone(request: Request, context: int = CONTEXT) -> Result:
    """The result of a request by plain repetition: no batches, no blocks, no streaming of text."""
    params, prompt = request.sampling, list(request.prompt_ids)
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    result, tokens = Result(), list(prompt)
    if params.prompt_logprobs is not None:
        result.prompt_logprobs = (
            None,
            *(
                token_logprobs(hashed_logits(prompt[:n]), prompt[n], params.prompt_logprobs)
                for n in range(1, len(prompt))
            ),
        )
    sampler = Sampler(params, VOCAB, prompt, sorted(stop_ids))
    room = context - len(prompt)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    result.reason = "length"
    decode, unarmed = FakeTokenizer().decode, 0
    while len(result.token_ids) < limit:
        logits = hashed_logits(tokens)
        token = sampler.sample(logits)
        tokens.append(token)
        result.token_ids.append(token)
        if params.logprobs is not None:
            result.logprobs.append(token_logprobs(logits, token, params.logprobs))
        if token in stop_ids:
            result.text, result.reason = decode(result.token_ids[:-1]), "stop"
            return result
        result.text = decode(result.token_ids)
        settled = result.text if len(result.token_ids) == limit else result.text.rstrip("\ufffd")
        ends = [
            (settled.find(stop, start) + len(stop), -len(stop))
            for stop in params.stop
            for start in range(len(settled))
            if settled.find(stop, start) + len(stop) > max(unarmed, len(stop) - 1)
        ]
        if len(result.token_ids) <= params.min_tokens:
            unarmed = len(settled)
        elif ends:
            end, negative = min(ends)
            result.text, result.reason = result.text[: end + negative], "stop"
            return result
    return result


token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30).map(tuple)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(4, 20),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(st.sampled_from(["ab", "abca", "cc", "你", "b€", " "]), max_size=2).map(tuple),
    stop_token_ids=st.sampled_from([(), (8,)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, 0, 3]),
)
# Few different tokens: prompts that begin alike, and texts that repeat themselves.
alike = st.lists(st.integers(2, 3), min_size=1, max_size=30).map(tuple)
requests = st.builds(
    Request,
    prompt_ids=token_lists | alike,
    sampling=sampling,
    priority=st.integers(-1, 1),
    salt=st.sampled_from([b"", b"tenant"]),
)
machines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(16, 40),
        "block_size": st.integers(4, 9),
        "max_sequences": st.integers(1, 5),
        "extra_budget": st.integers(0, 40),
        "prompt_logits": st.integers(1, 12),
        "share_prefixes": st.booleans(),
        "digest_bits": st.sampled_from([0, 4, 128]),
        "guesses": st.integers(0, 3),
    }
)


def machine_of(numbers: dict[str, Any]) -> Engine:
    runner = FakeRunner(num_blocks=numbers["num_blocks"], block_size=numbers["block_size"])
    machine = engine(
        runner,
        max_sequences=numbers["max_sequences"],
        max_batch_tokens=numbers["max_sequences"] + numbers["extra_budget"],
        share_prefixes=numbers["share_prefixes"],
        # By a clock that stands still guesses pay as soon as one is right.
        speculation=Speculation(PromptLookup(1), most=numbers["guesses"], clock=lambda: 0.0)
        if numbers["guesses"]
        else None,
    )
    machine._scheduler._max_prompt_logits = numbers["prompt_logits"]
    bits = numbers["digest_bits"]
    machine.blocks._digest = lambda key, content: bits_of(keyed_digest(key, content), bits)
    return machine


def bits_of(digest: bytes, bits: int) -> bytes:
    """The last so many bits: few of them collide all the time."""
    return (int.from_bytes(digest) & ((1 << bits) - 1)).to_bytes(16)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, min_size=1, max_size=7), machines, st.data())
def test_a_request_gets_the_same_whatever_runs_beside_it(
    wanted: list[Request], numbers: dict[str, Any], data: st.DataObject
) -> None:
    machine = machine_of(numbers)
    results: dict[int, Result] = {}
    ids: list[int] = []
    for request in wanted:  # they come at any time
        ids.append(machine.add(request))
        for _ in range(data.draw(st.integers(0, 4))):
            for number, event in machine.step():
                assert isinstance(event, TokenEvent)
                results.setdefault(number, Result()).take(event)
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent)
            results.setdefault(number, Result()).take(event)
    machine.blocks.check_idle()
    assert [results[number] for number in ids] == [alone(request) for request in wanted]


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=2, max_size=6), machines, st.data())
def test_cancel_at_any_moment(
    wanted: list[Request], numbers: dict[str, Any], data: st.DataObject
) -> None:
    machine = machine_of(numbers)
    ids = [machine.add(request) for request in wanted]
    victims = data.draw(st.sets(st.sampled_from(ids), min_size=1))
    doomed = {n: data.draw(st.integers(0, 12), label=f"step of {n}") for n in victims}
    results: dict[int, Result] = {number: Result() for number in ids}
    gone: set[int] = set()
    for step in range(2000):
        for number in victims:
            if doomed[number] == step:
                assert machine.cancel(number) == (results[number].reason is None)
                assert not machine.cancel(number)
                gone.add(number)
        if not machine.has_work and step > 12:
            break
        for number, event in machine.step():
            assert number not in gone
            assert isinstance(event, TokenEvent)
            results[number].take(event)
    machine.blocks.check_idle()
    for number, request in zip(ids, wanted, strict=True):
        if number not in victims:
            assert results[number] == alone(request)


def test_batches_mix_decoding_and_prompts_within_the_budget() -> None:
    runner = FakeRunner(num_blocks=64)
    machine = engine(runner, max_batch_tokens=8, max_sequences=4)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    for length in (3, 30, 5, 17, 9, 2):
        machine.add(Request(tuple([2] * length), params))
    drive(machine)
    sizes = [len(batch.tokens) for batch in runner.batches]
    assert max(sizes) == 8
    assert max(len(batch.sequence_starts) - 1 for batch in runner.batches) <= 4
    mixed = [batch for batch in runner.batches if set(np.diff(batch.sequence_starts)) > {1}]
    assert mixed, "no batch has both a decoding sequence and a piece of a prompt"
    for batch in runner.batches:  # decoding rows come first, and nobody who decodes is left out
        lengths = np.diff(batch.sequence_starts).tolist()
        assert lengths[: lengths.count(1)].count(1) >= lengths.count(1) - 1


def test_who_is_put_off_when_blocks_run_out() -> None:
    runner = FakeRunner(num_blocks=16, block_size=4)
    machine = engine(runner)
    params = SamplingParams(max_tokens=None, ignore_eos=True, seed=1)
    old, young = Request((2,) * 30, params), Request((3,) * 30, params)
    first, second = machine.add(old), machine.add(young)  # each would take every block
    results: dict[int, Result] = {first: Result(), second: Result()}
    order: list[int] = []
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent)
            results[number].take(event)
            order += [number] if event.finish_reason else []
    assert order == [first, second]
    assert machine.counters.preemptions >= 1
    assert results == {first: alone(old), second: alone(young)}
    machine.blocks.check_idle()


def test_the_urgent_go_first() -> None:
    machine = engine(FakeRunner(num_blocks=16, block_size=4), max_sequences=1)
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    late = machine.add(Request((2, 3), params, priority=1))
    for _ in range(3):
        machine.step()
    urgent = machine.add(Request((3, 2), params, priority=0))
    order = [n for n, event in finishing(machine)]
    assert order == [urgent, late]
    assert machine.counters.preemptions == 1


def finishing(machine: Engine) -> list[tuple[int, TokenEvent]]:
    """Run to the end; the last events, in the order they came."""
    found: list[tuple[int, TokenEvent]] = []
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent)
            if event.finish_reason is not None:
                found.append((number, event))
    return found


def test_nobody_starves_behind_the_urgent() -> None:
    machine = engine(FakeRunner(num_blocks=16, block_size=4), max_sequences=1)
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
    humble = machine.add(Request((2, 3), params, priority=2))
    for step in range(4 * PATIENCE):
        if machine.num_waiting < 3:
            machine.add(Request((3, 2), params, priority=0))
        if any(number == humble and event.finish_reason for number, event in machine.step()):
            assert step > 2 * PATIENCE
            return
    raise AssertionError("it waits for ever")


def test_a_common_beginning_is_computed_once() -> None:
    runner = FakeRunner(num_blocks=32, block_size=4)
    machine = engine(runner)
    params = SamplingParams(max_tokens=2, ignore_eos=True, seed=1)
    prompt = tuple(2 + n % 5 for n in range(21))
    first = Request(prompt, params)
    machine.add(first)
    drive(machine)
    runner.batches.clear()
    machine.add(Request((*prompt[:18], 9, 9, 9), params))
    machine.add(Request(prompt, params, salt=b"somebody else"))
    drive(machine)
    assert len(runner.batches[0].tokens) == (21 - 16) + 21
    assert machine.counters.cached_tokens == 16
    assert machine.counters.prompt_tokens == 3 * 21
    assert machine.blocks.num_remembered > 0
    machine.blocks.forget()
    assert machine.blocks.num_remembered == 0
    machine.blocks.check_idle()


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_the_shortest_answer_leaves_its_whole_prompt_behind(max_tokens: int) -> None:
    """The last piece of a prompt is of use to others though its request ends with it."""
    machine = engine(FakeRunner(num_blocks=32, block_size=4), max_batch_tokens=8, max_sequences=2)
    prompt = tuple(2 + n % 5 for n in range(21))
    machine.add(Request(prompt, SamplingParams(max_tokens=max_tokens, prompt_logprobs=1)))
    drive(machine)
    machine.add(Request(prompt, SamplingParams(max_tokens=1)))
    drive(machine)
    assert machine.counters.cached_tokens == 20


def test_several_answers_to_one_prompt_share_it() -> None:
    runner = FakeRunner(num_blocks=64, block_size=4)
    machine = engine(runner)
    prompt = tuple(2 + n % 5 for n in range(30))
    requests = [Request(prompt, SamplingParams(max_tokens=5, seed=n)) for n in range(4)]
    leader = machine.add(requests[0])
    ids = [leader, *(machine.add(request, after=leader) for request in requests[1:])]
    results = drive(machine)
    assert [results[number] for number in ids] == [alone(request) for request in requests]
    lengths = [length for batch in runner.batches for length in np.diff(batch.sequence_starts)]
    assert sorted(lengths)[-4:] == [2, 2, 2, 30]


@pytest.mark.parametrize("max_tokens", [None, 1, 34, 35, 500])
def test_the_context_ends_a_request(max_tokens: int | None) -> None:
    machine = engine()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    machine.add(Request((2,) * 30, params))
    (result,) = drive(machine).values()
    assert len(result.token_ids) == min(34, max_tokens or 34)
    assert result.reason == "length"


def test_a_full_context_can_be_scored_but_not_continued() -> None:
    prompt = (2,) * CONTEXT
    machine = engine()
    machine.add(Request(prompt, SamplingParams(max_tokens=0, prompt_logprobs=1)))
    (result,) = drive(machine).values()
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == CONTEXT
    with pytest.raises(PromptError, match="no room"):
        machine.add(Request(prompt, SamplingParams()))
    with pytest.raises(PromptError, match="no room"):
        machine.add(Request((*prompt, 2), SamplingParams(max_tokens=0)))


def test_no_tokens_wanted() -> None:
    runner = FakeRunner()
    machine = engine(runner)
    machine.add(Request((2, 3), SamplingParams(max_tokens=0)))
    machine.add(Request((2,), SamplingParams(max_tokens=0, prompt_logprobs=5)))
    plain, single = drive(machine).values()
    assert (plain.token_ids, plain.text, plain.reason) == ([], "", "length")
    assert single.prompt_logprobs == (None,)
    assert not runner.batches


def test_prompt_logprobs_take_bounded_memory() -> None:
    runner = FakeRunner(num_blocks=64)
    machine = engine(runner, max_batch_tokens=64, max_sequences=8)
    machine._scheduler._max_prompt_logits = 7
    requests = [
        Request(
            tuple(n % VOCAB for n in range(start, start + 50)),
            SamplingParams(max_tokens=2, prompt_logprobs=1, seed=1),
        )
        for start in range(4)
    ]
    for request in requests:
        machine.add(request)
    results = list(drive(machine).values())
    assert max(len(batch.logits_rows) for batch in runner.batches) <= 7 + 8
    assert sorted(results, key=repr) == sorted(map(alone, requests), key=repr)


def test_prompt_logprobs_of_the_full_vocabulary_stay_below_64_mib() -> None:
    machine = engine(FakeRunner(config=tiny_config(vocab_size=103_424)))
    assert machine._scheduler._max_prompt_logits * 103_424 * 4 <= 64 * 2**20


def test_logits_are_asked_for_only_where_needed() -> None:
    runner = FakeRunner()
    machine = engine(runner, max_batch_tokens=10, max_sequences=2)
    machine.add(Request((2,) * 35, SamplingParams(max_tokens=3, ignore_eos=True)))
    drive(machine)
    assert [len(batch.logits_rows) for batch in runner.batches] == [0, 0, 0, 1, 1, 1]
    assert [len(batch.tokens) for batch in runner.batches] == [10, 10, 10, 5, 1, 1]
    runner.batches.clear()
    machine.add(Request((3,) * 21, SamplingParams(max_tokens=2, ignore_eos=True)))
    drive(machine)
    assert [len(batch.logits_rows) for batch in runner.batches] == [0, 0, 1, 1]


def only(*tokens: int, default: int = 2) -> FakeRunner:
    """A model that writes `tokens` after a prompt of one, and `default` from then on."""

    def logits(history: Any, vocab_size: int) -> Any:
        row = np.zeros(vocab_size, np.float32)
        position = len(history) - 1
        row[tokens[position] if position < len(tokens) else default] = 9
        return row

    return FakeRunner(logits=logits)


GREEDY = {"temperature": 0.0, "max_tokens": 8}


@pytest.mark.parametrize(
    ("tokens", "params", "text", "count", "reason"),
    [
        ((2, 3, EOS), {}, "ab", 3, "stop"),
        ((2, 3, EOS, 3), {"ignore_eos": True}, "abbaaaa", 8, "length"),
        ((2, 3, 6), {"stop_token_ids": (6,)}, "ab", 3, "stop"),
        ((2, 3, EOS), {"max_tokens": 2}, "ab", 2, "length"),
        ((2, 3, EOS), {"max_tokens": 3}, "ab", 3, "stop"),
        ((3, 3, 6, 8), {"stop": ("bcd", "c ")}, "bb", 4, "stop"),
        ((6, 3, 6, EOS), {"stop": ("cb ",)}, "cbc", 4, "stop"),  # held back, then shown
        ((6, 3), {"stop": ("cb ",), "max_tokens": 2}, "cb", 2, "length"),
        ((9, 10, EOS), {}, "\ufffd", 3, "stop"),  # half a character
        ((9, 10, 11, EOS), {}, "€", 4, "stop"),
        ((9, 10), {"max_tokens": 2}, "\ufffd", 2, "length"),
        ((9, 10), {"max_tokens": 2, "stop": ("\ufffd",)}, "", 2, "stop"),
        ((EOS, EOS, EOS), {"min_tokens": 2}, None, 3, "stop"),
        ((6, 8, 6, 8), {"stop": (" ",), "min_tokens": 2}, "c c", 4, "stop"),
    ],
)
def test_how_a_request_ends(
    tokens: tuple[int, ...], params: dict[str, Any], text: str | None, count: int, reason: str
) -> None:
    machine = engine(only(*tokens))
    machine.add(Request((BOS,), SamplingParams(**(GREEDY | params))))
    (result,) = drive(machine).values()
    assert text is None or result.text == text
    assert (len(result.token_ids), result.reason) == (count, reason)


def test_text_comes_as_early_as_it_can() -> None:
    machine = engine(only(6, 3, 8, 6, 9, 10, 11, EOS))
    machine.add(Request((BOS,), SamplingParams(**(GREEDY | {"stop": ("b c€b",)}))))
    shown: list[str] = []
    while machine.has_work:
        shown += [event.text for _, event in machine.step() if isinstance(event, TokenEvent)]
    assert shown == ["c", "", "", "", "", "", "", "b c€"]


def test_logits_that_are_not_finite_end_one_request_only() -> None:
    def logits(history: Any, vocab_size: int) -> Any:
        row = hashed_logits(history, vocab_size)
        if history[0] == 5 and len(history) == 6:
            row[3] = np.nan
        return row

    machine = engine(FakeRunner(logits=logits))
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=4)
    good, bad, scored = (
        machine.add(Request((2, 3), params)),
        machine.add(Request((5, 3), params)),
        machine.add(Request((5,) * 8, SamplingParams(max_tokens=0, prompt_logprobs=0))),
    )
    results: dict[int, list[Any]] = {good: [], bad: [], scored: []}
    while machine.has_work:
        for number, event in machine.step():
            results[number].append(event)
    machine.blocks.check_idle()
    assert results[good][-1].finish_reason == "length" and len(results[good]) == 9
    assert isinstance(results[bad][-1], CheckpointError) and len(results[bad]) == 5
    assert isinstance(results[scored][-1], CheckpointError)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "empty"),
        ((2, VOCAB), "outside the vocabulary"),
        ((2, -1), "outside the vocabulary"),
        ((2, 2**80), "integers"),
        ((2, 2**63), "integers"),
        ((2, 1.5), "integers"),
        (("2",), "integers"),
        (([2, 3],), "flat"),
        (([2, 3], 4), "flat"),
        ((True,), "integers"),
        ((None,), "integers"),
        ((2,) * 1000, "no room"),
    ],
)
def test_prompts_that_cannot_be_run(prompt: Any, message: str) -> None:
    machine = engine()
    with pytest.raises(PromptError, match=message) as caught:
        machine.add(Request(prompt, SamplingParams()))
    assert isinstance(caught.value, EarnestError)
    assert not machine.has_work


def test_parameters_are_checked_before_anything_runs() -> None:
    machine = engine()
    with pytest.raises(SamplingError, match="logit_bias"):
        machine.add(Request((2,), SamplingParams(logit_bias={VOCAB: 1.0})))
    with pytest.raises(UserError, match="max_sequences"):
        engine(max_batch_tokens=4, max_sequences=5)
    nameless = Engine(FakeRunner(), None, eos_ids=[EOS])
    with pytest.raises(PromptError, match="tokenizer"):
        nameless.add(Request((2,), SamplingParams(stop=("a",))))


def test_blocks_limit_the_context() -> None:
    machine = engine(FakeRunner(num_blocks=3, block_size=4))
    assert machine.max_context == 12
    with pytest.raises(PromptError, match="12") as caught:
        machine.add(Request((2,) * 12, SamplingParams()))
    assert "max_context (--context on the command line)" in str(caught.value)
    machine.add(Request((2,) * 11, SamplingParams(max_tokens=None)))
    assert len(next(iter(drive(machine).values())).token_ids) == 1


def test_a_runner_that_fails_can_be_tried_again() -> None:
    runner = FakeRunner()
    machine = engine(runner)
    request = Request((2, 3, 4), SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
    number, result = machine.add(request), Result()
    honest, calls = runner.step, 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise KeyboardInterrupt
        return honest(*args)

    runner.step = failing  # type: ignore[method-assign]
    while machine.has_work:
        try:
            events = machine.step()
        except KeyboardInterrupt:
            continue
        for found, event in events:
            assert found == number and isinstance(event, TokenEvent)
            result.take(event)
    assert result == alone(request)
