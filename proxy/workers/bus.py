"""The pipe between the supervisor and a worker process: one line for each of the `messages`.

Invariant: a pipe is a socket pair that no other process has, so its input is trusted; and
nothing grows without limit. Users determine the size of an answer, so answers come in pieces, and
one that the other side is too slow to read is omitted. Messages that must arrive are small: if one
cannot be sent, the pipe ends. A lost pipe means a lost process.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Self, cast

from proxy.log import logger
from proxy.workers.messages import Answer, Message, decode, encode

MAX_UNREAD: Final = 64 * 1024 * 1024
"""Limit of bytes that the other side has not read."""

MAX_ANSWERS: Final = 32 * 1024 * 1024
"""The same limit for starting another answer."""

PIECE: Final = 256 * 1024
"""Approximate limit of a message in bytes."""


class WorkerPipe(asyncio.Protocol):
    """One end of the pipe.

    Attributes:
        receive: called with each message; the owner may change it.
        lost: done when the other side is gone.
    """

    _transport: asyncio.Transport

    def __init__(self, receive: Callable[[Message], None]) -> None:
        self.receive = receive
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()
        self._full: asyncio.Future[None] | None = None

    @classmethod
    async def over(cls, end: socket.socket, receive: Callable[[Message], None]) -> Self:
        """A pipe over one end of a socket pair, which it then owns."""
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(lambda: cls(receive), sock=end))[1]

    def send(self, message: Message) -> None:
        """Send a message; no effect if the other side is gone."""
        if self._transport.is_closing():
            return
        if isinstance(message, Answer) and self._transport.get_write_buffer_size() > MAX_ANSWERS:
            logger.warning("a process does not read what it has asked for")
            message = replace(message, body=None)
        self._transport.write(encode(message))
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._transport.abort()

    async def drain(self) -> None:
        """Wait until the other side has read most of what was sent, or is gone."""
        if self._full is not None:
            await asyncio.wait((self._full, self.lost), return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Close once everything is sent."""
        self._transport.close()

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=4 * PIECE)

    def pause_writing(self) -> None:
        self._full = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._full is not None:
            self._full.set_result(None)
            self._full = None

    def data_received(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        if not lines:
            self._received += data
            return
        lines[0] = bytes(self._received) + lines[0]
        self._received = bytearray(rest)
        for line in lines:
            self.receive(decode(line))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
