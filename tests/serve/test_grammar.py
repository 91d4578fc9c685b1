"""Grammars against a real vocabulary: whatever is drawn follows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from earnest.engine.constraint import Constraint
from earnest.engine.language_model import LanguageModel, load
from earnest.errors import GrammarError
from earnest.serve.constraints import Banned, ThinkingBudget
from earnest.serve.grammar import Grammars


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("stories", runner="reference")


@pytest.fixture(scope="module")
def grammars(model: LanguageModel) -> Grammars:
    return Grammars(model.tokenizer, model.config.vocab_size, list(model.tokenizer.eos_ids))


def drawn(model: LanguageModel, make: Callable[[], Constraint], seed: int, most: int = 200) -> str:
    """A random walk through what is allowed; ends where an end is allowed."""
    rng, state, ids = np.random.default_rng(seed), make(), list[int]()
    ends = set(model.tokenizer.eos_ids)
    for _ in range(most):
        allowed = state.allowed()
        assert allowed is not None and allowed.any()
        options = np.flatnonzero(allowed)
        token = int(rng.choice(options))
        if ends & set(options.tolist()):
            return model.tokenizer.decode(ids)
        state.accept(token)
        ids.append(token)
    raise AssertionError("no end")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_a_schema(model: LanguageModel, grammars: Grammars, seed: int) -> None:
    text = drawn(model, grammars.constraint(grammars.json_schema(SCHEMA)), seed)
    found = json.loads(text)
    assert found["name"] in ("Ann", "Bob") and isinstance(found["old"], bool)


def test_a_regex_and_a_choice(model: LanguageModel, grammars: Grammars) -> None:
    text = drawn(model, grammars.constraint(grammars.regex("[ab]{3}-[0-9]")), 1)
    assert re.fullmatch("[ab]{3}-[0-9]", text)
    options = ["yes", 'no "way"']
    assert drawn(model, grammars.constraint(grammars.choice(options)), 2) in options


def test_after_thinking(model: LanguageModel, grammars: Grammars) -> None:
    grammar = grammars.after_thinking(grammars.choice(["yes", "no"]))
    state = grammars.constraint(grammar)()
    for character in "Hm, well.</think>\nno":
        allowed = state.allowed()
        assert allowed is not None
        spelled = [int(i) for i in np.flatnonzero(allowed)]
        (token, *_) = (i for i in spelled if model.tokenizer.token_bytes(i) == character.encode())
        state.accept(token)
    allowed = state.allowed()
    assert allowed is not None
    assert set(np.flatnonzero(allowed)) <= set(model.tokenizer.eos_ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: g.json_schema([1]),
        lambda g: g.json_schema({"type": "nonsense"}),
        lambda g: g.json_schema({"$ref": "http://elsewhere/schema"}),
        lambda g: g.json_schema({"enum": ["x" * 2**17]}),
        lambda g: g.regex("(" * 50),
        lambda g: g.regex("a" * 2**17),
        lambda g: g.choice([]),
        lambda g: g.choice([""]),
        lambda g: g.lark("start: nothing"),
        lambda g: g.lark("start: start start"),
    ],
)
def test_what_cannot_be_used_is_refused(
    grammars: Grammars, make: Callable[[Grammars], str]
) -> None:
    with pytest.raises(GrammarError):
        grammars.constraint(make(grammars))()


def test_deep_nesting_is_refused(grammars: Grammars) -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="deep"):
        grammars.json_schema(schema)


def test_banned_runs() -> None:
    state = Banned([[3], [1, 2]], 5, None)
    assert state.allowed().tolist() == [True, True, True, False, True]  # type: ignore[union-attr]
    state.accept(1)
    assert state.allowed().tolist() == [True, True, False, False, True]  # type: ignore[union-attr]
    state.accept(0)
    assert state.allowed().tolist() == [True, True, True, False, True]  # type: ignore[union-attr]


def test_thoughts_come_to_an_end() -> None:
    pieces = [b"a", b"</", b"think>", b"b"]
    state = ThinkingBudget(2, [1, 2], pieces, b"</think>", 4, None)
    for token, only in ((0, None), (3, None), (1, 1), (2, 2), (0, None)):
        allowed = state.allowed()
        assert (allowed is None) if only is None else np.flatnonzero(allowed).tolist() == [only]
        state.accept(token)
    early = ThinkingBudget(3, [1, 2], pieces, b"</think>", 4, None)
    for token in (1, 2, 0, 0, 0):
        assert early.allowed() is None
        early.accept(token)
