"""A server on a free port, in this process, with a small real model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsing import Visits
from running import Process, Server

from earnest.engine.language_model import LanguageModel, load
from earnest.serve.state import Limits, Served
from earnest.tokenizer.template import ChatTemplate

# A template for a model that has none: enough to see that conversations arrive.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
    "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="session")
def stories() -> LanguageModel:
    return load("stories", runner="reference")


@pytest.fixture(scope="module")
def start(
    stories: LanguageModel, module_mocker: Callable[..., None]
) -> Iterator[Callable[..., Server]]:
    module_mocker(
        type(stories.tokenizer), "chat_template", property(lambda _: ChatTemplate(TEMPLATE))
    )
    running: list[Server] = []

    def make(**options: Any) -> Server:
        limits = Limits(**options.pop("limits", {}))
        model = LanguageModel(stories.checkpoint, stories.runner)
        running.append(Server(Served(model, "stories", limits=limits, **options)))
        return running[-1]

    yield make
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def module_mocker() -> Iterator[Callable[..., None]]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is installed here."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=path, args=["--host-resolver-rules=MAP chat.test 127.0.0.1"]
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visits]:
    """Opens pages, and fails if one of them complains or calls another host."""
    visits = Visits(browser)
    yield visits
    for context in visits.contexts:
        context.close()
    assert visits.problems == []


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def make(*arguments: str) -> Process:
        running.append(Process(*arguments))
        return running[-1]

    yield make
    for found in running:
        if found.process.poll() is None:
            found.process.kill()
        found.process.communicate()
