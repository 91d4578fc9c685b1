"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

from earnest.serve.run import Address, listen


def test_small_answers_are_not_kept_waiting() -> None:
    async def delayed() -> int:
        listener = listen(Address(port=0))
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value = await found
            writer.close()
        return value

    assert asyncio.run(delayed()) != 0
