"""Accepts connections.

Invariant: a listener decides nothing about incoming connections. With one process they go to the
`Acceptor`, which makes sessions of them; with several, the supervisor listens, and its workers have
acceptors. We call accept() ourselves for this, and because the event loop would close a connection
silently for lack of a descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Final

from proxy.config.keepalive import Keepalive
from proxy.log import logger
from proxy.net.acceptor import Accepted
from proxy.net.descriptors import Reserve, is_shortage, report, turn_away
from proxy.net.sockets import Listening
from proxy.reasons import explain

_BACKLOG: Final = 1024
_NOBODY: Final = (BlockingIOError, InterruptedError, ConnectionAbortedError)
"""Raised by accept() if no connection is waiting."""
_RETRY: Final = 1.0
"""Seconds to pause after accept() has failed, mostly for lack of file descriptors."""


class Listeners:
    """Accepts connections, unless paused.

    Args:
        take: called with each connection.
        keepalive: of the connections.
    """

    def __init__(self, take: Callable[[Accepted], None], keepalive: Keepalive) -> None:
        self._take = take
        self._keepalive = keepalive
        self._listening: list[Listening] = []
        self._reserve = Reserve()
        # Why connections are left in the backlog.
        self._reasons: set[str] = set()

    def add(self, sockets: Iterable[Listening]) -> None:
        """Accept connections here too. Raises OSError with a message for the user."""
        for listening in sockets:
            if listening.socket.family != socket.AF_UNIX:
                # Set before anybody connects, since connections inherit it.
                self._keepalive.apply(listening.socket)
            try:
                listening.socket.listen(_BACKLOG)
            except OSError as error:
                raise OSError(f"cannot listen on {listening}: {explain(error)}") from None
            self._listening.append(listening)
        if not self._reasons:
            self._begin()

    def pause(self, reason: str) -> None:
        """Leave new connections in the backlog."""
        self._reasons.add(reason)
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening.socket)

    def resume(self, reason: str) -> None:
        """Accept again, unless paused for another reason."""
        self._reasons.discard(reason)
        if not self._reasons:
            self._begin()

    def _begin(self) -> None:
        for listening in self._listening:
            asyncio.get_running_loop().add_reader(listening.socket, self._accept, listening)

    def close(self) -> None:
        """Accept no more connections."""
        self.pause("closed")
        self._listening.clear()
        self._reserve.release()

    def _accept(self, listening: Listening) -> None:
        for _ in range(_BACKLOG):
            try:
                connection, _ = listening.socket.accept()
                connection.setblocking(False)
            except _NOBODY:
                return
            except OSError as error:
                if is_shortage(error) and self._turn_away(listening):
                    continue
                self._wait_a_bit(listening, error)
                return
            self._take(Accepted(connection, listening.has_header))
            if self._reasons:
                return

    def _turn_away(self, listening: Listening) -> bool:
        """Use the reserve to refuse a client for lack of a descriptor; whether that worked."""
        if not self._reserve.keep():
            return False
        self._reserve.release()
        try:
            with contextlib.suppress(*_NOBODY):
                connection, _ = listening.socket.accept()
                turn_away(connection)
                report("accept new connections")
        except OSError:
            pass  # another thread was faster
        return self._reserve.keep()

    def _wait_a_bit(self, listening: Listening, error: OSError) -> None:
        if is_shortage(error):
            report("accept new connections")
        else:
            logger.error("could not accept new connection: %s", explain(error))
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.socket)
        loop.call_later(_RETRY, self._go_on, listening)

    def _go_on(self, listening: Listening) -> None:
        if not self._reasons:
            asyncio.get_running_loop().add_reader(listening.socket, self._accept, listening)
