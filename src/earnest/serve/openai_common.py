"""Parameters that OpenAI's interfaces share. What is not known is refused by name: a parameter that
is ignored in silence gives answers nobody asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field

from earnest.engine import SamplingParams, TokenEvent, TokenLogprobs
from earnest.serve.answering import Usage
from earnest.serve.bodies import Strict, check_model, sampling_with
from earnest.serve.http import ApiError
from earnest.serve.state import Served


class StreamOptions(Strict):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class StructuredOutputs(Strict):
    """vLLM's way to ask for structured output; one of the fields is set."""

    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampled(Strict):
    """How tokens are chosen; what is not given is as the model's authors recommend."""

    model: str | None = None
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    bad_words: list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    return_token_ids: bool = False
    priority: int = 0
    cache_salt: str | None = None
    # Of no consequence here: they name the caller, or say what is done anyway.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_prompt: bool | None = None


def check_common(served: Served, body: Sampled) -> None:
    """Refuse what every endpoint refuses."""
    check_model(served, body.model)
    check_count(served, body.n)


def check_count(served: Served, count: int, prompts: int = 1) -> None:
    """Refuse more answers than there is ever room for: to come again would not help."""
    most = min(served.limits.answers, served.limits.waiting // prompts)
    if count > most:
        each = " for each prompt" if prompts > 1 else ""
        raise ApiError(400, f"n is too large: at most {most}{each}", param="n")


def sampling_of(served: Served, body: Sampled, **given: Any) -> SamplingParams:
    """Sampling parameters; out-of-range ones raise SamplingError."""
    found: dict[str, Any] = {
        name: getattr(body, name)
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty"),
            *("presence_penalty", "repetition_penalty", "min_tokens", "ignore_eos"),
        )
    }
    if found.get("top_k") == -1:  # vLLM's way to say: all
        found["top_k"] = 0
    if body.stop is not None:
        found["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        found["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias:
        found["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    return replace(sampling_with(served, **found), **given)


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ApiError(400, f"logit_bias: {text!r:.40} is no token id", param="logit_bias")
    return int(text)


def grammar_of(served: Served, body: Sampled) -> Callable[[], str] | None:
    """The grammar that the parameters ask for; more than one is refused."""
    grammars, outputs = (
        served.grammars,
        body.structured_outputs or StructuredOutputs.model_validate({}),
    )
    wanted: list[tuple[Any, Callable[[Any], str]]] = [
        (body.guided_json, grammars.json_schema),
        (outputs.json_, grammars.json_schema),
        (body.guided_regex, grammars.regex),
        (outputs.regex, grammars.regex),
        (body.guided_choice, grammars.choice),
        (outputs.choice, grammars.choice),
        (body.guided_grammar, grammars.lark),
        (outputs.grammar, grammars.lark),
        (body.guided_json_object or None, lambda _: grammars.json_object()),
        (outputs.json_object or None, lambda _: grammars.json_object()),
    ]
    asked = [partial(make, value) for value, make in wanted if value is not None]
    if len(asked) > 1:
        raise ApiError(400, "more than one kind of structured output is asked for")
    return asked[0] if asked else None


def salt_of(cache_salt: str | None) -> bytes:
    """What keeps prefixes of one tenant from another."""
    return (cache_salt or "").encode("utf-8", "surrogatepass")


def usage_of(usage: Usage) -> dict[str, Any]:
    """In OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def token_text(served: Served, token_id: int) -> str:
    """A token's text; for one that is no whole character, its bytes as OpenAI writes them."""
    tokenizer = served.tokenizer
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(served: Served, event: TokenEvent) -> list[dict[str, Any]]:
    """Of one token, as chats write them."""
    if event.logprobs is None:
        return []
    found = event.logprobs
    return [
        _entry(served, found.token_id, found.logprob)
        | {"top_logprobs": [_entry(served, token, value) for token, value in found.top]}
    ]


def _entry(served: Served, token: int, logprob: float) -> dict[str, Any]:
    tokenizer = served.tokenizer
    known = tokenizer is not None and token < tokenizer.vocab_size
    data = tokenizer.token_bytes(token) if tokenizer is not None and known else b""
    return {"token": token_text(served, token), "logprob": logprob, "bytes": list(data)}


def top_of(served: Served, found: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens and the one that stands there, as completions write them."""
    top = {token_text(served, token): value for token, value in found.top}
    top.setdefault(token_text(served, found.token_id), found.logprob)
    return top
