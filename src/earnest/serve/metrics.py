"""Numbers for Prometheus, under the names of vLLM's, which dashboards and routers know."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from earnest.engine import TokenEvent
from earnest.engine.service import Load

# Why an answer ended.
Finish = Literal["stop", "length", "tool_calls"]
_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0),
)


class Metrics:
    """All numbers of one server.

    Args:
        model: the name that everything is labelled with.
        load: the service's load of now.
        num_blocks, block_size: the KV cache.
    """

    def __init__(
        self, model: str, load: Callable[[], Load], *, num_blocks: int, block_size: int
    ) -> None:
        self._registry, self._model = CollectorRegistry(), model
        ProcessCollector(registry=self._registry)  # memory and processor time, where Linux tells
        self._registry.register(_Engine(model, load, num_blocks, block_size))

        def histogram(name: str, text: str) -> _Histogram:
            found = _Histogram(f"vllm:{name}", text, model)
            self._registry.register(found)
            return found

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self._between = histogram("inter_token_latency_seconds", "Between two tokens")
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last")
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first KV block")
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token")
        self._success = Counter(
            "vllm:request_success",
            "Answers that came to an end, by reason",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in get_args(Finish):  # a rate needs the 0 before the first
            self._success.labels(model, reason)

    def clock(self) -> Stopwatch:
        """For one answer, started now."""
        return Stopwatch(self)

    def page(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self._registry)

    def _token(self, watch: Stopwatch, event: TokenEvent, reason: Finish | None) -> float:
        now = time.monotonic()
        if watch.first is None:
            watch.first = now
            self._first.observe(now - watch.begun)
            self._admitted(watch, event, now)
        else:
            self._between.observe(now - watch.last)
        watch.last = now
        if reason is not None:
            self._whole.observe(now - watch.begun)
            self._decode.observe(now - watch.first)
            self._success.labels(self._model, reason).inc()
        return now

    def _read(self, watch: Stopwatch, event: TokenEvent) -> float:
        now = time.monotonic()
        self._admitted(watch, event, now)
        self._whole.observe(now - watch.begun)
        self._success.labels(self._model, "stop").inc()
        return now

    def _admitted(self, watch: Stopwatch, event: TokenEvent, now: float) -> None:
        if event.admitted_at is not None:
            self._queue.observe(max(0.0, event.admitted_at - watch.begun))
            self._prefill.observe(now - event.admitted_at)


@dataclass
class Stopwatch:
    """Times one answer."""

    metrics: Metrics
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0

    def token(self, event: TokenEvent, reason: Finish | None) -> float:
        """A token came; with a reason it is the last. Returns `time.monotonic()`."""
        return self.metrics._token(self, event, reason)

    def read(self, event: TokenEvent) -> float:
        """A prompt was read, and nothing is to be written. Returns `time.monotonic()`."""
        return self.metrics._read(self, event)


class _Histogram(Collector):
    """Counts times; prometheus_client's own takes a lock twice for each, which tokens feel."""

    def __init__(self, name: str, text: str, model: str) -> None:
        self._name, self._text, self._model = name, text, model
        self._counts, self._sum = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Called on one thread only."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        found = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        found.add_metric([self._model], buckets, self._sum)
        yield found


class _Engine(Collector):
    """What the engine counts itself, read when somebody asks."""

    def __init__(
        self, model: str, load: Callable[[], Load], num_blocks: int, block_size: int
    ) -> None:
        self._model, self._load = model, load
        self._num_blocks, self._block_size = num_blocks, block_size

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        counters = load.counters
        for name, text, value in (
            ("num_requests_running", "Answers being written or read in", load.running),
            ("num_requests_waiting", "Answers that wait", load.waiting),
            ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", load.blocks_used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], float(value))
            yield gauge
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts", counters.prompt_tokens),
            ("generation_tokens", "Tokens written", counters.generated_tokens),
            ("prefix_cache_queries", "Tokens of prompts looked up", counters.prompt_tokens),
            ("prefix_cache_hits", "Tokens of prompts found", counters.cached_tokens),
            ("num_preemptions", "Answers put off for want of KV blocks", counters.preemptions),
            ("spec_decode_num_drafts", "Times that tokens were guessed", counters.drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed", counters.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Guesses right", counters.accepted_tokens),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], float(count))
            yield family
        at = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guesses right, by their place in the draft",
            labels=["model_name", "position"],
        )
        for place, right in enumerate(list(counters.accepted_at)):
            at.add_metric([self._model, str(place)], float(right))
        yield at
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache", labels=["block_size", "num_gpu_blocks"]
        )
        info.add_metric([str(self._block_size), str(self._num_blocks)], 1.0)
        yield info
