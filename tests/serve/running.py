"""A server in this process, or in one of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading

import uvicorn

from earnest.serve.run import Address, config_of, listen
from earnest.serve.state import Served


class Server:
    """A running server."""

    def __init__(self, served: Served) -> None:
        self.served = served
        address = Address(port=0)
        listener = listen(address)
        self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(config_of(served, address))
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listener]))
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._server.server_state.connections)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert self.served.service.close(timeout=20)
        assert self.served.service._open == 0
        self.served.model.engine.blocks.check_idle()


class Process:
    """A server of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "earnest", "serve", "stories", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
        )

    def where(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"(https?://\S+|unix:\S+)", line)
        assert found, (line, self.process.stderr.read() if self.process.stderr else "")
        return found[1]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)
