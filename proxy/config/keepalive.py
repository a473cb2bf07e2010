"""TCP keepalive: notices peers that have gone without closing the connection.

Invariant: 0 leaves a value to the operating system; options that a socket lacks are omitted.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive of a connection; `idle` and `interval` in seconds, `user_timeout` in ms."""

    enabled: bool = True
    idle: int = 0
    interval: int = 0
    count: int = 0
    user_timeout: int = 0

    def apply(self, sock: socket.socket) -> None:
        """Set it on a socket; connections accepted from a listening socket inherit it."""
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(self.enabled))
        options = {"TCP_USER_TIMEOUT": self.user_timeout}
        if self.enabled:
            options |= {
                # macOS's name for this option differs.
                "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": self.idle,
                "TCP_KEEPINTVL": self.interval,
                "TCP_KEEPCNT": self.count,
            }
        for name, value in options.items():
            option: int | None = getattr(socket, name, None)
            if value and option is not None:
                # A value too large for the system must not cost the connection.
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
