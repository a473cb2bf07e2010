"""The packets that open a connection, which have a length but no type byte (manual, "Start-up").

Invariant: the four bytes after the length tell the packets apart. The client is not authenticated
yet, so the length is bounded before the packet is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

from protocol import wire
from protocol.messages.authentication import MAX_SECRET_KEY_LENGTH
from protocol.wire import ProtocolViolation, Reader

MAX_STARTUP_PACKET_LENGTH = 10000
"""The longest body in bytes, without the length word: PostgreSQL's own limit."""

_FALSE: Final = (b"false", b"off", b"no", b"0", b"f", b"n")
"""Values of the parameter ``replication`` that ask for none."""


@dataclass(frozen=True, slots=True)
class StartupMessage:
    """Opens a session.

    Attributes:
        parameters: ``user``, ``database``, ``options``, and settings, in the order of the wire.
            If one comes twice, the last counts, as in PostgreSQL.
        version: major and minor version of the protocol; the major version is 3.
    """

    parameters: dict[bytes, bytes]
    version: tuple[int, int] = (3, 0)

    @property
    def user(self) -> bytes:
        """The role; empty if none is named, which a server refuses."""
        return self.parameters.get(b"user", b"")

    @property
    def database(self) -> bytes:
        """By default the one of the role's name."""
        return self.parameters.get(b"database") or self.user

    @property
    def application_name(self) -> bytes:
        return self.parameters.get(b"application_name", b"")

    @property
    def is_replication(self) -> bool:
        """Whether it asks for replication, physical or logical."""
        return self.parameters.get(b"replication", b"false").lower() not in _FALSE

    @property
    def is_physical_replication(self) -> bool:
        """Whether it asks for replication of the whole cluster, which belongs to no database."""
        return self.is_replication and self.parameters[b"replication"].lower() != b"database"

    def serialize(self) -> bytes:
        """The whole packet. Raises ValueError for an empty name or a NUL in a string."""
        if b"" in self.parameters:
            raise ValueError("an empty name ends the list of parameters")
        pairs = [wire.string(text) for pair in self.parameters.items() for text in pair]
        return _packet(self.version, b"".join(pairs) + b"\0")


@dataclass(frozen=True, slots=True)
class SSLRequest:
    """Asks for TLS. The answer is one byte: ``S`` (go on with the handshake) or ``N``."""

    code: ClassVar[tuple[int, int]] = (1234, 5679)

    def serialize(self) -> bytes:
        return _packet(self.code)


@dataclass(frozen=True, slots=True)
class GSSENCRequest:
    """Asks for GSSAPI encryption. The answer is one byte: ``G`` or ``N``."""

    code: ClassVar[tuple[int, int]] = (1234, 5680)

    def serialize(self) -> bytes:
        return _packet(self.code)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Asks to cancel the query of the backend with this BackendKeyData. It gets no answer."""

    code: ClassVar[tuple[int, int]] = (1234, 5678)
    pid: int
    secret_key: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return _packet(self.code, wire.int32(self.pid) + self.secret_key)


@dataclass(frozen=True, slots=True)
class RefusedStartup:
    """A StartupMessage that every server refuses with an error: its major version is not 3, or its
    list of parameters does not end where the packet does."""

    version: tuple[int, int]


StartupPacket = StartupMessage | SSLRequest | GSSENCRequest | CancelRequest | RefusedStartup


def startup_packet_length(header: bytes) -> int:
    """How many bytes follow `header`, the first four bytes of a packet.

    Raises:
        ProtocolViolation: too few for a version, or more than `MAX_STARTUP_PACKET_LENGTH`.
    """
    length = Reader(header[:4]).int32() - 4
    if not 4 <= length <= MAX_STARTUP_PACKET_LENGTH:
        raise ProtocolViolation("invalid length of startup packet")
    return length


def parse_startup_packet(body: bytes) -> StartupPacket:
    """The packet with this body (what follows the length word).

    Raises:
        ProtocolViolation: a server would not answer it.
    """
    if len(body) > MAX_STARTUP_PACKET_LENGTH:
        raise ProtocolViolation("invalid length of startup packet")
    reader = Reader(body)
    packet = _read(reader, (reader.uint16(), reader.uint16()))
    reader.end()
    return packet


def _read(reader: Reader, code: tuple[int, int]) -> StartupPacket:
    if code == CancelRequest.code:
        pid, secret_key = reader.int32(), reader.rest()
        if len(secret_key) > MAX_SECRET_KEY_LENGTH:
            raise ProtocolViolation(f"a secret key of {len(secret_key)} bytes")
        return CancelRequest(pid, secret_key)
    rest = reader.rest()
    if code == SSLRequest.code:
        return SSLRequest()  # whatever follows
    if code == GSSENCRequest.code:
        return GSSENCRequest()
    parameters = _parameters(rest) if code[0] == 3 else None
    return RefusedStartup(code) if parameters is None else StartupMessage(parameters, code)


def _parameters(data: bytes) -> dict[bytes, bytes] | None:
    """Names and values; None if they end too early or too late. As in PostgreSQL, the last byte
    serves as the terminator, whatever it is."""
    *strings, end = data[:-1].split(b"\0")
    names, values = strings[::2], strings[1::2]
    if not data or end or len(names) != len(values) or b"" in names:
        return None
    return dict(zip(names, values, strict=True))


def _packet(code: tuple[int, int], body: bytes = b"") -> bytes:
    major, minor = code
    return wire.int32(len(body) + 8) + wire.uint16(major) + wire.uint16(minor) + body
