"""The page of all endpoints at `/docs`, in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from browsing import Visits, expect, expected_to_fail
from running import Server

WIDE = """[document.documentElement, document.body, document.querySelector('#scroll')]
          .every(e => e.scrollWidth <= e.clientWidth)"""


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def endpoints(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(method, path) for path, item in document["paths"].items() for method in item]


def open_endpoint(page: Any, name: str) -> Any:
    entry = page.locator(f"[id='{name}']")
    entry.locator("summary").first.click()
    expect(entry.locator("h3").first).to_be_visible()
    return entry


def test_the_frameworks_own_pages_are_gone(server: Server) -> None:
    page = httpx.get(f"{server.url}/docs")
    assert (
        page.status_code == 200
        and "require-trusted-types" in page.headers["content-security-policy"]
    )
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text)
    assert httpx.head(f"{server.url}/docs").status_code == 200
    for path in ("/redoc", "/docs/oauth2-redirect", "/web/docs.html"):
        assert httpx.get(server.url + path).status_code == 404


def test_every_endpoint_is_listed_with_all_that_it_takes(
    visit: Visits, server: Server, document: dict[str, Any]
) -> None:
    page = visit(server, "/docs")
    shown = page.locator(".endpoint").evaluate_all("all => all.map(e => e.id)")
    assert sorted(shown) == sorted(method + path for method, path in endpoints(document))
    # All of them opened, with what is folded in them two deep.
    for _ in range(3):
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        page.evaluate("new Promise(done => setTimeout(done, 50))")
    for method, path in endpoints(document):
        operation = document["paths"][path][method]
        text = page.locator(f"[id='{method}{path}']").inner_text()
        missing = [s for s in operation["responses"] if not re.search(rf"^{s} ", text, re.M)]
        assert not missing, (path, missing)
        names = [one["name"] for one in operation.get("parameters", ())]
        if "requestBody" in operation:
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
            names += schema["properties"]
        missing = [name for name in names if not re.search(rf"^{name} ", text, re.M)]
        assert not missing, (path, missing)
    chat = page.locator("[id='post/v1/chat/completions']").inner_text()
    assert re.search(r"^messages list of ChatMessage \(at least 1\) required", chat, re.M)
    assert re.search(
        r'^tool_choice "auto" or "none" or "required" or NamedTool or null', chat, re.M
    )
    assert re.search(r"^temperature number \(≥ 0\) or null", chat, re.M)
    assert re.search(r"^n integer \(≥ 1\), default 1", chat, re.M)
    assert re.search(r"^include_usage boolean, default false", chat, re.M)
    assert "ChatMessage One turn of a conversation." in chat


def test_search(visit: Visits, server: Server, document: dict[str, Any]) -> None:
    page = visit(server, "/docs")
    total = len(endpoints(document))
    expect(page.locator("#found")).to_have_text(f"{total} endpoints")
    page.keyboard.press("/")
    page.keyboard.type("GUIDED_regex chat")  # a parameter, and a word of the path
    expect(page.locator("#found")).to_have_text(f"1 of {total} endpoints")
    expect(page.locator(".endpoint:visible")).to_have_id("post/v1/chat/completions")
    expect(page.locator("h2:visible")).to_have_text("OpenAI")
    page.fill("#search", "no such thing")
    expect(page.locator(".endpoint:visible")).to_have_count(0)
    page.fill("#search", "")
    expect(page.locator(".endpoint:visible")).to_have_count(total)


def test_the_address_names_an_endpoint(visit: Visits, server: Server) -> None:
    page = visit(server, "/docs#get/health")
    expect(page.locator("details.endpoint[open] > summary code")).to_have_text("/health")
    expect(page.locator("details.endpoint[open]")).to_be_in_viewport()
    open_endpoint(page, "post/tokenize")
    assert page.url.endswith("/docs#post/tokenize")


def test_examples_are_answered(server: Server, document: dict[str, Any]) -> None:
    for method, path in endpoints(document):
        operation = document["paths"][path][method]
        for one in operation.get("parameters", ()):
            path = path.replace("{" + one["name"] + "}", one["example"])
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        example = body.get("example")
        assert (example is None) == (method == "get"), path
        reply = httpx.request(method, server.url + path, json=example)
        assert reply.status_code == 200, (path, reply.text)


def test_with_a_key(visit: Visits, start: Callable[..., Server]) -> None:
    server = start(api_keys=("right",))
    page = visit(server, "/docs", permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#key")).to_contain_text("This server asks for an API key.")
    assert page.locator(".endpoint").count() == 0
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_contain_text("The server does not accept this API key.")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enter the key").click()
    page.fill("#key-field", "right")
    page.keyboard.press("Enter")
    entry = open_endpoint(page, "post/v1/completions")
    expect(page.locator("#banner")).to_be_empty()
    entry.get_by_label("Copy the example").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "right" not in copied and 'Bearer $EARNEST_API_KEY"' in copied
    if shutil.which("curl") is None:
        pytest.skip("the example needs curl")
    asked = subprocess.run(
        ["sh", "-c", copied.replace("curl ", "curl -sS ", 1)],
        env=os.environ | {"EARNEST_API_KEY": "right"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert json.loads(asked.stdout)["choices"][0]["text"], asked.stderr
    open_endpoint(page, "get/health")  # which needs none
    assert "Bearer" not in page.locator("[id='get/health'] pre").inner_text()
    page.goto(server.url)  # the chat page knows it, too
    expect(page.locator("#model-name")).to_have_text("stories")
    expected_to_fail(visit, 401)


def test_under_another_name(visit: Visits, server: Server) -> None:
    page = visit(server, "/docs", host="chat.test")
    # Browsers send no origin with what a page asks of its own server by GET.
    expect(page.locator(".endpoint").first).to_be_visible()


def test_on_a_phone(visit: Visits, server: Server) -> None:
    page = visit(
        server, "/docs", viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
    )
    assert page.evaluate(WIDE)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    expect(page.locator("[id='post/v1/chat/completions'] .fields").first).to_be_visible()
    assert page.evaluate(WIDE)
    page.evaluate("document.querySelector('#scroll').scrollTo(0, 3000)")
    expect(page.locator("#search")).to_be_in_viewport(ratio=1)
    page.tap("#open-key")
    assert page.evaluate("document.querySelector('#key').scrollWidth <= innerWidth")


def test_the_document_is_downloaded(
    visit: Visits, server: Server, document: dict[str, Any]
) -> None:
    page = visit(server, "/docs")
    with page.expect_download() as started:
        page.click("#download")
    assert started.value.suggested_filename == "openapi.json"
    assert json.loads(started.value.path().read_text()) == document
