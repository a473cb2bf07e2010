"""One side of a session: the connection to the client, or to its primary backend.

The rule: whoever writes faster than the other side reads is made to wait. When a connection's
write buffer is full, the connection opposite stops being read, until the buffer has drained.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from proxy.net import tls

_WRITE_BUFFER = 256 * 1024
"""Bytes that may wait to be written before the other side is stopped."""

# Why a connection is not being read; it is read when no reason is left.
_OPPOSITE_IS_FULL = 1
_INBOX_IS_FULL = 2


class Connection(asyncio.Protocol):
    """A connection whose owner says what is done with what comes in.

    Attributes:
        write: send, or queue. What is written to a connection that is gone is lost, as on a wire.
        opposite: the connection that is stopped when this one's write buffer is full.
        is_open: from the time it is made until it is lost.
        is_encrypted: whether it has TLS.
    """

    transport: asyncio.Transport
    opposite: Connection | None = None
    data_received: Callable[[bytes], None]  # type: ignore[assignment]  # callers say no data=

    def __init__(
        self,
        receive: Callable[[bytes], None],
        ended: Callable[[Connection], None],
        lost: Callable[[Connection, Exception | None], None],
    ) -> None:
        self.data_received = receive
        self.write: Callable[[bytes], None] = _lose
        self.is_open = False
        self.is_encrypted = False
        self._ended = ended
        self._lost = lost
        self._stopped = 0
        self._full: asyncio.Future[None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Also called when TLS has begun: then with the transport over the first one."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self.is_encrypted = tls.is_encrypted(transport)
        self.is_open = True
        # Both directions of the relay call the transport itself: a method between costs a
        # twentieth of what passing on a short query does.
        self.write = self.transport.write
        if self._stopped:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended(self)
        # The owner closes it: there may be more to write. TLS has no half-closed connections.
        return not self.is_encrypted

    def pause_writing(self) -> None:
        self._full = asyncio.get_running_loop().create_future()
        if self.opposite is not None:
            self.opposite._stop(_OPPOSITE_IS_FULL)

    def resume_writing(self) -> None:
        self._drained(None)
        if self.opposite is not None:
            self.opposite._go(_OPPOSITE_IS_FULL)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        self._drained(exc or ConnectionError("the connection was closed"))
        self._lost(self, exc)

    def _drained(self, error: Exception | None) -> None:
        if self._full is not None and not self._full.done():
            if error is None:
                self._full.set_result(None)
            else:
                self._full.set_exception(error)
                self._full.exception()  # it is no news if nobody waits
        self._full = None

    # The owner's side

    @property
    def receive(self) -> Callable[[bytes], None]:
        """Called with each chunk; the owner changes it when its phase changes."""
        return self.data_received

    @receive.setter
    def receive(self, receive: Callable[[bytes], None]) -> None:
        self.data_received = receive
        if self.is_open:
            self.transport.set_protocol(self)  # uvloop looks the method up only then

    def _gone(self) -> None:
        self.is_open = False
        self.write = _lose

    @property
    def full(self) -> asyncio.Future[None] | None:
        """Resolved once the write buffer has drained; None if it is not full."""
        return self._full

    @property
    def can_write_eof(self) -> bool:
        """Whether it can be half closed, which TLS cannot."""
        return not self.is_encrypted and self.transport.can_write_eof()

    def write_eof(self) -> None:
        """Pass on that the other side will send no more."""
        if self.is_open and self.can_write_eof:
            self.transport.write_eof()

    async def start_tls(self, context: ssl.SSLContext, timeout: float) -> None:
        """Go on with TLS, as the server of it; nothing may have been read that belongs to it.

        Raises OSError: no handshake came about within `timeout` seconds; the connection is gone.
        """
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self.transport,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=timeout or None,
                ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT,
            )
        except OSError:
            self._gone()
            raise
        if transport is None:
            self._gone()
            raise ConnectionError("the connection was closed")
        self.connection_made(transport)

    def close(self) -> None:
        """Close once everything is written."""
        if self.is_open:
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.is_open:
            self.transport.abort()

    def pause_reading(self) -> None:
        """For an inbox that is full."""
        self._stop(_INBOX_IS_FULL)

    def resume_reading(self) -> None:
        """The inbox has room again."""
        self._go(_INBOX_IS_FULL)

    def _stop(self, reason: int) -> None:
        if not self._stopped and self.is_open:
            self.transport.pause_reading()
        self._stopped |= reason

    def _go(self, reason: int) -> None:
        stopped, self._stopped = self._stopped, self._stopped & ~reason
        if stopped and not self._stopped and self.is_open:
            self.transport.resume_reading()


def _lose(data: bytes) -> None:
    pass
