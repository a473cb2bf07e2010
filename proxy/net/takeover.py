"""One process takes the listening sockets over from another, by a Unix socket (``takeover``).

=============  =====================================================================================
predecessor    for each of its sockets a message with its descriptor; then how many there were
successor      ``ready``: it could serve now
predecessor    ``paused``: it takes no more connections; new ones wait in the sockets
successor      ``taken``: it takes them from now on
predecessor    ``released``: it has closed its sockets, and told the service manager of the other
successor      ``stop``: end, as after SIGTERM; at any time after that
=============  =====================================================================================

Invariant: at any moment one of the two takes connections, or will if the other is gone; never both.
Until ``taken`` the predecessor goes on, whatever becomes of the successor. If it loses patience it
says so before it hangs up: a successor that finds the connection closed takes it for gone only if
it has not. Both believe only a process of their own user, and the socket is in a folder to which
nobody else can write.
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
"""Seconds in which the other process must answer."""

_READY: Final = 120.0
"""Seconds that a successor has to get ready; meanwhile there cannot be another."""

_AGAIN: Final = 1.0
"""Seconds until a successor is accepted that no file descriptor was left for."""

_UCRED: Final = struct.Struct("=iII")
"""Linux's struct ucred: pid, uid, gid."""


class TakeoverError(OSError):
    """The sockets cannot be taken over; the message is for the user."""


class _Link:
    """The connection between the two.

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
        """Raises TakeoverError: it is another user's."""
        if self._uid != os.geteuid():
            raise TakeoverError(f"takeover: process {self.pid} belongs to another user")

    def send(self, message: Any, descriptor: int | None = None) -> None:
        """Raises OSError: the other process is gone."""
        data = json.dumps(message).encode()
        if descriptor is None:
            self.socket.send(data)
        else:
            socket.send_fds(self.socket, [data], [descriptor])

    async def receive(self, timeout: float | None, most: int = 0) -> tuple[Any, list[int]]:
        """The next message, and up to `most` descriptors with it.

        Raises ConnectionError: the other process is gone; TakeoverError: it does not answer, and
        has no say any more; or it refuses, or says what it should not.
        """
        in_time = True
        try:
            async with asyncio.timeout(timeout):
                await readable(self.socket)
        except TimeoutError:
            # It is told so if it speaks from now on. What it has said by now counts: it does not
            # know that the time was over.
            self.socket.shutdown(socket.SHUT_RD)
            in_time = False
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, _LONGEST, most)
        except ConnectionResetError:
            # It has not read all that we have said; what it said itself is still here.
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
        """Raises OSError: something else comes, or nothing."""
        message, _ = await self.receive(timeout)
        if message != wanted:
            raise TakeoverError(f"takeover: process {self.pid} says {message!r}, not {wanted!r}")

    async def hear_out(self) -> None:
        """It has hung up. Raises TakeoverError: with its last word it has refused."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self.receive(_ANSWER)

    def refuse(self, reason: str) -> None:
        """Say why nothing comes of it, and hang up."""
        with contextlib.suppress(OSError):
            self.send({"refused": reason})
        self.close()

    def close(self) -> None:
        self.socket.close()


class Predecessor:
    """The process whose sockets we take over.

    Attributes:
        sockets: what it has; still used by it until `take`.
        is_replaced: whether we take connections in its place.
        gone: done when it has ended, after that.
    """

    def __init__(self, link: _Link, sockets: list[Listening]) -> None:
        self._link = link
        self.sockets = sockets
        self.is_replaced = False
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._link.pid

    @classmethod
    async def at(cls, path: Path) -> Self | None:
        """The one that listens at a path; None if there is none. Raises OSError."""
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
        """Take connections in its place from now on, if that is still wanted once it has paused:
        see `is_replaced`. Raises OSError: it goes on."""
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
        """Wait until it has let go of them, or is gone, or for a while."""
        try:
            async with asyncio.timeout(_ANSWER):
                await readable(self._link.socket)
        except TimeoutError:
            logger.warning("process %d has not let go of its sockets yet", self.pid)
        asyncio.get_running_loop().add_reader(self._link.socket, self._heard)

    def _heard(self) -> None:
        with contextlib.suppress(OSError):
            if self._link.socket.recv(_LONGEST):
                return  # that it has let go of them
        asyncio.get_running_loop().remove_reader(self._link.socket)
        self._link.close()
        logger.info("process %d, which has handed over, has ended", self.pid)
        self.gone.set_result(None)

    def stop(self) -> None:
        """Have it end as after SIGTERM."""
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
        listening: where it comes.
        sockets: all that it gets.
        pause: stops taking connections; raises TakeoverError if that cannot be now.
        resume: takes them again.
        hand_on: lets go of the sockets and tells the service manager, given the successor's pid.
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
        # Again, if we have taken it over: SO_PEERCRED tells who has done this last.
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
        """Whether one has the sockets, and will serve when it is ready, or when we are gone."""
        return self._task is not None

    def close(self) -> None:
        """Offer nothing any more."""
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
        """Raises OSError: the successor has come to nothing, and we go on."""
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
    """A socket at a path where nobody listens, for a successor; only our user can connect. Raises
    OSError."""
    _check_folder(path)
    if path.exists() and not path.is_socket():
        raise TakeoverError(f"takeover: {path} is something else than a socket, and is left alone")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # It gets its name once it listens: who finds one that does not takes the process for gone.
    unnamed = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unnamed.unlink(missing_ok=True)  # a process of this number may have died here
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
    """Raises TakeoverError: others could put something else there."""
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
