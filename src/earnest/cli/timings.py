"""What an answer cost: `run --timings` and the `timings` of its JSON."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from earnest.cli.terminal import human_bytes
from earnest.engine import Completion, LanguageModel, TokenEvent
from earnest.measure.machine import peak_memory
from earnest.runners.native.runner import NativeRunner


@dataclass
class Timings:
    """One answer's time.

    Attributes:
        load_seconds: until the model could be asked.
        prompt_tokens: tokens of the prompt.
        prompt_seconds: from the question to the first token of the answer.
        new_tokens: tokens of the answer.
        decode_seconds: from its first token to its last.
    """

    load_seconds: float
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    @classmethod
    def of(cls, completion: Completion, load_seconds: float) -> Timings:
        """Those of an answer that was not streamed."""
        return cls(
            load_seconds,
            len(completion.prompt_token_ids),
            completion.prompt_seconds,
            len(completion.token_ids),
            completion.decode_seconds,
        )

    def watch(
        self, prompt_tokens: int, events: Generator[TokenEvent, None, None]
    ) -> Iterator[TokenEvent]:
        """Hand on the events of a stream and measure; closes the stream when it is left."""
        self.prompt_tokens, self.new_tokens = prompt_tokens, 0
        self.prompt_seconds = self.decode_seconds = 0.0
        begun, first = time.monotonic(), 0.0
        try:
            for event in events:
                now = time.monotonic()
                if not first:
                    first, self.prompt_seconds = now, now - begun
                if event.token_id is not None:
                    self.new_tokens += 1
                    self.decode_seconds = now - first
                yield event
        finally:
            events.close()

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt a second; sampling the first token is part of it."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first, which the prompt paid for; None for fewer than two."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "load_seconds": self.load_seconds,
            "prompt_seconds": self.prompt_seconds,
            "decode_seconds": self.decode_seconds,
            "prompt_tokens_per_second": self.prompt_rate,
            "decode_tokens_per_second": self.decode_rate,
            "peak_memory_bytes": peak_memory(),
        }

    def line(self, model: LanguageModel) -> str:
        """For people."""
        peak, rate = peak_memory(), self.decode_rate
        return "; ".join(
            [
                f"prompt: {self.prompt_tokens:,} tokens, {self.prompt_rate:,.1f} tokens/s, "
                f"first token after {self.prompt_seconds:.3f} s",
                f"answer: {self.new_tokens:,} tokens"
                + ("" if rate is None else f", {rate:,.1f} tokens/s"),
                f"loaded in {self.load_seconds:.2f} s",
                f"peak memory {'unknown' if peak is None else human_bytes(peak)}",
                ", ".join(f"{key} {value}" for key, value in ran_by(model).items()),
            ]
        )


def ran_by(model: LanguageModel) -> dict[str, Any]:
    """Which runner, and of the native one the tier and the threads; JSON-able."""
    runner = model.runner
    if isinstance(runner, NativeRunner):
        return {"runner": "native", "tier": runner.tier, "threads": runner.pool.workers}
    return {"runner": "reference"}
