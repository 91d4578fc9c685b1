"""`serve`: the application on a socket, until somebody ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from earnest.errors import AccessError, MachineError, UserError
from earnest.log import logger
from earnest.serve.app import create_app
from earnest.serve.connection import connection_of
from earnest.serve.state import Served

_FILES = 2**16
# Seconds that answers under way have to come to their end once the server is told to stop.
DRAIN_SECONDS = 30.0
_SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        host, port: of TCP; port 0 takes any that is free.
        unix_socket: a path, in place of host and port.
        certificate, key: files, for TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def listen(address: Address) -> socket.socket:
    """Take the address, so that it is known to be free before anything else is done.

    Raises:
        UserError: it is no address, or certificate and key do not fit.
        MachineError: somebody else has it.
        AccessError: it may not be taken.
    """
    if address.certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                address.certificate, address.key, lambda: ""
            )
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"{address.certificate} and {address.key} cannot be used for TLS", got=error
            ) from error
    if address.unix_socket is not None:
        return _listen_unix(address.unix_socket)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"{address.host!r} port {address.port} is no address: {error}") from error
    # With its protocol named: only then does asyncio send small pieces without waiting for more.
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(target)
        found.listen(2048)
    except OSError as error:
        found.close()
        where = f"{address.host}:{address.port}"
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"another program listens on {where} already",
                remedy="end it, or choose another --port (0 takes any that is free)",
            ) from error
        if error.errno == errno.EACCES:
            raise AccessError(
                f"{where} may not be used", remedy="choose a port above 1023"
            ) from error
        raise MachineError(f"{where} cannot be used: {error.strerror}") from error
    return found


def _listen_unix(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)  # one that is too busy to answer is there, too
                if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
                    raise MachineError(
                        f"another program listens on {path} already",
                        remedy="end it, or choose another --unix-socket",
                    )
            path.unlink()  # left behind by a server that was killed
        found.bind(str(path))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise MachineError(f"{path} cannot be used: {error}") from error
    return found


def serve(
    served: Served,
    listener: socket.socket,
    address: Address,
    *,
    drain_seconds: float = DRAIN_SECONDS,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; then take no more, let those under way end (at most
    `drain_seconds`), and return. A second signal does not wait.

    Args:
        served: what is served.
        listener: from `listen`.
        address: the same; for TLS.
        ready: called when requests are taken.
    """
    # The engine's thread comes back from a step to find this one at work: by default it would wait
    # for 5 ms, half a step of a small model.
    sys.setswitchinterval(_SWITCH_SECONDS)
    _allow_many_connections()
    server = uvicorn.Server(config_of(served, address))
    asyncio.run(_serve(server, served, listener, drain_seconds, ready))


def _allow_many_connections() -> None:
    """Each is an open file, of which a process may have 1,024 unless it asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(most, _FILES)
    with contextlib.suppress(OSError, ValueError):  # then it has what it has
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def config_of(served: Served, address: Address) -> uvicorn.Config:
    """How the application is put on the wire."""
    return uvicorn.Config(
        create_app(served),
        log_config=None,
        access_log=False,
        lifespan="off",
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
        timeout_keep_alive=75,
        http=connection_of(served.limits),
        h11_max_incomplete_event_size=served.limits.head_bytes,
        server_header=False,
        ws="none",
    )


async def _serve(
    server: uvicorn.Server,
    served: Served,
    listener: socket.socket,
    drain_seconds: float,
    ready: Callable[[], None],
) -> None:
    service, loop = served.service, asyncio.get_running_loop()
    ended = asyncio.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
    # uvicorn's own handling of signals would cut connections before their answers are complete.
    task = loop.create_task(server._serve([listener]))
    while not (server.started or task.done()):
        await asyncio.sleep(0.005)
    if server.started:
        ready()
        waiting = loop.create_task(ended.wait())
        task.add_done_callback(lambda _: ended.set())
        await waiting
    logger.info("ending: no more requests are taken")
    service.drain()
    ended.clear()
    closing = loop.run_in_executor(None, service.close, drain_seconds)
    while not closing.done():
        await asyncio.wait({closing}, timeout=0.1)
        if ended.is_set():
            await loop.run_in_executor(None, service.close, 0.0)
    server.should_exit = True
    await task
    if served.traces is not None:
        await loop.run_in_executor(None, served.traces.close)
