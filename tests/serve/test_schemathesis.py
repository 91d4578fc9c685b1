"""Our own description of every endpoint, and whether each does what it says, by schemathesis."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running import Server
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/models/{name}"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/tags", "/api/ps"),
    *("/api/show", "/api/version", "/tokenize", "/detokenize", "/tokenizer_info"),
    *("/health", "/ready", "/metrics", "/version"),
)
EXAMPLES = 25
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == set(PATHS)
    for path, item in document["paths"].items():
        for operation in item.values():
            (schema, *_) = operation["responses"]["200"]["content"].values()
            assert schema["schema"], f"{path}: nothing is said of what it answers"


@pytest.fixture(scope="module")
def api(server: Server, document: dict[str, Any]) -> Any:
    loaded = schemathesis.openapi.from_dict(document)
    loaded.config.update(base_url=server.url)
    return loaded


@pytest.mark.parametrize("path", PATHS)
def test_every_endpoint_keeps_its_word(api: Any, path: str) -> None:
    (operation,) = (api[path][method] for method in api[path])

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy(operation))
    def check(case: Case) -> None:
        if isinstance(case.body, dict):
            shorten(case.body)
        case.call_and_validate(checks=CHECKS, timeout=30)

    check()


def strategy(operation: Any) -> Any:
    """Requests as the description allows them, and others."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    return right if operation.method.lower() == "get" else right | wrong


def shorten(body: dict[str, Any]) -> None:
    """Most drawn requests are refused; one that is not should not write for long, nor in vain: only
    a model that is there answers."""
    if isinstance(body.get("model"), str):
        body["model"] = "stories"
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8
    if type(body.get("n")) is int and body["n"] > 2:
        body["n"] = 2
