"""File descriptors: the process's limit, and how clients are refused when none are left.

Invariant: a client that is refused for lack of descriptors is told so, if possible; the log says so
at most every few seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import time
from typing import Final

from protocol.errors import TOO_MANY_CONNECTIONS, SQLError
from proxy.log import logger
from proxy.reasons import explain

HINT: Final = (
    "The proxy has as many open files as it may have, two or more a session and one a job: raise"
    " its limit (ulimit -n, or LimitNOFILE in a systemd unit)."
)
_QUIET: Final = 5.0
"""Seconds between log lines."""


class OutOfDescriptorsError(OSError):
    """There is no descriptor left for a connection."""

    def __init__(self) -> None:
        super().__init__(errno.EMFILE, "the proxy is out of file descriptors")

    def __str__(self) -> str:
        return str(self.strerror)


def raise_limit() -> None:
    """Raise the soft limit to the hard one. It is mostly 1024, for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        logger.warning("could not raise the limit of open files from %d: %s", soft, explain(error))
        return
    logger.debug("raised the limit of open files from %d to %d", soft, hard)


def is_shortage(error: OSError) -> bool:
    """Whether the process or the machine is out of descriptors."""
    # asyncio merges the errors of several addresses into one, as text.
    return error.errno in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error)


_last_report = -_QUIET


def report(what: str) -> None:
    """Log that `what` fails for lack of descriptors, unless this was just logged."""
    global _last_report
    now = time.monotonic()
    if now - _last_report < _QUIET:
        return
    _last_report = now
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    logger.error("could not %s: too many open files (the limit is %d). %s", what, limit, HINT)


def no_room() -> SQLError:
    """The error for a client."""
    return SQLError(
        TOO_MANY_CONNECTIONS,
        "sorry, too many clients already",
        detail="The proxy is out of file descriptors.",
        hint=HINT,
        severity="FATAL",
    )


def turn_away(connection: socket.socket) -> None:
    """Tell a client that it cannot be served, and close."""
    with contextlib.suppress(OSError), connection:
        connection.setblocking(False)
        connection.send(no_room().response().serialize())
        connection.shutdown(socket.SHUT_WR)
        # With unread data, close() would send a reset, which may overtake the answer.
        connection.recv(4096)


class Reserve:
    """A spare descriptor for refusing clients."""

    def __init__(self) -> None:
        self._held: int | None = None
        self.keep()

    def keep(self) -> bool:
        """Take the descriptor again. Returns whether that was possible."""
        if self._held is None:
            with contextlib.suppress(OSError):
                self._held = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self._held is not None

    def release(self) -> None:
        """Free the descriptor for another use."""
        if self._held is not None:
            os.close(self._held)
            self._held = None
