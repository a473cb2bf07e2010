"""The messages of one connection, for a coroutine that reads them one by one.

Invariant: an inbox holds about `LIMIT` unread bytes at most; beyond that it stops reading. A longer
message is still collected whole once it is awaited, unless `bound` forbids it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

from protocol.framing import MessageBuffer

LIMIT = 256 * 1024
"""Unread bytes beyond which the source is stopped."""


class Source(Protocol):
    """The part of asyncio.ReadTransport that an inbox needs."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Inbox:
    """A buffer of messages with one reader."""

    __slots__ = ("_buffer", "_error", "_paused", "_source", "_waiter")

    def __init__(self, source: Source) -> None:
        self._source = source
        self._buffer = MessageBuffer()
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._paused = False

    def feed(self, data: bytes | memoryview) -> None:
        """Add a chunk, which may end anywhere."""
        self._buffer.feed(data)
        if self._waiter is not None:
            self._wake()
        elif not self._paused and len(self._buffer) > LIMIT:
            self._paused = True
            self._source.pause_reading()

    def bound(self, limit: Callable[[int], int] | None) -> None:
        """Set the limit of the length word of future messages, by type; None: no limit."""
        self._buffer.limit = limit

    def close(self, error: Exception) -> None:
        """No more will come. `next` raises the error once everything has been read."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> tuple[int, bytes]:
        """The next message as (type, body).

        Raises ProtocolViolation for a malformed stream, and the error given to `close`.
        """
        while True:
            message = self.next_nowait()
            if message is not None:
                return message
            if self._error is not None:
                raise self._error
            self.resume()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def next_nowait(self) -> tuple[int, bytes] | None:
        """The next message; None if it has not arrived yet."""
        return self._buffer.next_message()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """The messages that have arrived."""
        return iter(self._buffer)

    def take_rest(self) -> bytes:
        """The unread bytes, which are removed. The connection is read again."""
        rest = self._buffer.take_rest()
        self.resume()
        return rest

    def resume(self) -> None:
        """Read the connection again, if the inbox stopped it."""
        if self._paused:
            self._paused = False
            self._source.resume_reading()
