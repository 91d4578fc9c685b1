"""The sampler against a slow and plain one, against statistics, and at its edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.engine.request import SamplingParams
from earnest.engine.sampler import Sampler, _draw, check_sampling, largest, token_logprobs, uniform
from earnest.errors import CheckpointError, EarnestError, SamplingError

logit_rows = st.lists(
    st.integers(-12, 12).map(lambda n: n / 2) | st.floats(-30, 30, width=32),
    min_size=1,
    max_size=40,
)


def plain_distribution(
    params: SamplingParams,
    logits: list[float],
    prompt: list[int],
    output: list[int],
    stop_ids: list[int],
) -> list[float]:
    """The probabilities that `SamplingParams` describes, written down step by step."""
    x = [float(np.float32(value)) for value in logits]
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        for token in stop_ids:
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return [float(token == order[0]) for token in range(len(x))]
    weight = [math.exp((value - x[order[0]]) / params.temperature) for value in x]
    kept = order[: params.top_k] if params.top_k else order
    total = math.fsum(weight[token] for token in kept)
    if params.top_p < 1:
        nucleus: list[int] = []
        for token in kept:
            nucleus.append(token)
            if math.fsum(weight[token] for token in nucleus) >= params.top_p * total:
                break
        kept = nucleus
    kept = [token for token in kept if weight[token] >= params.min_p]
    total = math.fsum(weight[token] for token in kept)
    return [weight[token] / total if token in kept else 0.0 for token in range(len(x))]


def plain_draw(probabilities: list[float], number: float) -> int:
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if reached > number:
            return token
    return max(token for token, p in enumerate(probabilities) if p > 0)


@settings(max_examples=300, deadline=None)
@given(
    logits=logit_rows,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([1.0, 0.99, 0.87, 0.5, 0.21, 1e-6]),
    min_p=st.sampled_from([0.0, 0.03, 0.31, 1.0]),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.9, -1.1]),
    frequency=st.sampled_from([0.0, 0.37, -0.2]),
    min_tokens=st.integers(0, 3),
    data=st.data(),
)
def test_same_tokens_as_the_plain_sampler(
    logits: list[float],
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    presence: float,
    frequency: float,
    min_tokens: int,
    data: st.DataObject,
) -> None:
    ids = st.integers(0, len(logits) - 1)
    prompt = data.draw(st.lists(ids, min_size=1, max_size=5))
    stop_ids = data.draw(st.lists(ids, unique=True, max_size=len(logits) - 1))
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_tokens=min_tokens,
        logit_bias=data.draw(st.dictionaries(ids, st.sampled_from([-100.0, -0.5, 1.25]))),
        seed=seed,
    )
    sampler = Sampler(params, len(logits), prompt, stop_ids)
    output: list[int] = []
    row = np.array(logits, np.float32)
    for step in range(5):
        expected = plain_distribution(params, logits, prompt, output, stop_ids)
        number = uniform(seed, step)
        token = sampler.sample(row)
        plain = plain_draw(expected, number)
        # The two sum in different orders; only a number on the very edge may tell them apart.
        edge = any(abs(number - reached) < 1e-9 for reached in np.cumsum(expected))
        assert token == plain or edge
        output.append(token)
    assert (row == np.array(logits, np.float32)).all(), "the caller's logits were changed"


def test_the_nucleus_follows_the_logits() -> None:
    """Their weights are equal, and only one of the two is needed for half of the whole."""
    logits = np.array([-1e-38, 0.0], np.float32)
    for top_k in (0, 2):
        params = SamplingParams(temperature=0.3, top_k=top_k, top_p=0.5, seed=0)
        assert Sampler(params, 2, [0]).sample(logits) == 1


def frequencies(params: dict[str, Any], logits: np.ndarray, draws: int) -> np.ndarray:
    sampler = Sampler(SamplingParams(seed=20250630, **params), len(logits), [0])
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=len(logits))
    return counts / draws


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.1},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.3, 0.0, 1.5, -3.0], np.float32)
    expected = np.array(plain_distribution(SamplingParams(**params), logits.tolist(), [0], [], []))
    draws = 20_000
    found = frequencies(params, logits, draws)
    assert (found[expected == 0] == 0).all()
    possible = expected > 0
    chi2 = (draws * (found - expected)[possible] ** 2 / expected[possible]).sum()
    # 99.99% point of chi squared with 6 degrees of freedom; the seed is fixed, so no flakes.
    assert chi2 < 27.9


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.array([0, 7, 3, 7, 7], np.float32)
    assert Sampler(SamplingParams(temperature=0), 5, [0]).sample(logits) == 1


def test_top_k_ties_go_to_the_lowest_ids() -> None:
    logits = np.array([1, 5, 5, 5, 5], np.float32)
    sampler = Sampler(SamplingParams(top_k=2, seed=0), 5, [0])
    assert {sampler.sample(logits) for _ in range(200)} == {1, 2}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e30
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), 1000, [0])
    assert {sampler.sample(logits) for _ in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e6, 1e308])
def test_huge_temperature_is_uniform(temperature: float) -> None:
    logits = np.array([50, -50, 0], np.float32)
    found = frequencies({"temperature": temperature}, logits, 3000)
    assert np.abs(found - 1 / 3).max() < 0.04


def test_tiny_top_p_keeps_the_likeliest() -> None:
    logits = np.zeros(5000, np.float32)
    logits[4321] = 0.5
    sampler = Sampler(SamplingParams(top_p=1e-12, seed=1), 5000, [0])
    assert {sampler.sample(logits) for _ in range(50)} == {4321}


def test_flat_distribution_of_a_full_vocabulary() -> None:
    size, top_p = 103_424, 0.999
    sampler = Sampler(SamplingParams(top_p=top_p, seed=5), size, [0])
    drawn = [sampler.sample(np.zeros(size, np.float32)) for _ in range(20)]
    assert len(set(drawn)) == 20
    assert max(drawn) < math.ceil(size * top_p)  # of equals, the lower ids are kept


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = np.array([0.5, 1.0, -1.0], np.float32)
    one, other = (Sampler(SamplingParams(top_k=k, seed=9), 3, [0]) for k in (0, 10**9))
    assert [one.sample(logits) for _ in range(50)] == [other.sample(logits) for _ in range(50)]


@pytest.mark.parametrize(
    "extreme",
    [
        {"logit_bias": {2: 1.7e308}},
        {"logit_bias": {0: -1.7e308, 1: -1.7e308}},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1.7e308},
        {"presence_penalty": 1.7e308, "frequency_penalty": -1.7e308},
        {"presence_penalty": -1.7e308, "frequency_penalty": -1.7e308},
        {"presence_penalty": 1.7e308, "frequency_penalty": 1.7e308},
        {"logit_bias": {2: 1.7e308}, "presence_penalty": 1.7e308, "repetition_penalty": 1e308},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0, 1e300])
def test_extreme_numbers_never_become_nan(extreme: dict[str, Any], temperature: float) -> None:
    logits = np.array([3e38, -3e38, 0], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=3, **extreme), 3, [0, 1, 2])
    with np.errstate(all="raise", under="ignore"):
        assert all(sampler.sample(logits) in (0, 1, 2) for _ in range(6))


def test_large_negative_bias_bans() -> None:
    logits = np.array([10, 9, 8], np.float32)
    sampler = Sampler(SamplingParams(logit_bias={0: -1e30, 1: -1e30}, seed=3), 3, [0])
    assert {sampler.sample(logits) for _ in range(50)} == {2}


def test_min_tokens_hides_stop_tokens_until_then() -> None:
    logits = np.array([9, 0, 8, 1], np.float32)
    params = SamplingParams(temperature=0, min_tokens=2)
    sampler = Sampler(params, 4, [0], stop_ids=[0, 2])
    assert [sampler.sample(logits) for _ in range(3)] == [3, 3, 0]


def test_seed_and_position_decide() -> None:
    logits = np.random.default_rng(1).standard_normal(100).astype(np.float32)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), 100, [0])
        return [sampler.sample(logits) for _ in range(30)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)
    assert drawn(2**64 - 1) == drawn(2**64 - 1)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**32))
def test_uniform_is_philox(seed: int, position: int) -> None:
    """Against numpy's Philox 4x64 with 10 rounds (Salmon et al. 2011): seeds must keep their
    meaning whatever computes them."""
    raw = np.random.Philox(key=seed, counter=position).random_raw()
    assert uniform(seed, position) == (int(raw) >> 11) / 2**53


@pytest.mark.parametrize(
    ("number", "index"), [(0.0, 1), (0.499, 1), (0.5, 3), (1 - 2**-53, 3), (1.0, 3)]
)
def test_what_is_impossible_is_never_drawn(number: float, index: int) -> None:
    assert _draw(np.array([0, 0.7, 0, 0.7, 0]), number) == index


def test_a_draw_from_many_is_that_of_the_running_sum() -> None:
    rng = np.random.default_rng(1)
    for size in (4097, 5000, 103_424):
        weights = rng.exponential(size=size) ** 4 * (rng.random(size) < 0.3)
        reached = np.cumsum(weights)
        for number in (0.0, *rng.random(200), 1 - 2**-53):
            index = _draw(weights, float(number))
            assert weights[index] > 0
            assert index == np.searchsorted(reached, number * reached[-1], side="right")
    alone = np.zeros(10_000)
    alone[9_999] = 1e-300
    assert {_draw(alone, number) for number in (0.0, 0.5, 1 - 2**-53)} == {9_999}


@pytest.mark.parametrize("size", [4096, 50_003])
def test_largest_of_many(size: int) -> None:
    row = np.random.default_rng(size).integers(-40, 40, size).astype(np.float32)  # many equals
    row[:3] = -np.inf
    order = sorted(range(size), key=lambda i: (-row[i], i))
    for count in (1, 2, 63, 64, 700, size - 1, size):
        assert largest(row, count).tolist() == order[:count]


@given(values=logit_rows, count=st.integers(1, 50))
def test_largest_is_a_stable_sort(values: list[float], count: int) -> None:
    row = np.array(values, np.float32)
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert largest(row, count).tolist() == expected


@given(logits=logit_rows, count=st.integers(0, 50), data=st.data())
def test_logprobs_are_the_log_softmax(logits: list[float], count: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    row = np.array(logits, np.float32)
    found = token_logprobs(row, token, count)
    exact = row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64))
    assert found.token_id == token
    assert found.logprob == pytest.approx(exact[token], abs=1e-9)
    assert len(found.top) == min(count, len(logits))
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert [i for i, _ in found.top] == best[:count]
    for i, value in found.top:
        assert value == pytest.approx(exact[i], abs=1e-9)
    if count >= len(logits):
        assert math.fsum(math.exp(value) for _, value in found.top) == pytest.approx(1)


def test_logprobs_of_a_wide_range() -> None:
    row = np.array([3e38, 0, -3e38], np.float32)
    found = token_logprobs(row, 2, 3)
    assert found.top[0] == (0, 0.0)
    assert found.logprob == pytest.approx(-6e38)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    row = np.array([0, bad, 1], np.float32)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        Sampler(SamplingParams(temperature=temperature), 3, [0]).sample(row)
    assert "earnest verify" in str(caught.value)
    with pytest.raises(CheckpointError):
        token_logprobs(row, 0, 1)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(logit_bias={5: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(99,)), "stop_token_ids"),
        (SamplingParams(min_tokens=1), "min_tokens"),
    ],
)
def test_parameters_that_do_not_fit_the_model(params: SamplingParams, name: str) -> None:
    with pytest.raises(SamplingError, match=name) as caught:
        check_sampling(params, 5, range(5))
    assert isinstance(caught.value, EarnestError)
