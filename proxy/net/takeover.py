"""The takeover of listening sockets by a successor, over a Unix socket (``takeover``).

=============  =====================================================================================
predecessor    for each of its sockets, a message with the descriptor; then their number
successor      ``ready``: it could serve now
predecessor    ``paused``: it accepts no more connections; new ones wait in the backlog
successor      ``taken``: it accepts them from now on
predecessor    ``released``: it has closed its sockets, and told the service manager of the other
successor      ``stop``: end, as on SIGTERM; at any time after that
=============  =====================================================================================

Invariant: at any moment one of the two accepts connections, or will if the other is gone; never
both. Until ``taken`` the predecessor stays, whatever becomes of the successor. If it loses patience
it says so before it closes: only without this does a successor take a closed connection for its
end. Each believes only a process of its own user, and nobody else can write to the socket's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

from proxy.log import logger
from proxy.net.descriptors import is_shortage, report
from proxy.net.proxy_protocol import readable
from proxy.net.sockets import TAKEOVER, Listening
from proxy.reasons import explain

_VERSION: Final = 1
"""Of the messages."""

_LONGEST: Final = 4096
"""Bytes of a message."""

_ANSWER: Final = 10.0
"""Seconds for the other process to answer."""

_READY: Final = 120.0
"""Seconds for a successor to become ready; meanwhile there cannot be another."""

_AGAIN: Final = 1.0
"""Seconds before accepting again a successor for whom no file descriptor was left."""

_UCRED: Final = struct.Struct("=iII")
"""Linux's struct ucred: pid, uid, gid."""


class TakeoverError(OSError):
    """The sockets cannot be taken over; the message is for the user."""


class _Link:
    """The connection between predecessor and successor.

    Attributes:
        pid: of the process at the other end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(told)
        self.pid: int = pid
        self._uid: int = uid

    def check_user(self) -> None:
        """Raises TakeoverError if it is another user's process."""
        if self._uid != os.geteuid():
            raise TakeoverError(f"takeover: process {self.pid} belongs to another user")

    def send(self, message: Any, descriptor: int | None = None) -> None:
        """Raises OSError if the other process is gone."""
        data = json.dumps(message).encode()
        if descriptor is None:
            self.socket.send(data)
        else:
            socket.send_fds(self.socket, [data], [descriptor])

    async def receive(self, timeout: float | None, most: int = 0) -> tuple[Any, list[int]]:
        """The next message, with up to `most` descriptors.

        Raises ConnectionError: the other process is gone; TakeoverError: it has not answered in
        time, or refuses, or sends something invalid.
        """
        in_time = True
        try:
            async with asyncio.timeout(timeout):
                await readable(self.socket)
        except TimeoutError:
            # If it speaks from now on, it will notice. What it has sent so far counts, since it
            # does not know that the time is over.
            self.socket.shutdown(socket.SHUT_RD)
            in_time = False
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, _LONGEST, most)
        except ConnectionResetError:
            # It closed without reading all that we sent; its own messages are still here.
            data, descriptors, _, _ = socket.recv_fds(self.socket, _LONGEST, most)
        if not (data or in_time):
            raise TakeoverError(f"takeover: process {self.pid} does not answer")
        if not data:
            raise ConnectionError(f"takeover: process {self.pid} is gone")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise TakeoverError(f"takeover: process {self.pid} is no proxy") from None
        if isinstance(message, dict) and "refused" in message:
            raise TakeoverError(f"takeover: process {self.pid} refuses: {message['refused']}")
        return message, descriptors

    async def expect(self, wanted: str, timeout: float | None = _ANSWER) -> None:
        """Raises OSError if anything else comes, or nothing."""
        message, _ = await self.receive(timeout)
        if message != wanted:
            raise TakeoverError(f"takeover: process {self.pid} says {message!r}, not {wanted!r}")

    async def hear_out(self) -> None:
        """The other process has hung up. Raises TakeoverError if its last message refuses."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self.receive(_ANSWER)

    def refuse(self, reason: str) -> None:
        """Say why there is no takeover, and close."""
        with contextlib.suppress(OSError):
            self.send({"refused": reason})
        self.close()

    def close(self) -> None:
        self.socket.close()


class Predecessor:
    """The process whose sockets we take over.

    Attributes:
        sockets: its sockets, which it uses until `take`.
        is_replaced: whether we accept connections in its place.
        gone: resolved when it has ended after that.
    """

    def __init__(self, link: _Link, sockets: list[Listening]) -> None:
        self._link = link
        self.sockets = sockets
        self.is_replaced = False
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        return self._link.pid

    @classmethod
    async def at(cls, path: Path) -> Self | None:
        """The process that listens at a path; None if there is none. Raises OSError."""
        _check_folder(path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise TakeoverError(f"takeover: cannot connect to {path}: {explain(error)}") from None
        connection.setblocking(False)
        link = _Link(connection)
        try:
            link.check_user()
            return cls(link, await _receive_sockets(link))
        except BaseException:
            link.close()
            raise

    async def take(self, still_wanted: Callable[[], bool]) -> None:
        """Accept connections in its place, if that is still wanted once it has paused: see
        `is_replaced`. Raises OSError: it stays."""
        try:
            self._link.send("ready")
            await self._link.expect("paused")
            if not still_wanted():
                self._link.close()
                return
            self._link.send("taken")
        except ConnectionError:
            await self._link.hear_out()
            logger.warning("process %d has ended before it has handed over", self.pid)
        self.is_replaced = True

    async def released(self) -> None:
        """Wait until it has released the sockets, or is gone; but not for long."""
        try:
            async with asyncio.timeout(_ANSWER):
                await readable(self._link.socket)
        except TimeoutError:
            logger.warning("process %d has not let go of its sockets yet", self.pid)
        asyncio.get_running_loop().add_reader(self._link.socket, self._heard)

    def _heard(self) -> None:
        with contextlib.suppress(OSError):
            if self._link.socket.recv(_LONGEST):
                return  # released
        asyncio.get_running_loop().remove_reader(self._link.socket)
        self._link.close()
        logger.info("process %d, which has handed over, has ended", self.pid)
        self.gone.set_result(None)

    def stop(self) -> None:
        """Have it end, as on SIGTERM."""
        if not self.gone.done():
            with contextlib.suppress(OSError):
                self._link.send("stop")


async def _receive_sockets(link: _Link) -> list[Listening]:
    found: list[Listening] = []
    try:
        while True:
            message, descriptors = await link.receive(_ANSWER, 1)
            match message:
                case {"sockets": count, "version": version}:
                    if (count, version) != (len(found), _VERSION):
                        raise TakeoverError(
                            f"takeover: process {link.pid} is of a version that this one does not"
                            " understand: stop it, and start this one"
                        )
                    return found
                case {"use": str(use), "asked": str(asked), "has_header": bool(has_header)} if (
                    descriptors
                ):
                    os.set_inheritable(descriptors[0], False)
                    handed = socket.socket(fileno=descriptors[0])
                    handed.setblocking(False)
                    found.append(Listening(handed, use, asked, has_header))
                case _:
                    raise TakeoverError(f"takeover: process {link.pid} is no proxy")
    except BaseException:
        for listening in found:
            listening.socket.close()
        raise


class Offer:
    """Hands our sockets to a successor, once one comes.

    Args:
        listening: where it connects.
        sockets: all that it gets.
        pause: stops accepting connections; raises TakeoverError if that cannot be now.
        resume: accepts them again.
        hand_on: releases the sockets and tells the service manager the successor's pid.
        stop: called when the successor wants us to end.
    """

    def __init__(
        self,
        listening: Listening,
        sockets: Callable[[], Sequence[Listening]],
        *,
        pause: Callable[[], Awaitable[None]],
        resume: Callable[[], None],
        hand_on: Callable[[int], None],
        stop: Callable[[], None],
    ) -> None:
        self._listening = listening.socket
        self._sockets = sockets
        self._pause, self._resume, self._hand_on, self._stop = pause, resume, hand_on, stop
        self._task: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None
        # Again, if it was inherited: SO_PEERCRED shows the last process to call it.
        self._listening.listen()
        self._begin()

    def _begin(self) -> None:
        asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listening)
        if self._later is not None:
            self._later.cancel()

    @property
    def has_successor(self) -> bool:
        """Whether a successor has the sockets, and serves or will serve once we are gone."""
        return self._task is not None

    def close(self) -> None:
        """Withdraw the offer."""
        self._end()
        if self._task is not None:
            self._task.cancel()

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if is_shortage(error):
                report("let another process take over")
                self._end()
                self._later = asyncio.get_running_loop().call_later(_AGAIN, self._begin)
            return
        connection.setblocking(False)
        link = _Link(connection)
        try:
            link.check_user()
            if self._task is not None:
                raise TakeoverError("another process takes over just now")
        except TakeoverError as error:
            self._refuse(link, error)
            return
        self._task = asyncio.get_running_loop().create_task(self._serve(link))

    def _refuse(self, link: _Link, error: OSError) -> None:
        reason = explain(error).removeprefix("takeover: ")
        logger.error("not handed over to process %d: %s", link.pid, reason)
        link.refuse(reason)

    async def _serve(self, link: _Link) -> None:
        try:
            try:
                await self._hand_over(link)
            except OSError as error:
                self._refuse(link, error)
                self._task = None
                return
            with contextlib.suppress(OSError):
                while True:
                    await link.expect("stop", timeout=None)
                    self._stop()
        finally:
            link.close()

    async def _hand_over(self, link: _Link) -> None:
        """Raises OSError: the successor has failed, and we continue."""
        sockets = self._sockets()
        for one in sockets:
            described = {"use": one.use, "asked": one.asked, "has_header": one.has_header}
            link.send(described, one.socket.fileno())
        link.send({"sockets": len(sockets), "version": _VERSION})
        await link.expect("ready", _READY)
        try:
            await self._pause()
            link.send("paused")
            await link.expect("taken", _ANSWER)
        except OSError:
            self._resume()
            raise
        self._end()
        self._hand_on(link.pid)
        with contextlib.suppress(OSError):
            link.send("released")


def listen(path: Path) -> Listening:
    """Listen for a successor of our user at an unused path. Raises OSError."""
    _check_folder(path)
    if path.exists() and not path.is_socket():
        raise TakeoverError(f"takeover: {path} is something else than a socket, and is left alone")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Named only once it listens: one that does not looks like that of a dead process.
    unnamed = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unnamed.unlink(missing_ok=True)  # left by a dead process with this pid
        mask = os.umask(0o177)
        try:
            listening.bind(str(unnamed))
        finally:
            os.umask(mask)
        listening.listen()
        unnamed.rename(path)
    except OSError as error:
        listening.close()
        raise TakeoverError(f"takeover: cannot listen on {path}: {explain(error)}") from None
    listening.setblocking(False)
    return Listening(listening, TAKEOVER, str(path))


def _check_folder(path: Path) -> None:
    """Raises TakeoverError if other users can write to the folder."""
    if not hasattr(socket, "SO_PEERCRED"):
        raise TakeoverError("takeover: needs Linux, where a socket tells who is at its other end")
    try:
        status = path.parent.stat()
    except OSError as error:
        raise TakeoverError(f"takeover: {path.parent}: {explain(error)}") from None
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TakeoverError(
            f"takeover: {path.parent} must belong to this user or to root, and nobody else may"
            " write there"
        )
