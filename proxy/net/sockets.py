"""Listening sockets: opened, or handed to us by the service manager or a predecessor (`takeover`).

Invariant: the file of a Unix socket is removed by the last process that listens there: not by one
that has handed the socket on, nor by one that has not taken it over yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proxy.config import ListenAddress
from proxy.log import logger
from proxy.reasons import explain

CLIENTS: Final = "clients"
ADMIN: Final = "admin"
MANAGER: Final = "manager"
TAKEOVER: Final = "takeover"


@dataclass(frozen=True, slots=True, eq=False)
class Listening:
    """A listening socket.

    Attributes:
        socket: non-blocking.
        use: who connects: CLIENTS; MANAGER, clients on a socket of the service manager; ADMIN, for
            admin_listen; TAKEOVER, a successor.
        asked: the address as configured: port 0 for any, or a Unix socket's path; empty if unknown.
        has_header: whether connections begin with a PROXY protocol header.
    """

    socket: socket.socket
    use: str
    asked: str = ""
    has_header: bool = False

    def __str__(self) -> str:
        """The address, for the log."""
        name = self.socket.getsockname()
        if self.socket.family != socket.AF_UNIX:
            return str(ListenAddress(*name[:2]))
        return f"Unix socket {os.fsdecode(name).replace(chr(0), '@')}"


class Sockets:
    """All listening sockets of a process.

    Args:
        inherited: from its predecessor, which uses them until `own`.

    Attributes:
        all: those in use.
    """

    def __init__(self, inherited: Iterable[Listening] = ()) -> None:
        self._inherited = list(inherited)
        self.all: list[Listening] = []
        # Files of Unix sockets to remove at the end, with their device and inode.
        self._files: dict[Path, tuple[int, int]] = {}

    async def listen(self, use: str, address: ListenAddress) -> list[Listening]:
        """Listen on an address. Raises OSError with a message for the user."""
        try:
            if address.socket_path is None:
                found = await self._tcp(use, address)
            else:
                found = [self._unix(use, address.socket_path, address.proxy_protocol)]
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {explain(error)}") from None
        return found

    def add(self, handed: Iterable[Listening]) -> list[Listening]:
        """Use these sockets too."""
        found = list(handed)
        self.all += found
        return found

    def of_predecessor(self, use: str) -> list[Listening]:
        """Use the predecessor's sockets for this purpose, if it has any."""
        found = [listening for listening in self._inherited if listening.use == use]
        for listening in found:
            self._inherited.remove(listening)
        return self.add(found)

    def own(self) -> None:
        """The predecessor has released its sockets: close those not used any more."""
        for listening in self._inherited:
            logger.info("not listening on %s any more", listening)
            listening.socket.close()
            if listening.socket.family == socket.AF_UNIX and listening.use != MANAGER:
                with contextlib.suppress(OSError):
                    _remove_stale(Path(listening.asked))
        self._inherited.clear()
        for listening in self.all:
            if listening.asked.startswith("/"):
                self.file_is_ours(Path(listening.asked))

    def file_is_ours(self, path: Path) -> None:
        """Remove this file at the end, unless it was replaced."""
        with contextlib.suppress(OSError):
            self._files[path] = _identity(path)

    def keep_files(self) -> None:
        """Another process has all sockets and their files."""
        self._files.clear()

    def handed_on(self) -> None:
        """A successor has all sockets and their files."""
        self.keep_files()
        self.close(but=ADMIN)  # closed with the HTTP server

    def close(self, *, but: str = "") -> None:
        """Close all sockets, except those of one use."""
        for listening in (*self.all, *self._inherited):
            if listening.use != but:
                listening.socket.close()
        for path, identity in self._files.items():
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    path.unlink()
        self._files.clear()

    def _inherit(self, use: str, asked: str) -> socket.socket | None:
        for listening in self._inherited:
            if (listening.use, listening.asked) == (use, asked):
                self._inherited.remove(listening)
                return listening.socket
        return None

    def _unix(self, use: str, path: Path, has_header: bool) -> Listening:
        inherited = self._inherit(use, str(path))
        listening = Listening(
            inherited or socket.socket(socket.AF_UNIX), use, str(path), has_header
        )
        self.all.append(listening)
        if inherited is None:
            _remove_stale(path)
            listening.socket.setblocking(False)
            listening.socket.bind(str(path))
            self.file_is_ours(path)
        return listening

    async def _tcp(self, use: str, address: ListenAddress) -> list[Listening]:
        """One socket for each address of the host on this machine."""
        addresses = await asyncio.get_running_loop().getaddrinfo(
            None if address.host == "*" else address.host,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        found: list[Listening] = []
        missing: OSError | None = None
        for family, _, _, _, name in dict.fromkeys(addresses):
            asked = str(ListenAddress(str(name[0]), int(name[1])))
            bound = self._inherit(use, asked)
            try:
                bound = bound or _bound(family, name)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            found += self.add([Listening(bound, use, asked, address.proxy_protocol)])
        if missing is not None and not found:
            raise missing
        return found


def _bound(family: int, name: tuple[Any, ...]) -> socket.socket:
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(socket.socket(family))
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(name)
        stack.pop_all()
        return bound


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
            pass  # a full backlog
    raise OSError("another process is listening there")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
