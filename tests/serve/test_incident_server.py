"""Incidents with servers (docs/incidents.md), by their numbers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import Server

from earnest.engine.blocks import keyed_digest

HELLO = [{"role": "user", "content": "Tell me a story."}]
COMPLETION = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
MESSAGES = {"messages": HELLO, "max_tokens": 4}
RESPONSES = {"input": "Once", "max_output_tokens": 4}
OLLAMA = {"model": "stories", "prompt": "Once", "stream": False, "options": {"num_predict": 4}}
OLLAMA_CHAT = {
    "model": "stories",
    "messages": HELLO,
    "stream": False,
    "options": {"num_predict": 4},
}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/api/generate": OLLAMA,
    "/api/chat": OLLAMA_CHAT,
    "/v1/embeddings": {"input": "Once"},
    "/api/embed": {"model": "stories", "input": "Once"},
    "/api/embeddings": {"model": "stories", "prompt": "Once"},
    "/tokenize": {"prompt": "Once"},
    "/detokenize": {"tokens": [5]},
}


CLIENT = httpx.Client(timeout=30)


def post(server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return CLIENT.post(f"{server.url}{path}", content=content, **options)


def refused(server: Server, path: str, change: dict[str, Any], *words: str) -> None:
    """A 400 that says why, and a server that goes on."""
    reply = post(server, path, ENDPOINTS[path] | change)
    assert reply.status_code == 400, reply.text
    assert all(word in reply.text for word in words), reply.text
    assert post(server, "/v1/completions", COMPLETION).status_code == 200


# --- 13, 15: templates and what is told to them -------------------------------------------------


@pytest.mark.parametrize("path", [path for path in ENDPOINTS if "tokenize" not in path])
def test_incident_13_cve_2026_5760_no_template_comes_with_a_request(
    server: Server, path: str
) -> None:
    evil = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    for name in ("chat_template", "template", "prompt_template"):
        refused(server, path, {name: evil}, name)
    for missing in ("/v1/rerank", "/rerank", "/v1/score", "/v1/embeddings/render"):
        assert post(server, missing, {"model": "stories"}).status_code == 404


@pytest.mark.parametrize(
    "name", ["tokenize", "chat_template", "tools", "messages", "return_tensors", "__class__", "add"]
)
def test_incident_15_cve_2025_61620_what_a_request_may_tell_the_template(
    server: Server, name: str
) -> None:
    path = "/v1/chat/completions"
    refused(server, path, {"chat_template_kwargs": {name: True}}, "chat_template_kwargs", name)
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    reply = post(server, path, CHAT | {"chat_template_kwargs": {"options": deep}})
    assert reply.status_code in (200, 400)


# --- 16, 17: structured output ------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD_SCHEMAS: list[Any] = [
    {"type": "nonsense"},
    {"type": 7},
    {"$ref": "#/nowhere"},
    {"$ref": "http://127.0.0.1:1/schema"},
    {"properties": [1]},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(a|b)*" * 9000},
    {"enum": []},
    {"minimum": "x", "type": "number"},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"not": {}},
    nested(200),
    {"type": "string", "minLength": 2**40},
]
# Odd, and schemas all the same.
ODD_SCHEMAS: list[Any] = [
    {"anyOf": [{"$ref": "#"}]},
    {"type": "array", "minItems": 2**40, "items": {"type": "null"}},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "string", "pattern": "(a+)+$"},
    {},
    True,
]


@pytest.mark.parametrize("number", range(len(BAD_SCHEMAS)))
def test_incident_16_cve_2025_48942_bad_schemas(server: Server, number: int) -> None:
    schema = BAD_SCHEMAS[number]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    begun = time.monotonic()
    refused(server, "/v1/chat/completions", {"response_format": wanted})
    refused(server, "/v1/completions", {"guided_json": schema})
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    refused(server, "/v1/chat/completions", {"tools": [tool], "tool_choice": "required"})
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("number", range(len(ODD_SCHEMAS)))
def test_incident_16_cve_2025_48944_odd_schemas(server: Server, number: int) -> None:
    schema = ODD_SCHEMAS[number]
    for path, change in (
        ("/v1/completions", {"guided_json": schema}),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
        ("/api/chat", {"format": schema}),
    ):
        assert post(server, path, ENDPOINTS[path] | change).status_code in (200, 400)
    assert post(server, "/v1/completions", COMPLETION).status_code == 200


def test_incident_16_cve_2025_48943_bad_patterns_and_tools(server: Server) -> None:
    for pattern in ("(", "[", "a{2,1}", "(?<=a)b", "(?P<", "a" * 2**17):
        refused(server, "/v1/completions", {"guided_regex": pattern}, "grammar")
    for kind in ("", "retrieval", None, 7, "Function", {"type": "function"}):
        tool = {"type": kind, "function": {"name": "f"}}
        refused(server, "/v1/chat/completions", {"tools": [tool]}, "tools")
    deep = "[" * 300_000
    assert post(server, "/v1/chat/completions", deep).status_code == 400


def test_incident_16_cve_2025_48887_patterns_that_backtrack(server: Server) -> None:
    """What makes other engines take for ever is matched in a time that grows with the text."""
    begun = time.monotonic()
    for pattern in ("(a+)+$", "(a|aa)+b", "(.*a){12}", "(x+x+)+y", "((a{1,999}){1,999}){9}"):
        reply = post(server, "/v1/completions", COMPLETION | {"guided_regex": pattern})
        assert reply.status_code in (200, 400), reply.text
    assert time.monotonic() - begun < 60


ALL_DIFFERENT = """
import resource, sys, os
written = []
def hook(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(args[0])
    if event in ("os.mkdir", "os.rename", "sqlite3.connect"):
        written.append(args[0])
from earnest.engine.language_model import load
from earnest.serve.grammar import Grammars
model = load("stories", runner="reference")
grammars = Grammars(model.tokenizer, model.config.vocab_size, sorted(model.tokenizer.eos_ids))
def compile(count, start):
    for n in range(start, start + count):
        schema = {"type": "object", "properties": {f"key{n}": {"enum": [n, str(n)]}}}
        grammars.constraint(grammars.json_schema(schema))().allowed()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
compile(100, 0)
before, keys = resident(), set(vars(grammars))
sys.addaudithook(hook)
compile(400, 100)
assert not written, written
assert set(vars(grammars)) == keys
grown = resident() - before
assert grown < 16e6, f"{grown:,} bytes"
"""


def test_incident_17_cve_2025_29770_many_different_schemas(tmp_path: Path) -> None:
    """None of them is kept, neither in memory nor on disk."""
    done = subprocess.run(
        [sys.executable, "-c", ALL_DIFFERENT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


# --- 18: what comes over the wire ---------------------------------------------------------------


def raw(server: Server, data: bytes, *, seconds: float = 10) -> bytes:
    """What comes back, until the server hangs up or nothing comes for so long."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(2**16):
                found += piece
    return found


def test_incident_18_cve_2025_48956_headers_are_bounded(server: Server) -> None:
    line = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    for headers in (
        b"x: " + b"a" * 2**20,
        b"".join(b"x%d: y\r\n" % n for n in range(20_000)),
        b"x: " * 50_000,
    ):
        assert raw(server, line + headers + b"\r\n\r\n").split(b"\r\n")[0] in (
            b"HTTP/1.1 400 Bad Request",
            b"",  # hung up on before all of it was sent
        )
    assert raw(server, b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n")[:12] in (
        b"HTTP/1.1 400",
        b"",
    )
    huge = line + b"content-length: 99999999999\r\n\r\n"
    assert raw(server, huge, seconds=1).startswith(b"HTTP/1.1 413")
    assert post(server, "/v1/completions", COMPLETION).status_code == 200


def test_incident_18_cve_2025_48956_slow_loris(start: Callable[..., Server]) -> None:
    server = start(limits={"head_seconds": 0.3, "body_seconds": 0.3, "unread_seconds": 0.3})
    begun = time.monotonic()
    for beginning in (b"", b"P", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: "):
        assert raw(server, beginning) == b""
    body = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
    assert raw(server, body, seconds=2).startswith(b"HTTP/1.1 408")
    # A second request on a connection that was used before.
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        with contextlib.suppress(ConnectionError):
            assert connection.recv(2**16) in (b"ok\n", b"")
            assert connection.recv(2**16) == b""
    assert time.monotonic() - begun < 30


def test_incident_18_cve_2025_48956_answers_that_nobody_reads(start: Callable[..., Server]) -> None:
    server = start(limits={"unread_seconds": 0.3})
    body = json.dumps(
        {
            "prompt": "Once",
            "max_tokens": 450,
            "ignore_eos": True,
            "n": 8,
            "logprobs": 60,
            "stream": True,
        }
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head + body)
        until = time.monotonic() + 60
        while not server.served.service._open and time.monotonic() < until:
            time.sleep(0.01)
        while server.connections + server.served.service._open and time.monotonic() < until:
            time.sleep(0.05)
    assert server.connections == 0 and server.served.service._open == 0


# --- 19, 20: prompts and numbers at the edge ----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_incident_19_cve_2024_8768_prompts_at_the_edge(server: Server, stream: bool) -> None:
    vocab = server.served.model.config.vocab_size
    good: list[Any] = ["", [""], ["", "a"], [0], [vocab - 1], [[1]], "\0", "\ud83d\ude00"]
    bad: list[Any] = [
        *([], [[]], [[1], []], [-1], [vocab], [2**31], [2**63], [1.5], [None], [[[1]]], None),
        *({}, 7, True, [True], ["a", 1], [1, "a"], [["a"]], "a " * 9000, [1] * 9000),
    ]
    for prompt in good:
        if stream and isinstance(prompt, list) and len(prompt) > 1:
            continue
        body = COMPLETION | {"prompt": prompt, "stream": stream}
        reply = post(server, "/v1/completions", body)
        assert reply.status_code == 200, (prompt, reply.text)
    for prompt in bad:
        body = COMPLETION | {"prompt": prompt, "stream": stream}
        reply = post(server, "/v1/completions", body)
        assert reply.status_code == 400, (prompt, reply.text)
    for ids in ([-1], [vocab], [2**31], [2**63], [10**400], [None], [1.5]):
        reply = post(server, "/detokenize", {"tokens": ids})
        expected = (200,) if ids == [vocab] else (400, 422)  # one that is not there adds nothing
        assert reply.status_code in expected, (ids, reply.text)


NUMBERS = ("-1", "0", "2147483648", "9223372036854775808", "NaN", "Infinity", "true", '"7"')


def numeric_fields(schema: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Of a body, the parameters that are numbers in any of their forms."""
    found = []
    for name, field in schema["properties"].items():
        forms = [field, *field.get("anyOf", [])]
        if any(form.get("type") in ("integer", "number") for form in forms):
            found.append(name)
    return found


@pytest.mark.parametrize("path", [path for path in ENDPOINTS if "tokenize" not in path])
def test_incident_20_cve_2026_21869_numbers_at_the_edge(server: Server, path: str) -> None:
    """Every number that any interface takes, as our own description names them."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = schemas[content["schema"]["$ref"].rsplit("/", 1)[1]]
    places = [(name, "") for name in numeric_fields(schema, schemas)]
    if path.startswith("/api/"):
        places += [("options", name) for name in numeric_fields(schemas["Options"], schemas)]
    assert places or path.endswith(("count_tokens", "embed", "embeddings"))
    for outer, inner in places:
        for number in NUMBERS:
            body = ENDPOINTS[path] | {outer: {"num_predict": 1, inner: "X"} if inner else "X"}
            for most in ("max_tokens", "max_output_tokens"):
                if most in body and outer != most:
                    body[most] = 1
            reply = post(server, path, json.dumps(body).replace('"X"', number))
            assert reply.status_code in (200, 400), (outer, inner, number, reply.text)
            assert "application/json" in reply.headers["content-type"]


# --- 21: uploads --------------------------------------------------------------------------------


def test_incident_21_cve_2025_62164_no_tensors_are_taken(server: Server) -> None:
    encoded = base64.b64encode(np.zeros(4, np.float32).tobytes()).decode()
    for name in ("prompt_embeds", "prompt_embedding", "image_embeds", "kv_transfer_params"):
        refused(server, "/v1/completions", {name: encoded}, name)
    for part in (
        {"type": "image_embeds", "image_embeds": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "file", "file": {"file_data": encoded}},
    ):
        messages = [{"role": "user", "content": [part]}]
        refused(server, "/v1/chat/completions", {"messages": messages})
    refused(server, "/api/generate", {"images": [encoded]}, "images")


# --- 25: what one tenant learns of another ------------------------------------------------------


def cached(server: Server, prompt: str, salt: str | None = None, key: str = "one") -> int:
    body = COMPLETION | {"prompt": prompt, "cache_salt": salt}
    headers = {"authorization": f"Bearer {key}"}
    reply = post(server, "/v1/completions", body, headers=headers)
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_incident_25_cve_2025_46570_prefixes_of_tenants_are_apart(
    start: Callable[..., Server],
) -> None:
    server = start(api_keys=("one", "two"))
    prompt = "Once upon a time there was a little girl who had a secret. " * 4
    assert cached(server, prompt) == 0
    shared = cached(server, prompt)
    assert shared > 0
    assert cached(server, prompt, salt="a") == 0
    assert cached(server, prompt, salt="b") == 0
    assert cached(server, prompt, salt="a") == shared
    assert cached(server, prompt, key="two") == 0  # nor does another's key help
    assert cached(server, prompt, salt="a", key="two") == 0
    assert cached(server, prompt, key="two") == shared


def test_incident_25_cve_2025_25183_collisions_give_nobody_anothers_text(
    start: Callable[..., Server],
) -> None:
    """A hash of four bits collides all the time; two tenants ask beginnings that are alike."""
    server = start()
    pool = server.served.model.engine.blocks

    def four_bits(key: bytes, content: bytes) -> bytes:
        return bytes([keyed_digest(key, content)[0] & 15])

    pool._digest = four_bits
    beginning = "Once upon a time there was a little boy named Tim. "
    prompts = [
        (beginning * 2 + f"He liked the number {n % 8} and his friend {'Tom' if n % 3 else 'Sue'}.")
        for n in range(24)
    ]
    model = server.served.model

    async def everybody() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:

            async def ask(n: int) -> str:
                body = {
                    "prompt": prompts[n],
                    "max_tokens": 8,
                    "seed": n,
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "cache_salt": "ab"[n % 2],
                }
                reply = await client.post(f"{server.url}/v1/completions", json=body)
                return str(reply.json()["choices"][0]["text"])

            return [t for _ in range(2) for t in await asyncio.gather(*map(ask, range(24)))]

    together = asyncio.run(everybody())
    assert len(pool._links) <= 16
    alone = []
    for n, prompt in enumerate(prompts):
        pool.forget()
        reply = post(
            server,
            "/v1/completions",
            {"prompt": prompt, "max_tokens": 8, "seed": n, "temperature": 1.0, "top_p": 1.0},
        )
        alone.append(reply.json()["choices"][0]["text"])
    assert together == alone * 2
    assert model.engine.counters.cached_tokens > 0


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..%2f..%2fetc", "a\0b"])
def test_incident_25_cve_2024_37032_names_are_names(server: Server, name: str) -> None:
    for path, body in (
        ("/api/show", {"model": name}),
        ("/api/generate", OLLAMA | {"model": name}),
        ("/v1/completions", COMPLETION | {"model": name}),
    ):
        assert post(server, path, body).status_code == 404
    assert httpx.get(f"{server.url}/v1/models/{name.encode().hex()}").status_code == 404
