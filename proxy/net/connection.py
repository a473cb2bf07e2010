"""One side of a session: the connection to the client, or to its primary backend.

Invariant: a side that writes faster than the other reads must wait: while a connection's write
buffer is full, the opposite connection is not read. A peer that is gone is noticed in any case:
even while it is not being read, when the event loop does not see its end, and while a closed
connection has bytes left that the peer does not take.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import struct
from collections.abc import Callable
from typing import cast

from proxy.net import tls
from proxy.net.peer import Peer

_WRITE_BUFFER = 256 * 1024
"""Unsent bytes beyond which the opposite connection is not read."""

LINGER = 60.0
"""Seconds after which a closed connection is aborted if the peer has taken none of the rest. A
kernel treats orphaned sockets so, after some minutes. A server busy for so long loses only later
statements, whose client has left."""

_LOOK = 1.0
"""Seconds between checks of a peer that is not being read."""

_HUNG_UP = getattr(select, "POLLRDHUP", 0)
"""poll()'s event for an end of file behind unread data; Linux only."""

_AT_ONCE = 32 * 1024
"""Bytes that are gathered into one send (`Connection.gather`)."""

_HELD = 0.05
"""Seconds that part of an answer waits for the next at most."""

# Reasons why a connection is not being read
_OPPOSITE_IS_FULL = 1
_INBOX_IS_FULL = 2
_TAKES_A_BREAK = 4


class Connection(asyncio.Protocol):
    """A connection that hands its input to an owner.

    Attributes:
        write: sends, or queues. Data written to a connection that is gone are lost.
        opposite: the connection that is not read while this one's write buffer is full.
        full: resolved once the write buffer has drained; None if it is not full.
        is_open: from connection_made() to connection_lost().
        is_encrypted: whether it has TLS.
        peer: for a client, its address.
    """

    transport: asyncio.Transport
    peer: Peer
    opposite: Connection | None = None
    data_received: Callable[[bytes], None]  # type: ignore[assignment]  # callers say no data=

    def __init__(
        self,
        receive: Callable[[bytes], None],
        ended: Callable[[Connection], None],
        lost: Callable[[Connection, Exception | None], None],
        hung_up: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            receive: gets each chunk.
            ended: called at end of file.
            lost: called when the connection is gone.
            hung_up: called if the peer has sent an end of file, perhaps behind unread data, while
                it is not being read; perhaps repeatedly.
        """
        self.data_received = receive
        self.write: Callable[[bytes], None] = _lose
        self.is_open = False
        self.is_encrypted = False
        self._ended = ended
        self._lost = lost
        self._hung_up = hung_up
        self._stopped = 0
        self._breaks = 0
        self._looks = False
        self.full: asyncio.Future[None] | None = None
        self._gathers = False
        self._gathered = bytearray()
        self._flush: asyncio.Handle | None = None

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Also called by TLS, with its transport, once TLS has begun."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self.is_encrypted = tls.is_encrypted(transport)
        self.is_open = True
        # Both directions of the relay call the transport directly: a method in between would cost a
        # twentieth of passing on a short query.
        self.write = self._gather if self._gathers else self.transport.write
        if self._stopped:
            self._pause()

    def eof_received(self) -> bool:
        self._ended(self)
        # The owner closes it, after writing the rest. TLS connections cannot be half closed.
        return not self.is_encrypted

    def pause_writing(self) -> None:
        self.full = asyncio.get_running_loop().create_future()
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
        if self.full is not None and not self.full.done():
            if error is None:
                self.full.set_result(None)
            else:
                self.full.set_exception(error)
                self.full.exception()  # marks it as retrieved if nobody waits
        self.full = None

    # Called by the owner

    @property
    def receive(self) -> Callable[[bytes], None]:
        """Called with each chunk; the owner replaces it when its phase changes."""
        return self.data_received

    @receive.setter
    def receive(self, receive: Callable[[bytes], None]) -> None:
        self.data_received = receive
        if self.is_open:
            self.transport.set_protocol(self)  # uvloop looks the method up only then

    def gather(self) -> None:
        """From now on, send once per turn of the event loop, since each send wakes the peer."""
        self._gathers = True
        if self.is_open:
            self.write = self._gather

    def send_at_once(self) -> None:
        """Undo `gather`."""
        self.flush()
        self._gathers = False
        if self.is_open:
            self.write = self.transport.write

    def hold(self, data: bytes) -> None:
        """Send this with the next write, while writes are gathered."""
        if not self._gathers:
            self.write(data)
            return
        self._gathered += data
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_HELD, self.flush)

    def _gather(self, data: bytes) -> None:
        self._gathered += data
        if len(self._gathered) > _AT_ONCE:
            self.flush()
        elif self._flush is None or isinstance(self._flush, asyncio.TimerHandle):
            self._cancel_flush()
            self._flush = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what was gathered."""
        self._cancel_flush()
        if self._gathered:
            data, self._gathered = bytes(self._gathered), bytearray()
            if self.is_open:
                self.transport.write(data)

    def _cancel_flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None

    def _gone(self) -> None:
        self.is_open = False
        self.write = _lose
        self._gathered.clear()
        self._cancel_flush()

    @property
    def can_write_eof(self) -> bool:
        """Whether it can be half closed, which TLS cannot."""
        return not self.is_encrypted and self.transport.can_write_eof()

    def write_eof(self) -> None:
        """Send an end of file."""
        self.flush()
        if self.is_open and self.can_write_eof:
            self.transport.write_eof()

    async def start_tls(self, context: ssl.SSLContext, timeout: float) -> None:
        """Begin TLS as its server; nothing of the handshake may have been read.

        Raises OSError: the handshake failed or took over `timeout` seconds; the connection is gone.
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
        """Close once everything is written, or the peer takes no more."""
        self.flush()
        if self.is_open:
            # Asked first: TLS that was closed over a lost connection does not answer.
            left = self.transport.get_write_buffer_size()
            self.transport.close()
            self._linger(left)

    def _linger(self, left: int) -> None:
        if left:
            asyncio.get_running_loop().call_later(LINGER, self._abort_unless_less_than, left)

    def _abort_unless_less_than(self, size: int) -> None:
        if not self.is_open:
            return
        left = self.transport.get_write_buffer_size()
        if left < size:
            self._linger(left)
        else:
            self.transport.abort()

    def abort(self) -> None:
        """Close at once."""
        if self.is_open:
            self.transport.abort()

    def reset(self) -> None:
        """Close at once, so that the first byte from the peer fails; else only the second would."""
        if self.is_open:
            sock = self.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0 and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def pause_reading(self) -> None:
        """The inbox is full."""
        self._stop(_INBOX_IS_FULL)

    def resume_reading(self) -> None:
        """The inbox has room again."""
        self._go(_INBOX_IS_FULL)

    @property
    def is_stopped_by_opposite(self) -> bool:
        """Whether it is not read because the opposite write buffer is full."""
        return bool(self._stopped & _OPPOSITE_IS_FULL)

    def take_a_break(self) -> None:
        """Stop reading, to give other connections a turn of the event loop."""
        self._breaks += 1
        self._stop(_TAKES_A_BREAK)

    def end_break(self) -> None:
        """Read again after `take_a_break`, once each break has ended."""
        self._breaks -= 1
        if not self._breaks:
            self._go(_TAKES_A_BREAK)

    def _stop(self, reason: int) -> None:
        if not self._stopped and self.is_open:
            self._pause()
        self._stopped |= reason

    def _pause(self) -> None:
        self.transport.pause_reading()
        if not self._looks and self._hung_up is not None:
            self._looks = True
            asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Check that the peer is there, which nothing else does while it is not being read."""
        self._looks = False
        if not (self._stopped and self.is_open and self._hung_up is not None):
            return
        sock = self.transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return  # closed below TLS already; connection_lost() follows
        poll = select.poll()
        poll.register(sock.fileno(), _HUNG_UP)
        events = poll.poll(0)
        if events and events[0][1] & (select.POLLERR | select.POLLHUP):
            self.transport.abort()
            return
        if events:
            self._hung_up()
        self._looks = True
        asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _go(self, reason: int) -> None:
        stopped, self._stopped = self._stopped, self._stopped & ~reason
        if stopped and not self._stopped and self.is_open:
            self.transport.resume_reading()


def _lose(data: bytes) -> None:
    pass
