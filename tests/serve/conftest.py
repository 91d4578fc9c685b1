"""A server on a free port, in this process, with a small real model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "llguidance", "prometheus_client", "openai"):
    pytest.importorskip(package, reason="earnest[serve] is not installed")

import asyncio

import uvicorn

from earnest.engine.language_model import LanguageModel, load
from earnest.serve.app import create_app
from earnest.serve.run import Address, listen
from earnest.serve.state import Limits, Served

# A template for a model that has none: enough to see that conversations arrive.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Server:
    """A running server."""

    def __init__(self, served: Served) -> None:
        self.served = served
        listener = listen(Address(port=0))
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(create_app(served), log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listener]))
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert self.served.service.close(timeout=20)
        assert self.served.service._open == 0
        self.served.model.engine.blocks.check_idle()


@pytest.fixture(scope="session")
def stories() -> LanguageModel:
    return load("stories", runner="reference")


@pytest.fixture(scope="module")
def start(
    stories: LanguageModel, module_mocker: Callable[..., None]
) -> Iterator[Callable[..., Server]]:
    from earnest.tokenizer.template import ChatTemplate

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
