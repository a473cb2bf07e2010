"""Messages between the supervisor and a worker process: JSON, one object a line.

The rule: a channel is a socket pair that nobody else has an end of, so what comes in is believed;
and what cannot be sent because the other side does not read ends the channel, so nothing grows
without limit. Whoever loses the channel has lost the other process.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, Final, Self, TypeAlias, cast

Message: TypeAlias = "dict[str, Any]"

MAX_UNREAD: Final = 64 * 1024 * 1024
"""Bytes that may wait for the other side to read them."""


class Channel(asyncio.Protocol):
    """One end.

    Attributes:
        receive: called with each message; the owner may change it.
        lost: done when the other side is gone.
    """

    _transport: asyncio.Transport

    def __init__(self, receive: Callable[[Message], None]) -> None:
        self.receive = receive
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()

    @classmethod
    async def over(cls, end: socket.socket, receive: Callable[[Message], None]) -> Self:
        """A channel over one end of a socket pair, which it owns from now on."""
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(lambda: cls(receive), sock=end))[1]

    def send(self, message: Message) -> None:
        """Send a message; nothing happens if the other side is gone."""
        if self._transport.is_closing():
            return
        self._transport.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._transport.abort()

    def close(self) -> None:
        """Hang up, once all is sent."""
        self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        if not lines:
            self._received += data
            return
        lines[0] = bytes(self._received) + lines[0]
        self._received = bytearray(rest)
        for line in lines:
            self.receive(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
