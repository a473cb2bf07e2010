"""The sockets that clients connect to.

Invariant: a listener decides nothing about the connections that come in. With one process, each
goes to the `Acceptor`, which makes a session of it and tells from the first byte how it begins:
with TLS it may begin with the handshake (``sslnegotiation=direct``). So we accept connections
ourselves, look at that byte without taking it, and hand the socket to the loop (which would close
it without notice for lack of a descriptor). With several processes the supervisor listens, and its
workers have the acceptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from proxy.config import ListenAddress
from proxy.config.keepalive import Keepalive
from proxy.log import logger
from proxy.net import tls
from proxy.net.connection import Connection
from proxy.net.descriptors import Reserve, is_shortage, report, turn_away

_BACKLOG: Final = 1024
_HANDSHAKE: Final = b"\x16"
"""The first byte of a TLS connection."""
_NOBODY: Final = (BlockingIOError, InterruptedError, ConnectionAbortedError)
"""What accept() raises when no connection waits."""
_RETRY: Final = 1.0
"""Seconds without new clients after accept() failed, mostly for lack of file descriptors."""


class NewSession(Protocol):
    """What a listener needs of a session."""

    client: Connection

    def close(self) -> None:
        """The connection has come to nothing."""


class Acceptor:
    """Makes sessions of connections.

    Args:
        new_session: makes a session, whose `client` is not connected yet.
        context: tells what TLS is made with now; None for none.
        login_timeout: tells the seconds until the first byte must have come; 0 for ever.
    """

    def __init__(
        self,
        new_session: Callable[[], NewSession],
        context: Callable[[], ssl.SSLContext | None],
        login_timeout: Callable[[], float],
    ) -> None:
        self._new_session = new_session
        self._context = context
        self._login_timeout = login_timeout
        self._welcoming: set[asyncio.Task[None]] = set()

    def take(self, connection: socket.socket) -> None:
        """Make a session of a connection, once it has said how it begins."""
        task = asyncio.get_running_loop().create_task(self._welcome(connection))
        self._welcoming.add(task)
        task.add_done_callback(self._welcoming.discard)

    async def _welcome(self, connection: socket.socket) -> None:
        session = self._new_session()
        connected = False
        timeout = self._login_timeout() or None
        context = None if connection.family == socket.AF_UNIX else self._context()
        try:
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
        except OSError as error:
            logger.debug("a client did not connect: %s", tls.explain(error))
        finally:
            if not connected:
                connection.close()
                session.close()

    def close(self) -> None:
        """Let go of those that have not said anything yet."""
        for task in self._welcoming:
            task.cancel()


class Listeners:
    """All addresses.

    Args:
        take: what becomes of a connection.
        keepalive: of the connections.
    """

    def __init__(self, take: Callable[[socket.socket], None], keepalive: Keepalive) -> None:
        self._take = take
        self._keepalive = keepalive
        self._open = contextlib.ExitStack()
        self._listening: list[socket.socket] = []
        self._reserve = Reserve()
        self._open.callback(self._reserve.release)
        self._paused = False

    async def listen(self, address: ListenAddress) -> None:
        """Take clients at one more address. Raises OSError, for the user to read."""
        try:
            if address.socket_path is not None:
                self._listen_unix(address.socket_path)
                logger.info("listening on Unix socket %s", address.socket_path)
                return
            sockets = await self._bind(address)
            for listening in sockets:
                self._accept_from(listening)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror or error}") from None
        for name in sorted({listening.getsockname()[:2] for listening in sockets}):
            logger.info("listening on %s", ListenAddress(*name))

    def close(self) -> None:
        """Take no more clients."""
        self._listening.clear()
        self._open.close()

    def _listen_unix(self, path: Path) -> None:
        _remove_stale(path)
        listening = self._open.enter_context(socket.socket(socket.AF_UNIX))
        listening.setblocking(False)
        listening.bind(str(path))
        self._open.callback(_remove_own, path, _identity(path))
        self._accept_from(listening)

    async def _bind(self, address: ListenAddress) -> list[socket.socket]:
        """A listening socket for each address that the host stands for and this machine has."""
        found = await asyncio.get_running_loop().getaddrinfo(
            None if address.host == "*" else address.host,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for family, _, _, _, name in dict.fromkeys(found):
            try:
                sockets.append(self._bound(family, name))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not sockets:
            raise missing
        return sockets

    def _bound(self, family: int, name: tuple[Any, ...]) -> socket.socket:
        listening = self._open.enter_context(socket.socket(family))
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self._keepalive.apply(listening)
        listening.bind(name)
        return listening

    def _accept_from(self, listening: socket.socket) -> None:
        listening.listen(_BACKLOG)
        self._listening.append(listening)
        loop = asyncio.get_running_loop()
        if not self._paused:
            loop.add_reader(listening, self._accept, listening)
        self._open.callback(loop.remove_reader, listening)

    def pause(self) -> None:
        """Leave new connections in the sockets' backlog."""
        self._paused = True
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening)

    def resume(self) -> None:
        """Take them again."""
        self._paused = False
        for listening in self._listening:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_BACKLOG):
            try:
                connection, _ = listening.accept()
                connection.setblocking(False)
            except _NOBODY:
                return
            except OSError as error:
                if is_shortage(error) and self._turn_away(listening):
                    continue
                self._wait_a_bit(listening, error)
                return
            self._take(connection)
            if self._paused:
                return

    def _turn_away(self, listening: socket.socket) -> bool:
        """There is no descriptor for the next client: spend the reserve on the answer; whether that
        could be done."""
        if not self._reserve.keep():
            return False
        self._reserve.release()
        try:
            with contextlib.suppress(*_NOBODY):
                connection, _ = listening.accept()
                turn_away(connection)
                report("accept new connections")
        except OSError:
            pass  # another thread was faster
        return self._reserve.keep()

    def _wait_a_bit(self, listening: socket.socket, error: OSError) -> None:
        if is_shortage(error):
            report("accept new connections")
        else:
            logger.error("could not accept new connection: %s", error.strerror)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        self._open.callback(loop.call_later(_RETRY, self._go_on, listening).cancel)

    def _go_on(self, listening: socket.socket) -> None:
        if not self._paused:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _peek(connection: socket.socket) -> bytes:
    """The first byte, left where it is. Raises OSError if none comes."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _resolve, readable)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if not first:
        raise ConnectionError("it was closed again")
    return first


def _remove_stale(path: Path) -> None:
    """Remove the socket of a proxy that is gone. Raises OSError for anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError("something else than a socket is there; it is left alone")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full
    raise OSError("another process is listening there")


def _remove_own(path: Path, own: tuple[int, int]) -> None:
    """Remove a socket if it is still the one that we made."""
    with contextlib.suppress(OSError):
        if _identity(path) == own:
            path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
