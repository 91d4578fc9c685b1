"""A server on a free port, in this process, with a small real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import Server

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
