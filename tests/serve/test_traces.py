"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import builtins
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from running import Server

from earnest.errors import MissingPackageError, UserError

pytest.importorskip("opentelemetry.sdk", reason="earnest[otel] is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from earnest import env
from earnest.serve.traces import Traces


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def spans_of(traces: Traces, exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    for _ in range(200):
        traces._provider.force_flush()
        if len(exporter.get_finished_spans()) >= count:
            break
        time.sleep(0.01)
    found = list(exporter.get_finished_spans())
    exporter.clear()
    assert len(found) == count
    return sorted(found, key=lambda span: span.start_time or 0)


def test_spans(start: Callable[..., Server]) -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter=exporter)
    server = start(traces=traces)
    body = {
        "messages": [{"role": "user", "content": "A secret"}],
        "max_tokens": 12,
        "temperature": 0.5,
        "seed": 3,
        "ignore_eos": True,
        "stream": True,
    }
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    before = time.time_ns()
    reply = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body,
        headers={"traceparent": parent, "x-request-id": "mine"},
    )
    assert reply.status_code == 200
    spans = {span.name: span for span in spans_of(traces, exporter, 4)}
    whole, *parts = (spans[name] for name in ("chat stories", "queue", "prefill", "decode"))
    assert whole.parent is not None and whole.context is not None
    assert f"{whole.context.trace_id:032x}" in parent and f"{whole.parent.span_id:016x}" in parent
    assert whole.kind.name == "SERVER"
    times = [whole.start_time, *(t for p in parts for t in (p.start_time, p.end_time))]
    times.append(whole.end_time)
    assert times == sorted(times, key=lambda moment: moment or 0)  # one after the other, inside
    assert before <= (times[0] or 0) and (times[-1] or 0) <= time.time_ns()
    for part in parts:
        assert part.parent is not None and part.parent.span_id == whole.context.span_id
    given = dict(whole.attributes or {})
    assert given.pop("gen_ai.usage.input_tokens") == 21
    assert given.pop("gen_ai.usage.cache_read.input_tokens") == 0
    assert given == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "earnest.request.id": "mine",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "earnest",
        "gen_ai.request.model": "stories",
        "gen_ai.response.model": "stories",
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
    }
    assert whole.resource.attributes["service.name"] == "earnest"

    httpx.get(f"{server.url}/health")  # nobody wants to know
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": 1.5})
    assert refused.status_code == 400
    (span,) = spans_of(traces, exporter, 1)
    assert span.name == "POST /v1/completions" and span.parent is None
    assert span.status.is_unset  # the client's mistake is not the server's
    assert (span.attributes or {})["error.type"] == "invalid_request_error"
    traces.close()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}", got
    found.shutdown()
    thread.join()
    found.server_close()


def test_a_collector_gets_them_when_the_server_ends(
    start_process: Callable[..., Any], collector: tuple[str, list[tuple[str, bytes]]]
) -> None:
    url, got = collector
    server = start_process("--port", "0", "--otlp-traces-endpoint", url)
    reply = httpx.post(f"{server.where()}/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
    assert reply.status_code == 200
    assert server.end() == 0
    ((path, sent),) = got
    assert path == "/v1/traces"
    request = ExportTraceServiceRequest.FromString(sent)
    names = [span.name for span in request.resource_spans[0].scope_spans[0].spans]
    assert sorted(names) == ["decode", "prefill", "queue", "text_completion stories"]


def test_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("localhost:4318", "grpc://host:4317", "", "http://"):
        with pytest.raises(UserError, match="no URL of HTTP"):
            Traces(endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one")
    assert env.traces_endpoint() == "http://one"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://two")
    assert env.traces_endpoint() == "http://two"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert env.traces_endpoint() is None
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert env.traces_endpoint() is None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return genuine(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingPackageError, match=r"earnest\[otel\]"):
        Traces("http://localhost:4318")
