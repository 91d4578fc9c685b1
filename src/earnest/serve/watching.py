"""What a running server tells of itself, for `earnest top`: two readings of `/metrics` make a view.

Works with every server that has vLLM's metrics; what it does not tell is None.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from earnest.errors import NetworkError, UserError

_MOST_BYTES = 16 * 2**20
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """All numbers of one moment.

    Attributes:
        at: `time.monotonic()`.
        values: (name, labels other than the model's) to number; of several models the sum.
        models: their names.
        version: of Earnest; None if it does not say.
        ready: whether it takes requests; None if it does not say.
    """

    at: float
    values: Mapping[tuple[str, Labels], float]
    models: tuple[str, ...] = ()
    version: str | None = None
    ready: bool | None = None

    def get(self, name: str) -> float | None:
        """The number of a name without labels."""
        return self.values.get((name, ()))

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """The numbers of a name by one of its labels."""
        return {
            dict(labels)[label]: value
            for (known, labels), value in self.values.items()
            if known == name and label in dict(labels)
        }


class Server:
    """Where to read.

    Args:
        url: `http://HOST:PORT`, `https://...` or `unix:PATH`.
        api_key: shown to the server.
        timeout: seconds for each answer.

    Raises:
        UserError: it is no such URL.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 5.0) -> None:
        self.url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        if not url.startswith("unix:"):
            parts = urlsplit(self.url)
            try:
                good = parts.scheme in ("http", "https") and bool(parts.hostname)
                good = good and (parts.port is None or parts.port > 0)
            except ValueError:  # a port that is none
                good = False
            if not good:
                raise UserError(
                    "this is no address of a server",
                    got=url,
                    expected="http://HOST:PORT, https://HOST:PORT or unix:PATH",
                )

    def read(self) -> Reading:
        """Ask once.

        Raises:
            NetworkError: nothing answers there, or what answers is no server of this kind.
            UserError: it wants a key, or another one.
        """
        text = self._get("/metrics").decode("utf-8", "replace")
        values, models = _parsed(text, self.url)
        version = ready = None
        try:
            version = str(json.loads(self._get("/version"))["version"])
            ready = self._status("/ready")[0] == 200
        except (NetworkError, ValueError, KeyError, TypeError):
            pass  # some other server with the same metrics
        return Reading(time.monotonic(), values, models, version, ready)

    def _get(self, path: str) -> bytes:
        status, body = self._status(path)
        if status in (401, 403):
            raise UserError(
                f"{self.url} asks for an API key, or for another one",
                remedy="pass --api-key, or set EARNEST_API_KEY",
            )
        if status != 200:
            raise NetworkError(
                f"{self.url}{path} cannot be read",
                got=f"status {status}",
                remedy="is this a server started with earnest serve?",
            )
        return body

    def _status(self, path: str) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            connection.request("GET", path, headers=self._headers)
            reply = connection.getresponse()
            body = reply.read(_MOST_BYTES + 1)
        except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
            raise NetworkError(
                f"no server answers at {self.url}",
                got=f"{type(error).__name__}: {error}",
                remedy="start one with earnest serve, or name the address of one that runs",
            ) from error
        finally:
            connection.close()
        if len(body) > _MOST_BYTES:
            raise NetworkError(f"{self.url}{path} is too long", expected=f"{_MOST_BYTES:,} bytes")
        return reply.status, body

    def _connection(self) -> http.client.HTTPConnection:
        if self.url.startswith("unix:"):
            return _UnixConnection(self.url.removeprefix("unix:"), self._timeout)
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                parts.hostname,
                parts.port,
                timeout=self._timeout,
                context=ssl.create_default_context(),
            )
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=self._timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _parsed(text: str, url: str) -> tuple[dict[tuple[str, Labels], float], tuple[str, ...]]:
    values: dict[tuple[str, Labels], float] = {}
    models: dict[str, None] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                if model := labels.pop("model_name", ""):
                    models[model] = None
                key, value = (sample.name, tuple(sorted(labels.items()))), float(sample.value)
                if math.isfinite(value):
                    values[key] = values.get(key, 0.0) + value
    except Exception as error:  # the parser raises whatever its own code stumbles over
        raise NetworkError(
            f"what {url}/metrics says is not in the format of Prometheus", got=f"{error!r:.200}"
        ) from error
    if ("vllm:num_requests_running", ()) not in values:
        raise NetworkError(
            f"what answers at {url} serves no model, or does not count",
            expected="metrics with the names of vLLM's, as earnest serve has them",
        )
    return values, tuple(models)


@dataclass(frozen=True)
class Times:
    """Percentiles of durations, in seconds; None where nothing was measured.

    A histogram knows only between which bounds a value lay: within them a straight line is taken.
    """

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class View:
    """How a server does between two readings.

    Attributes:
        url, models, version, ready: which server.
        running, waiting: answers.
        prompt_rate, generation_rate: tokens a second, read in (cached ones not counted) and
            written.
        kv_used: share of the KV blocks in use; `kv_blocks` of `block_size` positions there are.
        prefix_hits: share of the prompts' tokens that were found instead of computed.
        preemptions, finished: since the server was started; the latter by reason.
        first_token, between_tokens, queue: of the answers since the earlier reading; of all since
            the start where there were none.
        guesses_right: share of guessed tokens that were right; None: none were guessed.
        tokens_a_draft: tokens that a step with guesses wrote for a sequence, on average.
        memory: bytes resident.
        processors: processor seconds a second.
    """

    url: str
    models: tuple[str, ...]
    version: str | None
    ready: bool | None
    running: int
    waiting: int
    prompt_rate: float | None
    generation_rate: float | None
    kv_used: float | None
    kv_blocks: int | None
    block_size: int | None
    prefix_hits: float | None
    preemptions: int | None
    finished: dict[str, int] = field(default_factory=dict)
    first_token: Times = Times(None, None, None)
    between_tokens: Times = Times(None, None, None)
    queue: Times = Times(None, None, None)
    guesses_right: float | None = None
    tokens_a_draft: float | None = None
    memory: int | None = None
    processors: float | None = None


def view(url: str, before: Reading, after: Reading) -> View:
    """What two readings of the same server say. If it was started anew in between, the earlier one
    does not count."""
    seconds = after.at - before.at
    counted = "vllm:generation_tokens_total"
    if seconds <= 0 or (after.get(counted) or 0.0) < (before.get(counted) or 0.0):
        before = Reading(after.at, {})
        seconds = 0.0

    def rate(name: str) -> float | None:
        now = after.get(name)
        if now is None or not seconds:
            return None
        return max(0.0, now - (before.get(name) or 0.0)) / seconds

    def share(part: str, whole: str) -> float | None:
        total = after.get(whole)
        return (after.get(part) or 0.0) / total if total else None

    prompts, cached = rate("vllm:prompt_tokens_total"), rate("vllm:prefix_cache_hits_total")
    drafts = after.get("vllm:spec_decode_num_drafts_total")
    right = after.get("vllm:spec_decode_num_accepted_tokens_total")
    cache = next((dict(k[1]) for k in after.values if k[0] == "vllm:cache_config_info"), {})
    finished = after.labelled("vllm:request_success_total", "finished_reason")
    return View(
        url=url,
        models=after.models,
        version=after.version,
        ready=after.ready,
        running=int(after.get("vllm:num_requests_running") or 0),
        waiting=int(after.get("vllm:num_requests_waiting") or 0),
        prompt_rate=None if prompts is None else max(0.0, prompts - (cached or 0.0)),
        generation_rate=rate(counted),
        kv_used=after.get("vllm:kv_cache_usage_perc"),
        kv_blocks=_whole(cache.get("num_gpu_blocks")),
        block_size=_whole(cache.get("block_size")),
        prefix_hits=share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
        preemptions=_whole(after.get("vllm:num_preemptions_total")),
        finished={reason: int(count) for reason, count in finished.items() if count},
        first_token=_times(before, after, "vllm:time_to_first_token_seconds"),
        between_tokens=_times(before, after, "vllm:inter_token_latency_seconds"),
        queue=_times(before, after, "vllm:request_queue_time_seconds"),
        guesses_right=share(
            "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
        ),
        tokens_a_draft=1 + (right or 0.0) / drafts if drafts else None,
        memory=_whole(after.get("process_resident_memory_bytes")),
        processors=rate("process_cpu_seconds_total"),
    )


def _whole(value: float | str | None) -> int | None:
    try:
        return None if value is None else int(float(value))
    except (ValueError, OverflowError):
        return None


def _times(before: Reading, after: Reading, name: str) -> Times:
    then, now = before.labelled(f"{name}_bucket", "le"), after.labelled(f"{name}_bucket", "le")
    buckets = sorted((float(le), count) for le, count in now.items())
    recent = sorted((float(le), count - then.get(le, 0.0)) for le, count in now.items())
    if recent and recent[-1][1] > 0:
        buckets = recent
    return Times(*(percentile(buckets, share) for share in (0.5, 0.9, 0.99)))


def percentile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """Below which value so large a share of the values lies.

    Args:
        buckets: (upper bound, values up to it), bounds ascending, the last infinite.
        share: 0 to 1.

    Returns:
        None if there are no values; for those above all finite bounds the largest of these.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        if bound != float("inf"):
            low, below = bound, max(below, count)
    return low


def to_dict(found: View) -> dict[str, Any]:
    """JSON-able, with the names of the attributes."""
    result = dict(vars(found))
    for name, value in result.items():
        if isinstance(value, Times):
            result[name] = dict(vars(value))
    return result
