"""The PROXY protocol, versions 1 and 2: the header with which a load balancer reports its client's
address (https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, chapter 2).

Invariant: exactly the header is read, and no byte of what the client has sent behind it, however
the bytes arrive. Version 1 has at most 107 bytes; of version 2, which states its length, only the
addresses are kept. TLVs are skipped, including the checksum.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import struct
import time
from collections.abc import Generator, Sequence
from typing import Final, NamedTuple

from proxy.config import Sender
from proxy.log import logger
from proxy.net.peer import Peer

TIMEOUT: Final = 10.0
"""Seconds for the header to arrive; senders send it at once."""

LONGEST_V1: Final = 107
"""Bytes of a version 1 header, with its line end."""

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
"""The beginning of a version 2 header."""

_QUIET: Final = 1.0
"""Seconds between complaints in the log."""

_V1: Final = b"PROXY "
_FIELDS: Final = re.compile(
    rb"(TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})"
)
_PIECE: Final = 4096
"""Bytes of TLVs skipped at a time."""

_LOCAL: Final = 0x20
_PROXY: Final = 0x21
"""Version and command."""

_SIZES: Final = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}
"""Bytes of the addresses, by family and transport."""


class HeaderError(Exception):
    """The input is no header; the message says why, for the log."""


class Complaints:
    """Logs closed connections, one a second, since strangers may open many."""

    def __init__(self) -> None:
        self._last = -_QUIET
        self._left_out = 0

    def add(self, message: str) -> None:
        """Log or count one more."""
        now = time.monotonic()
        if now - self._last < _QUIET:
            self._left_out += 1
            return
        more = f" ({self._left_out} more before it)" if self._left_out else ""
        self._last, self._left_out = now, 0
        logger.warning("%s%s", message, more)


class Wanted(NamedTuple):
    """Which of the next bytes belong to the header: at most `most`, and none beyond `end`."""

    most: int
    end: bytes = b""


class Source(NamedTuple):
    """The client's address and port."""

    host: str
    port: int


def header() -> Generator[Wanted, bytes, Source | None]:
    """Reads a header: yields what it wants, is sent at least one byte of that, and returns the
    client's address; None if that is the connection's own peer, or not reported.

    Raises HeaderError.
    """
    start = b""
    while len(start) < len(SIGNATURE):  # every header is longer
        start += yield Wanted(len(SIGNATURE) - len(start))
        if not (SIGNATURE.startswith(start) or start.startswith(_V1[: len(start)])):
            raise HeaderError("the connection does not begin with a header")
    return (yield from (_version_2() if start == SIGNATURE else _version_1(start)))


def _version_1(line: bytes) -> Generator[Wanted, bytes, Source | None]:
    while not line.endswith(b"\n"):
        if len(line) == LONGEST_V1:
            raise HeaderError(f"the header of version 1 has no end in {LONGEST_V1} bytes")
        line += yield Wanted(LONGEST_V1 - len(line), b"\n")
    if not line.endswith(b"\r\n"):
        raise HeaderError("the header of version 1 does not end in CR LF")
    said = line[len(_V1) : -2]
    if said == b"UNKNOWN" or said.startswith(b"UNKNOWN "):
        return None
    fields = _FIELDS.fullmatch(said)
    if fields is None:
        raise HeaderError("the header of version 1 is malformed")
    family, source, destination, *ports = (field.decode("ascii") for field in fields.groups())
    address_of = ipaddress.IPv4Address if family == "TCP4" else ipaddress.IPv6Address
    try:
        host, _ = address_of(source), address_of(destination)
    except ValueError:
        raise HeaderError("the header of version 1 has a malformed address") from None
    if any(int(port) > 65535 for port in ports):
        raise HeaderError("the header of version 1 has a port above 65535")
    return Source(str(host), int(ports[0]))


def _version_2() -> Generator[Wanted, bytes, Source | None]:
    command, family, size = struct.unpack("!BBH", (yield from _exactly(4)))
    if command not in (_LOCAL, _PROXY):
        raise HeaderError(f"the header has the unknown version and command {command:#04x}")
    found = None
    if command == _PROXY:
        if family not in _SIZES:
            raise HeaderError(f"the header has the unknown address family {family:#04x}")
        if size < _SIZES[family]:
            raise HeaderError("the header is too short for its addresses")
        size -= _SIZES[family]
        addresses = yield from _exactly(_SIZES[family])
        if family == 0x11:
            source, port = struct.unpack("!4s4xH2x", addresses)
            found = Source(str(ipaddress.IPv4Address(source)), port)
        elif family == 0x21:
            source, port = struct.unpack("!16s16xH2x", addresses)
            found = Source(str(ipaddress.IPv6Address(source)), port)
    while size:
        size -= len((yield Wanted(min(size, _PIECE))))
    return found


def _exactly(size: int) -> Generator[Wanted, bytes, bytes]:
    received = b""
    while len(received) < size:
        received += yield Wanted(size - len(received))
    return received


def check_sender(sender: Peer, allowed: Sequence[Sender]) -> None:
    """Raises HeaderError unless the sender may send headers."""
    address = sender.address
    for one in allowed:
        if address is None if isinstance(one, str) else address is not None and address in one:
            return
    who = "a Unix socket" if address is None else f'host "{address}"'
    raise HeaderError(f"{who} is not in proxy_protocol_from")


async def receive(connection: socket.socket, timeout: float | None) -> Peer:
    """Read the header of a connection that was just accepted. Returns the client's address.

    Args:
        connection: a non-blocking socket.
        timeout: seconds to wait, if fewer than TIMEOUT.

    Raises HeaderError; OSError: it was closed before anything came.
    """
    sender = Peer.of(connection)
    try:
        async with asyncio.timeout(min(timeout or TIMEOUT, TIMEOUT)):
            source = await _receive(connection)
    except TimeoutError:
        raise HeaderError("the header did not come in time") from None
    own = source or Source(sender.host, sender.port)
    return Peer(*own, sender)


async def _receive(connection: socket.socket) -> Source | None:
    reader = header()
    wanted, has_begun = next(reader), False
    while True:
        await readable(connection)
        try:
            seen = connection.recv(wanted.most, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not seen:
            if has_begun:
                raise HeaderError("the connection was closed within the header")
            raise ConnectionError("it was closed again")
        has_begun = True
        end = seen.find(wanted.end) if wanted.end else -1
        try:
            wanted = reader.send(connection.recv(end + 1 or len(seen)))
        except StopIteration as stop:
            found: Source | None = stop.value
            return found


async def readable(connection: socket.socket) -> None:
    """Wait until there is input, or an end of file."""
    loop = asyncio.get_running_loop()
    is_readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _resolve, is_readable)
    try:
        await is_readable
    finally:
        loop.remove_reader(connection)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
