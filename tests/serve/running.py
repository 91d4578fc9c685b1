"""A server in this process."""

from __future__ import annotations

import asyncio
import threading

import uvicorn

from earnest.serve.app import create_app
from earnest.serve.run import Address, listen
from earnest.serve.state import Served


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
