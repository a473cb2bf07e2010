"""Addresses of clients' connections and of servers, as libpq and PostgreSQL write them.

Invariant: a host that begins with a slash is the directory of a Unix socket.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

DEFAULT_PORT: Final = 6543
DEFAULT_ADMIN_PORT: Final = 6544

PROXY_PROTOCOL: Final = "proxy_protocol"
"""Requests that protocol, in an address and in a socket unit."""

_LISTEN: Final = re.compile(r"(?P<host>/.*?|\[[^\]]+\]|[^:\[\]/]*)(?::(?P<port>[0-9]*))?")


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where clients connect: a TCP address, or a directory for a Unix socket."""

    host: str
    """A name, an address, a directory, or ``*`` for all interfaces."""
    port: int
    """0: any free port."""
    proxy_protocol: bool = False
    """Whether each connection begins with a PROXY protocol header."""

    @property
    def socket_path(self) -> Path | None:
        """The Unix socket's file, with PostgreSQL's name for it; None for TCP."""
        return Path(self.host, f".s.PGSQL.{self.port}") if self.host.startswith("/") else None

    def __str__(self) -> str:
        ipv6 = ":" in self.host and self.socket_path is None
        address = f"[{self.host}]:{self.port}" if ipv6 else f"{self.host}:{self.port}"
        return f"{address}?{PROXY_PROTOCOL}=on" if self.proxy_protocol else address


class Host(NamedTuple):
    """A server, by the name in its certificate and in a passfile."""

    name: str
    """A name, an address, or a directory."""
    port: int
    hostaddr: str = ""
    """The address to connect to, instead of looking up the name."""

    @property
    def is_local(self) -> bool:
        """Whether it is reached by a Unix socket."""
        return not self.hostaddr and self.name.startswith("/")

    @property
    def is_on_this_machine(self) -> bool:
        """Whether its address ensures that no machine on the network answers in its place."""
        address = self.hostaddr or self.name
        if self.is_local or address == "localhost":
            return True
        try:
            return ipaddress.ip_address(address).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return str(ListenAddress(self.name, self.port))


def parse_listen(text: str) -> ListenAddress:
    """Reads ``host:port``, ``[ipv6]:port``, ``*:port``, ``/directory:port``, with an optional
    ``?proxy_protocol=on``; the default port is 6543.

    Raises:
        ValueError: it is malformed.
    """
    address, mark, options = text.partition("?")
    if mark and options not in (f"{PROXY_PROTOCOL}=on", f"{PROXY_PROTOCOL}=off"):
        raise ValueError(
            f'invalid address: "{text}" (behind the question mark: {PROXY_PROTOCOL}=on)'
        )
    match = _LISTEN.fullmatch(address.strip())
    if match is None or not address.strip() or match[0].isdecimal():
        raise ValueError(
            f'invalid address: "{text}" (write host:port, [ipv6]:port or /directory:port)'
        )
    host = match["host"].removeprefix("[").removesuffix("]")
    port = parse_port(match["port"], 0) if match["port"] else DEFAULT_PORT
    return ListenAddress(host or "*", port, options.endswith("=on"))


def parse_admin_listen(text: str) -> ListenAddress:
    """Reads an address for HTTP: like `parse_listen`, without Unix sockets; default port 6544.

    Raises:
        ValueError: it is malformed.
    """
    has_port = re.search(r":[0-9]+$", text.strip()) is not None
    address = parse_listen(text)
    if address.socket_path is not None or "?" in text:
        raise ValueError(f'invalid address: "{text}" (write host:port or [ipv6]:port)')
    return address if has_port else ListenAddress(address.host, DEFAULT_ADMIN_PORT)


def parse_port(text: str, lowest: int = 1) -> int:
    """Raises ValueError for anything but a number from `lowest` to 65535."""
    if text.strip().isdecimal() and lowest <= int(text) <= 65535:
        return int(text)
    raise ValueError(f'invalid port number: "{text}" ({lowest} to 65535)')
