"""Sampling parameters are checked when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from earnest.engine.request import SamplingParams
from earnest.errors import EarnestError, SamplingError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("-inf")),
        ("logit_bias", {3: float("inf")}),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("a", "")),
        ("logprobs", -1),
        ("logprobs", 1001),
        ("prompt_logprobs", 1001),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, EarnestError) and isinstance(caught.value, ValueError)


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(SamplingError, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_a_single_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop == ("a", "b")  # type: ignore[arg-type]
