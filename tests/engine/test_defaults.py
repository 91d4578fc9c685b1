"""What a checkpoint says about its own use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_runner import FakeTokenizer, tiny_config

from earnest.engine.defaults import end_of_text_ids, sampling_defaults
from earnest.engine.request import SamplingParams
from earnest.errors import ConfigError


def checkpoint(generation_config: dict[str, Any]) -> Any:
    return SimpleNamespace(
        path=Path("model"), config=tiny_config(), generation_config=generation_config
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, {"temperature": 0}),
        ({"do_sample": True}, {}),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.8}, {"temperature": 0.8, "top_p": 0.8}),
        ({"do_sample": False, "temperature": 0.8}, {"temperature": 0}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": None, "temperature": None}, {"temperature": 0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1, "temperature": 0}),
        ({"max_new_tokens": 2048}, {"max_tokens": 2048, "temperature": 0}),
        ({"max_length": 20, "use_cache": False}, {"temperature": 0}),
    ],
)
def test_sampling_defaults(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_defaults(checkpoint(raw)) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("ernie-4.5-0.3b-base-pt", {"temperature": 0.8, "top_p": 0.8}),
        ("ernie-4.5-21b-a3b-thinking", {"temperature": 0.6, "top_p": 0.95}),
        ("paddleocr-vl", {"temperature": 0}),
    ],
)
def test_published_files(shared: Path, folder: str, expected: dict[str, Any]) -> None:
    path = shared / "data" / "tokenizer" / folder / "generation_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert sampling_defaults(checkpoint(raw)) == SamplingParams(**expected)


@pytest.mark.parametrize(
    "raw",
    [
        {"temperature": "warm"},
        {"temperature": -1},
        {"temperature": float("nan"), "do_sample": True},
        {"temperature": float("inf"), "do_sample": True},
        {"top_k": 2.5},
        {"top_k": float("inf")},
        {"top_k": float("nan")},
        {"top_p": True},
        {"top_p": [1]},
        {"repetition_penalty": 0},
        {"max_new_tokens": -3},
        {"temperature": 10**400},
    ],
)
def test_unusable_values_are_named(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(raw))):
        sampling_defaults(checkpoint(raw))


@pytest.mark.parametrize(
    ("own", "expected"),
    [(None, {0}), (7, {0, 7}), ([5, 6], {0, 5, 6}), ([], {0})],
)
def test_end_of_text_ids(own: Any, expected: set[int]) -> None:
    raw = {} if own is None else {"eos_token_id": own}
    assert end_of_text_ids(checkpoint(raw), FakeTokenizer()) == expected  # type: ignore[arg-type]
    assert end_of_text_ids(checkpoint(raw), None) == expected


@pytest.mark.parametrize("own", ["2", [2, "3"], True, 2.5, {"a": 1}, [[2]]])
def test_unusable_end_of_text_ids(own: Any) -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        end_of_text_ids(checkpoint({"eos_token_id": own}), None)
