"""systemd's protocols for services: sd_notify(3) and sd_listen_fds(3).

Invariant: without their environment variables, nothing happens here. These are removed, lest other
processes of ours use them. The manager makes nobody wait: what it does not read is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

from proxy.config.addresses import PROXY_PROTOCOL
from proxy.log import logger
from proxy.net.sockets import MANAGER, Listening
from proxy.reasons import explain

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""

_TIDYING: Final = 15.0
"""Seconds to clean up, at most, after sessions and jobs must have ended."""

_LONGEST: Final = 366 * 86400.0
"""Seconds that the manager is asked to wait where we would wait for ever."""


class ServiceManager:
    """Tells the service manager about our state.

    Args:
        environ: has NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, LISTEN_FDS, LISTEN_PID and
            LISTEN_FDNAMES; they are removed.

    Attributes:
        environ: those of them that a successor must have.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")
        address, interval, watched, count, listener = (environ.pop(name, "") for name in names)
        self._names = environ.pop("LISTEN_FDNAMES", "").split(":")
        own = str(os.getpid())
        self._socket: socket.socket | None = None
        # @ stands for the zero byte of an abstract address.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        if self._address[:1] in ("/", "\0"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        microseconds = int(interval) if interval.isdecimal() and watched in ("", own) else 0
        self._interval = microseconds / 1e6
        self._count = int(count) if count.isdecimal() and listener == own else 0
        self._is_ready = False
        # Whether another process speaks to the manager; and the last status withheld meanwhile.
        self._is_silent = False
        self._unsaid = ""
        self.environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": interval} if address else {}

    # sd_notify(3)

    def begin(self) -> None:
        """From now on, show at half of WATCHDOG_USEC that the event loop runs."""
        if self._interval and self._socket is not None:
            self._send("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._interval / 2, self.begin)

    def ready(self) -> None:
        """Clients are being served; sent once."""
        if not self._is_ready:
            self._is_ready = True
            self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read; `reloaded` follows."""
        if self._is_ready:
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """The configuration was read, or stays as it was."""
        if self._is_ready:
            self._send("READY=1")

    def stopping(self, seconds: float) -> None:
        """No more clients are accepted; sessions and jobs have this many seconds. The manager is
        asked to wait, even if TimeoutStopSec is shorter."""
        wanted = min(seconds + _TIDYING, _LONGEST)
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(wanted * 1e6)}")

    def status(self, text: str) -> None:
        """Set the text in `systemctl status`."""
        line = f"STATUS={' '.join(text.split())}"
        self._unsaid = line if self._is_silent else ""
        self._send(line)

    def be_silent(self) -> None:
        """Send nothing while a predecessor is still the main process."""
        self._is_silent = True

    def speak(self) -> None:
        """Send again: there is no predecessor any more."""
        self._is_silent = False
        if self._unsaid:
            self._send(self._unsaid)

    def main_process_is(self, pid: int) -> None:
        """Our successor is the main process from now on."""
        self._send(f"MAINPID={pid}")
        self._is_silent = True

    def _send(self, *lines: str) -> None:
        if self._socket is None or self._is_silent:
            return
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:
            logger.debug("the service manager was not told: %s", explain(error))

    # sd_listen_fds(3)

    def sockets(self) -> list[Listening]:
        """The listening sockets that it has opened for us. FileDescriptorName=proxy_protocol in the
        socket unit means that connections begin with a PROXY protocol header.

        Raises OSError: one is not a listening stream socket.
        """
        names = itertools.chain(self._names, itertools.repeat(""))
        return [
            Listening(_listening(fd), MANAGER, has_header=name == PROXY_PROTOCOL)
            for fd, name in zip(range(_FIRST_FD, _FIRST_FD + self._count), names, strict=False)
        ]


def _listening(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    try:
        handed = socket.socket(fileno=fd)
        accepts = handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise OSError(f"LISTEN_FDS: file descriptor {fd}: {explain(error)}") from None
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if not accepts or handed.type != socket.SOCK_STREAM or handed.family not in families:
        raise OSError(
            f"LISTEN_FDS: file descriptor {fd} is no listening stream socket: the socket unit needs"
            " ListenStream and Accept=no"
        )
    handed.setblocking(False)
    return handed
