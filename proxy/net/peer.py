"""A client's address, for admission, limits and the log.

Invariant: it is the client's own, even if a load balancer has made the connection and reports it
(`proxy_protocol`). What only the system knows of a connection, such as the user at the other end of
a Unix socket, is then not the client's.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Self, TypeAlias

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Peer:
    """One client.

    Attributes:
        host: its IP address; empty if it is on this machine and uses a Unix socket.
        port: 0 for a Unix socket.
        sender: the load balancer that made the connection; None if the client did.
    """

    host: str
    port: int
    sender: Peer | None = None

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """The other end of a connection. Raises OSError if it has left already."""
        if connection.family == socket.AF_UNIX:
            return cls("", 0)
        return cls(*connection.getpeername()[:2])

    @property
    def is_local(self) -> bool:
        """Whether it uses a Unix socket."""
        return not self.host

    @property
    def address(self) -> Address | None:
        """None for a Unix socket."""
        if self.is_local:
            return None
        address = ipaddress.ip_address(self.host.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address

    @property
    def is_on_this_machine(self) -> bool:
        """Whether its traffic stays off the network."""
        address = self.address
        is_here = address is None or address.is_loopback
        return is_here and (self.sender is None or self.sender.is_on_this_machine)

    @property
    def name(self) -> tuple[str, int] | str:
        """The address as in a socket's peername."""
        return "" if self.is_local else (self.host, self.port)
