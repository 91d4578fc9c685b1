"""Prompts that are read, not continued: scores and vectors, alone and in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_runner import EOS, VOCAB, FakeRunner, FakeTokenizer, hashed_logits, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from earnest.engine.engine import Engine
from earnest.engine.many import leaders_of, run_all
from earnest.engine.reading import normalized
from earnest.engine.request import Pooling, Request, SamplingParams, Score, Scoring, TokenEvent
from earnest.engine.sampler import token_logprobs
from earnest.errors import CheckpointError, PromptError, SamplingError

NOTHING = SamplingParams(max_tokens=0)
PROMPTS = st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30)


def engine(runner: FakeRunner | None = None, **options: Any) -> Engine:
    return Engine(runner or FakeRunner(), FakeTokenizer(), eos_ids=[EOS], **options)  # type: ignore[arg-type]


def events_of(machine: Engine, requests: list[Request]) -> list[TokenEvent]:
    """The last event of each."""
    numbers = [machine.add(request) for request in requests]
    last: dict[int, TokenEvent] = {}
    while machine.has_work:
        for number, event in machine.step():
            assert isinstance(event, TokenEvent), event
            last[number] = event
    machine.blocks.check_idle()
    return [last[number] for number in numbers]


def vector_of(prompt: list[int], kind: str, width: int = 8) -> np.ndarray:
    """By plain repetition."""
    rows = [hashed_logits(prompt[: end + 1], width) for end in range(len(prompt))]
    if kind == "last":
        return rows[-1]
    total = np.zeros(width, np.float64)
    for row in rows:
        total += row
    return (total / len(rows)).astype(np.float32)


def score_of(prompt: list[int], position: int, token: int) -> Score:
    logits = hashed_logits(prompt[:position])
    found = token_logprobs(logits, token, 1)
    return Score(found.logprob, token == found.top[0][0])


@st.composite
def asked(draw: st.DrawFn) -> Request:
    prompt = draw(st.sampled_from([[], [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5]])) + draw(PROMPTS)
    salt = draw(st.sampled_from([b"", b"other"]))
    what = draw(st.sampled_from(["mean", "last", "scores", "logprobs", "text"]))
    if what in ("mean", "last"):
        return Request(tuple(prompt), NOTHING, salt=salt, reading=Pooling(what))  # type: ignore[arg-type]
    if what == "scores":
        pairs = st.tuples(st.integers(1, len(prompt)), st.integers(0, VOCAB - 1))
        targets = sorted(draw(st.lists(pairs, min_size=1, max_size=8)))
        return Request(tuple(prompt), NOTHING, salt=salt, reading=Scoring(tuple(targets)))
    params = SamplingParams(
        max_tokens=draw(st.integers(0, 6)),
        temperature=0,
        prompt_logprobs=1 if what == "logprobs" else None,
    )
    return Request(tuple(prompt), params, salt=salt)


def check(request: Request, event: TokenEvent) -> None:
    prompt = list(request.prompt_ids)
    match request.reading:
        case Pooling(kind):
            assert event.embedding is not None and event.token_id is None
            assert event.embedding.dtype == np.float32
            assert np.array_equal(event.embedding, vector_of(prompt, kind))
        case Scoring(targets):
            assert event.scores == tuple(score_of(prompt, *target) for target in targets)
        case None:
            assert event.scores is None and event.embedding is None


@given(
    requests=st.lists(asked(), min_size=1, max_size=12),
    num_blocks=st.sampled_from([12, 20, 60]),
    max_batch_tokens=st.sampled_from([3, 16, 200]),
)
def test_what_is_read_does_not_depend_on_company_chunks_and_preemption(
    requests: list[Request], num_blocks: int, max_batch_tokens: int
) -> None:
    machine = engine(
        FakeRunner(num_blocks=num_blocks),
        max_batch_tokens=max_batch_tokens,
        max_sequences=min(8, max_batch_tokens),
    )
    for request, event in zip(requests, events_of(machine, requests), strict=True):
        check(request, event)


@given(requests=st.lists(asked(), min_size=1, max_size=12), num_blocks=st.sampled_from([12, 60]))
def test_a_list_of_requests_is_run_to_its_end(requests: list[Request], num_blocks: int) -> None:
    machine = engine(FakeRunner(num_blocks=num_blocks))
    found = dict(run_all(machine, requests, block_size=4))
    assert found.keys() == set(range(len(requests)))
    for index, request in enumerate(requests):
        check(request, found[index][-1])
    machine.blocks.check_idle()


def test_leaving_a_list_in_the_middle_frees_everything() -> None:
    machine = engine()
    requests = [Request((2, 3, 4), SamplingParams(max_tokens=9, seed=i)) for i in range(9)]
    for _ in run_all(machine, requests, block_size=4):
        break
    assert not machine.has_work
    machine.blocks.check_idle()


def test_remembered_blocks_save_the_last_tokens_vector_work_but_not_the_mean() -> None:
    """The hidden states of remembered blocks are not kept: a mean has to compute them again."""
    prompt = [*range(2, 16), 2, 3]
    for kind, saved in (("mean", 0), ("last", 12)):
        runner = FakeRunner()
        machine = engine(runner)
        events_of(machine, [Request(tuple(prompt), NOTHING, reading=Pooling("mean"))])
        computed = sum(len(batch.tokens) for batch in runner.batches)
        assert computed == len(prompt)
        (event,) = events_of(machine, [Request(tuple(prompt), NOTHING, reading=Pooling(kind))])  # type: ignore[arg-type]
        assert event.cached_tokens == saved
        assert sum(len(batch.tokens) for batch in runner.batches) == 2 * len(prompt) - saved
        assert event.embedding is not None
        assert np.array_equal(event.embedding, vector_of(prompt, kind))


def test_scores_need_no_logits_of_what_stands_before_them() -> None:
    prompt = list(range(2, 16))
    runner = FakeRunner()
    machine = engine(runner)
    request = Request(tuple(prompt), NOTHING, reading=Scoring(((13, 5), (14, 6), (14, 7))))
    first, second = events_of(machine, [request])[0], events_of(machine, [request])[0]
    assert first.scores == second.scores
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert [len(batch.logits_rows) for batch in runner.batches] == [2, 2]


@given(
    prompts=st.lists(
        st.tuples(st.sampled_from([b"", b"a"]), st.lists(st.integers(0, 1), max_size=14)),
        max_size=25,
    ),
    size=st.integers(1, 3),
)
def test_leaders_are_the_first_that_share_the_most(
    prompts: list[tuple[bytes, list[int]]], size: int
) -> None:
    prompts.sort()

    def shared(i: int, j: int) -> int:
        (salt, a), (other, b) = prompts[i], prompts[j]
        if salt != other:
            return 0
        alike = [x == y for x, y in zip(a, b, strict=False)] + [False]
        return alike.index(False) // size

    for index, leader in enumerate(leaders_of(prompts, size)):
        most = max((shared(index, j) for j in range(index)), default=0)
        first = next((j for j in range(index) if most and shared(index, j) == most), None)
        assert leader == first


def test_what_does_not_fit_is_refused_before_anything_is_run() -> None:
    machine = engine()
    wrong: list[tuple[SamplingParams, Any, type[Exception]]] = [
        (SamplingParams(max_tokens=1), Pooling(), SamplingError),
        (SamplingParams(max_tokens=0, prompt_logprobs=1), Pooling(), SamplingError),
        (NOTHING, Scoring(()), PromptError),
        (NOTHING, Scoring(((0, 1),)), PromptError),
        (NOTHING, Scoring(((4, 1),)), PromptError),
        (NOTHING, Scoring(((2, 1), (1, 1))), PromptError),
        (NOTHING, Scoring(((1, VOCAB),)), PromptError),
    ]
    for params, reading, error in wrong:
        with pytest.raises(error):
            machine.add(Request((2, 3, 4), params, reading=reading))
    assert not machine.has_work


def test_a_prompt_may_fill_the_whole_context() -> None:
    config = tiny_config(context=64)
    prompt = tuple(2 + i % 12 for i in range(64))
    machine = engine(FakeRunner(config=config))
    event, scored = events_of(
        machine,
        [
            Request(prompt, NOTHING, reading=Pooling()),
            Request(prompt, NOTHING, reading=Scoring(((64, 3),))),
        ],
    )
    assert event.embedding is not None
    assert scored.scores == (score_of(list(prompt), 64, 3),)


def test_numbers_that_are_none_are_an_error_of_their_request_alone() -> None:
    def broken(history: Any, size: int) -> Any:
        logits = hashed_logits(history, size)
        if history[0] == 9:
            logits[0] = np.nan
        return logits

    machine = engine(FakeRunner(logits=broken))
    bad = machine.add(Request((9, 3), NOTHING, reading=Scoring(((1, 3),))))
    good = machine.add(Request((8, 3), NOTHING, reading=Scoring(((1, 3),))))
    results = dict(machine.step())
    assert isinstance(results[bad], CheckpointError)
    assert isinstance(results[good], TokenEvent)
    machine.blocks.check_idle()


def test_vectors_of_length_one() -> None:
    vector = np.array([3e30, 4e30], np.float32)
    assert normalized(vector) == pytest.approx([0.6, 0.8])
    assert np.array_equal(normalized(np.zeros(3, np.float32)), np.zeros(3))
