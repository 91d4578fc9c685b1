"""What a checkpoint says about its own use: how to sample, and which tokens end a text."""

from __future__ import annotations

from typing import Any, TypeVar

from earnest.checkpoint import Checkpoint
from earnest.engine.request import SamplingParams
from earnest.errors import ConfigError, SamplingError
from earnest.tokenizer import Tokenizer

_Number = TypeVar("_Number", int, float)

# Key of generation_config.json, our name, type. Whatever else is in there is about other ways of
# generating, or says where the file came from.
_KEYS: tuple[tuple[str, str, type[int] | type[float]], ...] = (
    ("temperature", "temperature", float),
    ("top_k", "top_k", int),
    ("top_p", "top_p", float),
    ("min_p", "min_p", float),
    ("repetition_penalty", "repetition_penalty", float),
    ("presence_penalty", "presence_penalty", float),
    ("frequency_penalty", "frequency_penalty", float),
    ("max_new_tokens", "max_tokens", int),
)
_EXPECTED = {int: "a whole number", float: "a number"}
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


def sampling_defaults(checkpoint: Checkpoint) -> SamplingParams:
    """How the model's authors recommend to sample, from its `generation_config`.

    Greedy where `do_sample` is false, and where it is absent and no temperature, top-k, top-p or
    min-p is given either (published Thinking models give a temperature without `do_sample`).

    Raises:
        ConfigError: a value is unusable; the message names it.
    """
    raw = checkpoint.generation_config
    given: dict[str, Any] = {}
    for key, name, kind in _KEYS:
        value = raw.get(key)
        if value is None:
            continue
        try:
            given[name] = _number(value, kind)
            SamplingParams(**{name: given[name]})
        except (ValueError, OverflowError) as error:  # SamplingError is a ValueError
            expected = error.expected if isinstance(error, SamplingError) else _EXPECTED[kind]
            raise _unusable(checkpoint, f"{key} = {value!r:.80}", expected) from error
    sample = raw.get("do_sample")
    if sample is None:
        sample = any(raw.get(key) is not None for key in _SAMPLED)
    if not sample:
        given["temperature"] = 0.0
    return SamplingParams(**given)


def _number(value: object, kind: type[_Number]) -> _Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    number = kind(value)
    if number != value:
        raise ValueError("not a whole number")
    return number


def _unusable(checkpoint: Checkpoint, got: str, expected: object) -> ConfigError:
    return ConfigError(
        f"{checkpoint.path}: the generation configuration has an unusable value",
        got=got,
        expected=expected,
        remedy="correct generation_config.json, or pass SamplingParams of your own",
    )


def end_of_text_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """All ids that end a text: of the configuration, the generation configuration (which for chat
    models often names more) and the tokenizer (end of turn).

    Raises:
        ConfigError: the generation configuration's are no ids.
    """
    own = checkpoint.generation_config.get("eos_token_id")
    listed = own if isinstance(own, list) else [] if own is None else [own]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise _unusable(checkpoint, f"eos_token_id = {own!r}", "a token id, or a list of them")
    of_tokenizer = () if tokenizer is None else tokenizer.eos_ids
    return frozenset([*checkpoint.config.eos_token_ids, *listed, *of_tokenizer])
