"""OpenTelemetry traces: a span for every request, with how long it waited, was read in and written.

Attributes are those of OpenTelemetry's semantic conventions for HTTP and for generative AI. Spans
are made when a request has ended, from its `Record`; while it runs, tracing costs nothing.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from earnest import env
from earnest.errors import MissingPackageError, UserError
from earnest.serve.journal import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

TRACE_HEADERS = ("traceparent", "tracestate")
# Seconds that the last spans have to get away when the server ends.
_FLUSH_SECONDS = 3.0

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}


class Traces:
    """Sends spans.

    Args:
        endpoint: URL of a collector that takes OTLP over HTTP; `/v1/traces` is added to one without
            a path. None: as OpenTelemetry's environment variables say, which are heeded for
            headers, sampling, service name and the rest in any case.
        exporter: takes the spans in place of the collector.

    Raises:
        MissingPackageError: OpenTelemetry is not installed.
        UserError: the endpoint is no such URL.
    """

    def __init__(
        self, endpoint: str | None = None, *, exporter: SpanExporter | None = None
    ) -> None:
        if endpoint is not None:
            endpoint = _checked(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingPackageError(
                "traces need OpenTelemetry, which is not installed",
                got=str(error),
                remedy="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http "
                "(or earnest[otel]), or leave out --otlp-traces-endpoint",
            ) from error
        named = {"service.version": version("earnest")}
        if not env.service_is_named():
            named["service.name"] = "earnest"
        self._provider: TracerProvider = TracerProvider(resource=Resource.create(named))
        self._processor = BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("earnest.serve", version("earnest"))
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: Record, ended: float) -> None:
        """Tell of a request that has ended; returns at once.

        Args:
            record: the request.
            ended: when, of `time.monotonic()`.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        if record.is_probe:
            return

        def at(moment: float) -> int:
            return int((record.began_at + moment - record.began) * 1e9)

        asked = record.submitted is not None
        operation = _OPERATIONS.get(record.path, "chat")
        span = self._tracer.start_span(
            f"{operation} {record.model}" if asked else f"{record.method} {record.path[:200]}",
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            attributes=_http(record) | (_generation(record, operation) if asked else {}),
            start_time=at(record.began),
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        context = set_span_in_context(span)
        for name, start, end in _phases(record, ended):
            child = self._tracer.start_span(name, context=context, start_time=at(start))
            child.end(at(end))
        span.end(at(ended))

    def close(self) -> None:
        """Send what is left, as far as that takes no more than a few seconds."""
        self._provider.force_flush(int(_FLUSH_SECONDS * 1000))
        self._provider.shutdown()


def _checked(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            "the endpoint for traces is no URL of HTTP",
            got=endpoint,
            expected="for example http://localhost:4318/v1/traces",
        )
    return endpoint.rstrip("/") + "/v1/traces" if parts.path in ("", "/") else endpoint


def _phases(record: Record, ended: float) -> list[tuple[str, float, float]]:
    """What the engine did with it, as far as it came: name, start, end."""
    if record.submitted is None:
        return []
    last = ended if record.last is None else record.last
    marks = [("queue", record.submitted), ("prefill", record.admitted), ("decode", record.first)]
    known = [(name, start) for name, start in marks if start is not None]
    ends = [start for _, start in known[1:]] + [last]
    return [(name, start, end) for (name, start), end in zip(known, ends, strict=True)]


def _http(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "url.path": record.path[:200],
        "http.response.status_code": record.status,
        "client.address": record.client,
        "earnest.request.id": record.id,
    }
    if record.error is not None:
        found["error.type"] = record.error
    return found


def _generation(record: Record, operation: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "earnest",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt,
        "gen_ai.usage.cache_read.input_tokens": record.cached,
        "gen_ai.usage.output_tokens": record.completion,
        "gen_ai.response.finish_reasons": record.finish,
    }
    sampling = record.sampling
    if sampling is not None:
        if record.answers > 1:
            found["gen_ai.request.choice.count"] = record.answers
        given = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or None,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "seed": sampling.seed if (sampling.seed or 0) < 2**63 else None,
        }
        found |= {f"gen_ai.request.{name}": v for name, v in given.items() if v is not None}
    return found
