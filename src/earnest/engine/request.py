"""The boundary objects of the engine: what is asked (`Request`, `SamplingParams`) and what comes
back (`TokenEvent`, `Completion`). Small, frozen, checked when made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from earnest.engine.constraint import Constraint
from earnest.errors import SamplingError
from earnest.runners.base import Float32

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    The order of operations is that of the common servers: logit bias; repetition, presence and
    frequency penalties; minimum-length masking; temperature; top-k; top-p; min-p; draw.

    Attributes:
        max_tokens: at most this many new tokens; None: up to the end of the context, where every
            request ends.
        min_tokens: no stop token may be chosen before this many tokens, and stop strings that end
            in their text do not stop.
        temperature: 0 is greedy (ties go to the lowest id); else logits are divided by it.
        top_k: keep the k likeliest tokens (of equals the lower ids); 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1: all.
        min_p: drop tokens less likely than this times the likeliest; 0 drops none.
        repetition_penalty: logits of tokens seen in prompt or output are divided by it when
            positive, multiplied when negative (Keskar et al. 2019); 1 does nothing.
        presence_penalty: subtracted from logits of tokens already in the output.
        frequency_penalty: subtracted times the number of occurrences in the output.
        logit_bias: token id to number added to its logit.
        seed: makes a request reproducible; None draws a fresh one.
        stop: strings that end the text (not included in it); may span tokens. The one that is
            complete first ends it. Special tokens have no text: name those in `stop_token_ids`.
        stop_token_ids: ids that end the output, besides the model's own end-of-text ids.
        ignore_eos: go on after the model's own end-of-text ids.
        skip_special_tokens: special tokens have no text; False: their names stand in it.
        logprobs: None: none; n: per output token its log-probability and the n likeliest.
        prompt_logprobs: the same for the prompt's tokens (the first has none).

    Raises:
        SamplingError: a value is out of its range; the message says which.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, ">= 0, or None"),
            ("min_tokens", self.min_tokens >= 0, ">= 0"),
            ("temperature", _finite(self.temperature) and self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0 (0: all)"),
            ("top_p", _finite(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", _finite(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                _finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "> 0",
            ),
            ("presence_penalty", _finite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", _finite(self.frequency_penalty), "a finite number"),
            ("logit_bias", all(_finite(v) for v in self.logit_bias.values()), "finite numbers"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "in [0, 2^64), or None"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 1000, "in [0, 1000]"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 1000,
                "in [0, 1000]",
            ),
        )
        for name, good, expected in checks:
            if not good:
                raise SamplingError(
                    f"sampling parameter {name} is out of range",
                    got=getattr(self, name),
                    expected=expected,
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                "min_tokens exceeds max_tokens", got=f"{self.min_tokens} > {self.max_tokens}"
            )


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token under the unmodified model distribution, and the likeliest.

    Attributes:
        token_id: the token that stands there.
        logprob: natural logarithm of its probability (before temperature and penalties).
        top: (token id, logprob) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Scoring:
    """Ask how likely given tokens are, instead of a continuation.

    Attributes:
        targets: (position, token id), positions ascending: how likely the token is at that
            position, after the prompt's tokens before it. Positions are 1 to the prompt's length,
            which is where the first new token would stand; several may be the same.
    """

    targets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Score:
    """How likely one token is.

    Attributes:
        logprob: natural logarithm of its probability.
        greedy: whether it is the likeliest one (of equals the lowest id).
    """

    logprob: float
    greedy: bool


PoolingKind = Literal["mean", "last"]


@dataclass(frozen=True)
class Pooling:
    """Ask for one vector that stands for the prompt, instead of a continuation.

    Attributes:
        kind: the mean of all tokens' hidden states after the final norm, or that of the last token.
    """

    kind: PoolingKind = "mean"


@dataclass(frozen=True)
class Request:
    """One sequence to continue, or to read.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        sampling: how to continue it.
        priority: the lower, the sooner; of equals the first come.
        salt: only requests of the same salt share the blocks of common prefixes, and see by the
            time it takes whether there are any. Give each tenant one.
        constraint: makes the state of a grammar that the output must follow; None: it is free.
        reading: what to find out about the prompt instead of continuing it (`max_tokens` is 0).
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    salt: bytes = b""
    constraint: Callable[[], Constraint] | None = None
    reading: Scoring | Pooling | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request, as `stream` yields it.

    Attributes:
        text: what may be shown now; never a broken character, never part of a stop string.
        token_id: the token chosen in this step; None only in the sole event of a request for no
            tokens (`max_tokens=0`).
        logprobs: if asked for.
        finish_reason: set on the last event.
        prompt_logprobs: if asked for, on the first event: one per prompt token, the first None.
        cached_tokens: on the first event: tokens of the prompt that were not computed again.
        admitted_at: on the first event: `time.monotonic()` when it was first given KV blocks.
        stop_string: on the last event: the one of `stop` that ended the text, if one did.
        scores: what `Scoring` asked for, in its order.
        embedding: what `Pooling` asked for, float32 `[hidden_size]`, not normalised.
    """

    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int | None = None
    admitted_at: float | None = field(default=None, compare=False)
    stop_string: str | None = None
    scores: tuple[Score, ...] | None = None
    embedding: Float32 | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        text: the new text, without the prompt and without the stop string.
        token_ids: the new ids, the stopping token included if one was chosen.
        finish_reason: "stop" (a stop string or token) or "length".
        prompt_token_ids: the ids the prompt became.
        logprobs: one per new token, if asked for.
        prompt_logprobs: one per prompt token, the first None, if asked for.
        prompt_seconds: time spent on the prompt.
        decode_seconds: time spent on the new tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
