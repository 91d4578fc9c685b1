"""A real browser that reads the chat page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from running import Server

STORY = "Tell me a story."


def expect(what: Any) -> Any:
    """Playwright's, which waits."""
    from playwright.sync_api import expect as waiting

    waiting.set_options(timeout=10_000)
    return waiting(what)


@dataclass
class Visits:
    """Pages that are watched: nothing may fail, nothing may leave the server."""

    browser: Any
    problems: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def __call__(
        self,
        server: Server,
        path: str = "/",
        *,
        max_tokens: int | None = None,
        host: str = "",
        **options: Any,
    ) -> Any:
        context = self.browser.new_context(**options)
        if max_tokens is not None:
            sampling = json.dumps(json.dumps({"max_tokens": max_tokens}))
            context.add_init_script(f"localStorage.setItem('earnest.sampling', {sampling})")
        context.set_default_timeout(10_000)
        self.contexts.append(context)
        return self.page(context, f"http://{host}:{server.port}" if host else server.url, path)

    def page(self, context: Any, url: str, path: str = "/") -> Any:
        """One more window of the same browser."""
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._said)
        page.on(
            "request",
            lambda r: r.url.startswith((url, f"blob:{url}")) or self.problems.append(r.url),
        )
        page.goto(url + path)
        expect(page.locator("html[data-ready]")).to_be_attached()
        return page

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)


def say(page: Any, text: str = STORY, *, wait: bool = True) -> Any:
    """Send a message; its answer."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    expect(page.locator(".user .body").last).to_have_text(text)
    answer = page.locator(".message.assistant").last
    if wait:
        expect(answer).not_to_have_class(re.compile("running"))
    return answer


def replies(page: Any, *answers: Any, status: int = 200) -> list[Any]:
    """Let a made-up endpoint answer, in turn; the bodies it was sent."""
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        given = answers[min(len(asked), len(answers)) - 1]
        if status != 200 or isinstance(given, dict):
            route.fulfill(status=status, json=given)
            return
        deltas = [{"content": given}] if isinstance(given, str) else given
        events: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    return asked


def expected_to_fail(visit: Visits, *statuses: int) -> None:
    """The browser itself reports such answers; nothing else may be said."""
    said = [f"status of {status} " for status in statuses]
    visit.problems = [p for p in visit.problems if not any(one in p for one in said)]
