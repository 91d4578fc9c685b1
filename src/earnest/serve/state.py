"""`Served`: what every endpoint needs to know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from earnest.engine import SamplingParams, sampling_defaults
from earnest.engine.defaults import end_of_text_ids
from earnest.engine.language_model import LanguageModel
from earnest.engine.service import Service
from earnest.errors import TokenizerError, UserError
from earnest.files import read_bytes
from earnest.serve.grammar import Grammars
from earnest.serve.metrics import Metrics
from earnest.serve.strict_calls import Overruns
from earnest.serve.traces import Traces
from earnest.tokenizer import Tokenizer

_MAX_KEYS_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        head_bytes: size of a request's line and headers.
        head_seconds: time in which they must have arrived.
        body_bytes: size of a request's body.
        body_seconds: time in which it must have arrived.
        unread_seconds: time that a client may leave an answer unread.
        request_seconds: time for an answer; None: as long as it takes.
        waiting: answers that may wait before more are refused.
        answers: answers to one prompt (`n`), and prompts in one request.
        texts: strings that stop an answer, and those that must not be in it.
        logprobs: likeliest tokens that may be listed.
    """

    head_bytes: int = 2**16
    head_seconds: float = 20.0
    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    unread_seconds: float = 60.0
    request_seconds: float | None = None
    waiting: int = 1024
    answers: int = 128
    texts: int = 1024
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
        traces: told of every request that has ended; None: nobody is.
    """

    model: LanguageModel
    name: str
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    origins: tuple[str, ...] = ()
    traces: Traces | None = None
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

    @cached_property
    def overruns(self) -> Overruns:
        """Tokens that would begin a call of a tool unseen."""
        return Overruns(self.pieces, self.model.config.vocab_size)


def keys_in(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one on each line; none where there is no file.

    Raises:
        UserError: it holds no text, or no keys.
    """
    if path is None:
        return ()
    try:
        text = read_bytes(path, _MAX_KEYS_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds no text", expected="a key on each line") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UserError(f"{path} holds no keys", expected="one on each line")
    return keys
