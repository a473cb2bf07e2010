"""What becomes of a connection that a listener has accepted: a session, once it is known how it
begins.

Invariant: nothing is read here but the header of the PROXY protocol, where there is to be one.
Whether the client begins with the handshake of TLS (``sslnegotiation=direct``) is told by its first
byte, which is looked at without being taken. Then the event loop gets the socket.
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
    """A connection that has come in.

    Attributes:
        socket: its socket, which does not block.
        has_header: whether it begins with a header of the PROXY protocol.
    """

    socket: socket.socket
    has_header: bool


class NewSession(Protocol):
    """What a listener needs of a session."""

    client: Connection

    def received(self, peer: Peer) -> None:
        """Its client has connected."""

    def close(self) -> None:
        """The connection has come to nothing."""


class Acceptor:
    """Makes sessions of connections.

    Args:
        new_session: makes a session, whose `client` is not connected yet.
        context: tells what TLS is made with now; None for none.
        login_timeout: tells the seconds until the first byte must have come; 0 for ever.
        senders: tells who may send headers of the PROXY protocol.
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
        """Make a session of a connection, once it has said how it begins."""
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
        """Let go of those that have not said anything yet."""
        for task in self._welcoming:
            task.cancel()


async def _peek(connection: socket.socket) -> bytes:
    """The first byte, left where it is. Raises OSError if none comes."""
    await proxy_protocol.readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if not first:
        raise ConnectionError("it was closed again")
    return first
