"""The tables of the pages about serving are what the code says, and what the server does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import stories_server

_SOURCE = Path(__file__).resolve().parents[2] / "tools" / "serve_tables.py"
_spec = importlib.util.spec_from_file_location("serve_tables", _SOURCE)
assert _spec is not None and _spec.loader is not None
serve_tables = importlib.util.module_from_spec(_spec)
sys.modules["serve_tables"] = serve_tables
_spec.loader.exec_module(serve_tables)

_LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/api/chat": {"model": "stories", "messages": [{"role": "user", "content": "Hi"}]},
    "/api/generate": {"model": "stories", "prompt": "Hi", "options": {"num_predict": 1}},
    "/api/embed": {"model": "stories", "input": "Hi"},
    "/api/embeddings": {"model": "stories", "prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = stories_server.with_template(tmp_path_factory.mktemp("model") / "stories")
    process = stories_server.Process(folder)
    with httpx.Client(base_url=process.url, timeout=60) as found:
        yield found
    assert process.end() == 0


@pytest.mark.parametrize("page", serve_tables.PAGES, ids=lambda page: page.name)
def test_the_page_is_as_the_code_says(page: Path) -> None:
    if page.name == "ray.md":
        pytest.importorskip("ray", reason="Ray is not installed")
    told = page.read_text(encoding="utf-8")
    assert serve_tables.written(page) == told, "run: python tools/serve_tables.py"


@pytest.mark.parametrize("path", serve_tables.BODIES)
def test_refused_by_name(path: str, client: httpx.Client) -> None:
    least = _LEAST[path]
    assert client.post(path, json=least).status_code == 200
    refused = serve_tables.REFUSED.get(path, {}) | {"no_such_parameter": 1}
    for name, value in refused.items():
        reply = client.post(path, json=_with(least, name, value))
        assert reply.status_code in (400, 422), (name, reply.text)
        assert name.split(".")[-1] in reply.text, (name, reply.text)


def test_what_is_of_no_consequence_has_none(client: httpx.Client) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 3, "temperature": 1.0}
    plain = client.post("/v1/completions", json=body).json()["choices"]
    idle = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "cache_prompt": False}
    _, taken = serve_tables.parameters("/v1/completions")
    assert taken == [f"`{name}`" for name in idle]
    assert client.post("/v1/completions", json=body | idle).json()["choices"] == plain


def _with(body: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return body | {outer: body.get(outer, {}) | {inner: value} if inner else value}
