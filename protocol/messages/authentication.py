"""Messages of the section "Start-up": authentication, and what a backend says about itself.

Invariant: the repr of a message holds nothing one could log in with (passwords, SASL and GSS
responses, secret keys), so no log or traceback can show it.

All authentication requests have the type ``R``; an Int32 tells them apart. All answers of the
frontend have ``p``; only the request that they answer tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self, get_args

from protocol import wire
from protocol.messages.base import Message
from protocol.wire import ProtocolViolation, Reader

MIN_SECRET_KEY_LENGTH = 4
MAX_SECRET_KEY_LENGTH = 256
"""Bytes of the key in BackendKeyData: 4 in protocol 3.0, up to 256 in protocol 3.2."""


@dataclass(frozen=True, slots=True)
class Authentication(Message):
    """An authentication request; the subclasses without `_read_data` have no further data."""

    type: ClassVar[int] = ord("R")
    code: ClassVar[int]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        code = reader.int32()
        if code != cls.code:
            raise ProtocolViolation(f"{cls.__name__} has code {cls.code}, not {code}")
        return cls._read_data(reader)

    def _write(self) -> bytes:
        return wire.int32(self.code) + self._write_data()

    @classmethod
    def _read_data(cls, reader: Reader) -> Self:
        return cls()

    def _write_data(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class _Continued(Authentication):
    """A request of a mechanism that has begun, with the mechanism's data."""

    data: bytes

    @classmethod
    def _read_data(cls, reader: Reader) -> Self:
        return cls(reader.rest())

    def _write_data(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class AuthenticationOk(Authentication):
    """The login has succeeded."""

    code: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class AuthenticationKerberosV5(Authentication):
    """Asks for Kerberos V5, which no server supports any more."""

    code: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class AuthenticationCleartextPassword(Authentication):
    """Asks for the password in clear text."""

    code: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class AuthenticationMD5Password(Authentication):
    """Asks for a password hashed with these four bytes of salt: see `protocol.auth`."""

    code: ClassVar[int] = 5
    salt: bytes

    @classmethod
    def _read_data(cls, reader: Reader) -> Self:
        return cls(reader.take(4))

    def _write_data(self) -> bytes:
        if len(self.salt) != 4:
            raise ValueError("the salt of AuthenticationMD5Password has four bytes")
        return self.salt


@dataclass(frozen=True, slots=True)
class AuthenticationSCMCredential(Authentication):
    """Sent by servers before 9.1 only; the manual no longer has it."""

    code: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class AuthenticationGSS(Authentication):
    """Asks for GSSAPI negotiation."""

    code: ClassVar[int] = 7


@dataclass(frozen=True, slots=True)
class AuthenticationGSSContinue(_Continued):
    """More GSSAPI or SSPI data."""

    code: ClassVar[int] = 8
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuthenticationSSPI(Authentication):
    """Asks for SSPI negotiation."""

    code: ClassVar[int] = 9


@dataclass(frozen=True, slots=True)
class AuthenticationSASL(Authentication):
    """The SASL mechanisms that the server offers, in its order of preference."""

    code: ClassVar[int] = 10
    mechanisms: tuple[bytes, ...]

    @classmethod
    def _read_data(cls, reader: Reader) -> Self:
        mechanisms = []
        while mechanism := reader.string():
            mechanisms.append(mechanism)
        return cls(tuple(mechanisms))

    def _write_data(self) -> bytes:
        if b"" in self.mechanisms:
            raise ValueError("an empty name ends the list of mechanisms")
        return b"".join(map(wire.string, self.mechanisms)) + b"\0"


@dataclass(frozen=True, slots=True)
class AuthenticationSASLContinue(_Continued):
    """A challenge of the SASL mechanism: for SCRAM, the server-first-message."""

    code: ClassVar[int] = 11


@dataclass(frozen=True, slots=True)
class AuthenticationSASLFinal(_Continued):
    """The outcome of the SASL mechanism: for SCRAM, the server-final-message."""

    code: ClassVar[int] = 12


AuthenticationRequest = (
    AuthenticationOk
    | AuthenticationKerberosV5
    | AuthenticationCleartextPassword
    | AuthenticationMD5Password
    | AuthenticationSCMCredential
    | AuthenticationGSS
    | AuthenticationGSSContinue
    | AuthenticationSSPI
    | AuthenticationSASL
    | AuthenticationSASLContinue
    | AuthenticationSASLFinal
)

_REQUESTS: dict[int, type[AuthenticationRequest]] = {
    request.code: request for request in get_args(AuthenticationRequest)
}


def parse_authentication(body: bytes | bytearray | memoryview) -> AuthenticationRequest:
    """The authentication request with this body; its message type is ``R``.

    Raises:
        ProtocolViolation: malformed, or not in the manual.
    """
    code = Reader(body[:4]).int32()
    request = _REQUESTS.get(code)
    if request is None:
        raise ProtocolViolation(f"unknown authentication request {code}")
    return request.parse(body)


@dataclass(frozen=True, slots=True)
class PasswordMessage(Message):
    """A password: in clear text, or as the ``md5…`` response."""

    type: ClassVar[int] = ord("p")
    password: bytes = field(repr=False)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string())

    def _write(self) -> bytes:
        return wire.string(self.password)


@dataclass(frozen=True, slots=True)
class SASLInitialResponse(Message):
    """The chosen mechanism and its initial response; None if it has none."""

    type: ClassVar[int] = ord("p")
    mechanism: bytes
    response: bytes | None = field(repr=False)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.string(), reader.value())

    def _write(self) -> bytes:
        return wire.string(self.mechanism) + wire.value(self.response)


@dataclass(frozen=True, slots=True)
class SASLResponse(Message):
    """Further data of the mechanism: for SCRAM, the client-final-message with its proof."""

    type: ClassVar[int] = ord("p")
    response: bytes = field(repr=False)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.rest())

    def _write(self) -> bytes:
        return self.response


@dataclass(frozen=True, slots=True)
class GSSResponse(Message):
    """GSSAPI or SSPI data."""

    type: ClassVar[int] = ord("p")
    data: bytes = field(repr=False)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.rest())

    def _write(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class BackendKeyData(Message):
    """What a CancelRequest for this backend must contain. A pooler's `pid` is no process ID."""

    type: ClassVar[int] = ord("K")
    pid: int
    secret_key: bytes = field(repr=False)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        pid, secret_key = reader.int32(), reader.rest()
        if not MIN_SECRET_KEY_LENGTH <= len(secret_key) <= MAX_SECRET_KEY_LENGTH:
            raise ProtocolViolation(f"a secret key of {len(secret_key)} bytes")
        return cls(pid, secret_key)

    def _write(self) -> bytes:
        return wire.int32(self.pid) + self.secret_key


@dataclass(frozen=True, slots=True)
class NegotiateProtocolVersion(Message):
    """The server does not support the protocol version that the StartupMessage requested.

    `version` is the newest that it supports, (major, minor); the manual has the minor only.
    `options` are the ``_pq_.`` parameters that it did not recognise.
    """

    type: ClassVar[int] = ord("v")
    version: tuple[int, int]
    options: tuple[bytes, ...]

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        version = reader.uint16(), reader.uint16()
        count = reader.int32()
        if not 0 <= count <= reader.remaining:
            raise ProtocolViolation(f"{count} options cannot be in {reader.remaining} bytes")
        return cls(version, tuple([reader.string() for _ in range(count)]))

    def _write(self) -> bytes:
        major, minor = self.version
        options = b"".join(map(wire.string, self.options))
        return wire.uint16(major) + wire.uint16(minor) + wire.int32(len(self.options)) + options
