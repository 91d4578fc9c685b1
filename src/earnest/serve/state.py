"""`Served`: what every endpoint needs to know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from earnest.engine import SamplingParams, sampling_defaults
from earnest.engine.defaults import end_of_text_ids
from earnest.engine.language_model import LanguageModel
from earnest.engine.service import Service
from earnest.errors import TokenizerError
from earnest.serve.grammar import Grammars
from earnest.serve.metrics import Metrics
from earnest.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body_bytes: size of a request's body.
        body_seconds: time in which it must have arrived.
        request_seconds: time for an answer; None: as long as it takes.
        waiting: answers that may wait before more are refused.
        answers: answers to one prompt (`n`), and prompts in one request.
        logprobs: likeliest tokens that may be listed.
    """

    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    request_seconds: float | None = None
    waiting: int = 1024
    answers: int = 128
    logprobs: int = 100


@dataclass
class Served:
    """A model, the service that runs it, and how it is offered.

    Attributes:
        model: what is served.
        name: what clients call it.
        api_keys: any of which lets a client in; none: everybody may.
        limits: what a request may ask for.
        origins: of web pages that browsers may call the server from.
    """

    model: LanguageModel
    name: str
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    origins: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def service(self) -> Service:
        """The engine's thread; started when first used."""
        return Service(self.model.engine, max_waiting=self.limits.waiting)

    @cached_property
    def metrics(self) -> Metrics:
        """What is counted."""
        runner = self.model.runner
        return Metrics(
            self.name,
            lambda: self.service.load,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
        )

    @cached_property
    def defaults(self) -> SamplingParams:
        """How the model's authors recommend to sample."""
        return sampling_defaults(self.model.checkpoint)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where the model has none: then only token ids can be used."""
        try:
            return self.model.tokenizer
        except TokenizerError:
            return None

    @cached_property
    def grammars(self) -> Grammars:
        """Compiler of structured output."""
        ends = end_of_text_ids(self.model.checkpoint, self.model.tokenizer)
        return Grammars(self.model.tokenizer, self.model.config.vocab_size, sorted(ends))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        tokenizer = self.model.tokenizer
        known = min(self.model.config.vocab_size, tokenizer.vocab_size)
        return [tokenizer.token_bytes(i) for i in range(known)]
