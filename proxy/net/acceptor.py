"""Turns accepted connections into sessions, once it is known how they begin.

Invariant: only the header of the PROXY protocol is read here, where one is expected. Whether the
client begins with a TLS handshake (``sslnegotiation=direct``) is told by its first byte, which is
only peeked at. Then the event loop gets the socket.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from proxy.config import Sender
from proxy.log import logger
from proxy.net import proxy_protocol, tls
from proxy.net.connection import Connection
from proxy.net.peer import Peer
from proxy.reasons import explain

_HANDSHAKE: Final = b"\x16"
"""The first byte of a TLS connection."""


class Accepted(NamedTuple):
    """An accepted connection.

    Attributes:
        socket: its non-blocking socket.
        has_header: whether it begins with a PROXY protocol header.
    """

    socket: socket.socket
    has_header: bool


class NewSession(Protocol):
    """What a listener needs of a session."""

    client: Connection

    def received(self, peer: Peer) -> None:
        """Its client has connected."""

    def close(self) -> None:
        """The connection has failed."""


class Acceptor:
    """Makes sessions of connections.

    Args:
        new_session: makes a session, whose `client` is not connected yet.
        context: returns the present TLS context; None for none.
        login_timeout: returns the seconds within which the first byte must come; 0 for no limit.
        senders: returns those who may send PROXY protocol headers.
    """

    def __init__(
        self,
        new_session: Callable[[], NewSession],
        context: Callable[[], ssl.SSLContext | None],
        login_timeout: Callable[[], float],
        senders: Callable[[], Sequence[Sender]],
    ) -> None:
        self._new_session = new_session
        self._context = context
        self._login_timeout = login_timeout
        self._senders = senders
        self._complaints = proxy_protocol.Complaints()
        self._welcoming: set[asyncio.Task[None]] = set()

    def take(self, connection: Accepted) -> None:
        """Make a session of a connection, once its beginning is known."""
        task = asyncio.get_running_loop().create_task(self._welcome(connection))
        self._welcoming.add(task)
        task.add_done_callback(self._welcoming.discard)

    async def _welcome(self, accepted: Accepted) -> None:
        connection = accepted.socket
        session = self._new_session()
        connected = False
        timeout = self._login_timeout() or None
        try:
            peer = Peer.of(connection)
            if accepted.has_header:
                proxy_protocol.check_sender(peer, self._senders())
                peer = await proxy_protocol.receive(connection, timeout)
            session.received(peer)
            context = None if peer.is_local else self._context()
            direct = False
            if context is not None:
                async with asyncio.timeout(timeout):
                    direct = await _peek(connection) == _HANDSHAKE
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: session.client,
                connection,
                ssl=context if direct else None,
                ssl_handshake_timeout=timeout if direct else None,
                ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT if direct else None,
            )
            connected = True
        except proxy_protocol.HeaderError as error:
            self._complaints.add(f"PROXY protocol: {error}; the connection is closed")
        except OSError as error:
            logger.debug("a client did not connect: %s", explain(error))
        finally:
            if not connected:
                connection.close()
                session.close()

    def close(self) -> None:
        """Drop connections that have not sent anything yet."""
        for task in self._welcoming:
            task.cancel()


async def _peek(connection: socket.socket) -> bytes:
    """The first byte, left unread. Raises OSError if none comes."""
    await proxy_protocol.readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if not first:
        raise ConnectionError("it was closed again")
    return first
