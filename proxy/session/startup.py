"""What a client sends before it says who it is: requests for encryption, a cancel request, or the
StartupMessage.

Invariant: each request for encryption is answered once, and nothing that came unencrypted is read
as if it had come encrypted.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INVALID_AUTHORIZATION_SPECIFICATION,
    PROTOCOL_VIOLATION,
    ProtocolViolation,
    SQLError,
)
from protocol.startup import (
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    StartupPacket,
    parse_startup_packet,
    startup_packet_length,
)
from proxy.net import tls
from proxy.net.connection import Connection
from proxy.session.services import Services

_NEWEST: Final = "3.2"
"""The newest version of the protocol; a server may know less, and says so itself."""


class StartupPackets:
    """Those of one client.

    Attributes:
        rest: bytes that came behind the last packet.
    """

    def __init__(
        self,
        services: Services,
        client: Connection,
        accept: Callable[[StartupMessage | CancelRequest, bytes], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        """
        Args:
            services: has the certificate, and says whether TLS is demanded.
            client: its connection.
            accept: gets what the client wants, as a packet and as its bytes. Of a client that is
                to log in, no more is read until its connection is told so.
            spawn: runs the handshake, and ends the session if that raises an error.
        """
        self.rest = bytearray()
        self._services = services
        self._client = client
        self._accept = accept
        self._spawn = spawn
        self._waits = False  # for the end of a handshake, or for good
        self._tls_asked = False
        self._gss_asked = False

    def feed(self, data: bytes) -> None:
        """Take what the client has sent. Raises ProtocolViolation, SQLError."""
        self.rest += data
        while len(self.rest) >= 4 and not self._waits:
            size = 4 + startup_packet_length(bytes(self.rest[:4]))
            if len(self.rest) < size:
                return
            raw = bytes(self.rest[:size])
            del self.rest[:size]
            self._serve(parse_startup_packet(raw[4:]), raw)

    def _serve(self, packet: StartupPacket, raw: bytes) -> None:
        if self._client.is_encrypted and not self._tls_asked:
            self._direct_tls()
        match packet:
            case SSLRequest() if not self._tls_asked:
                self._tls_asked = True
                self._answer_ssl_request()
            case GSSENCRequest() if not self._gss_asked:
                self._gss_asked = True
                self._client.write(b"N")
            case CancelRequest():
                self._waits = True
                self._accept(packet, raw)
            case StartupMessage(version=(3, _)):
                self._check_tls()
                self._client.pause_reading()
                self._waits = True
                self._accept(packet, raw)
            case _:
                raise _unsupported(raw)

    def _direct_tls(self) -> None:
        """TLS from the first byte on: both must have said that it is for PostgreSQL."""
        self._tls_asked = True
        if not tls.speaks_postgresql(self._client.transport):
            raise ProtocolViolation(
                "received direct SSL connection request without ALPN protocol negotiation extension"
            )

    def _answer_ssl_request(self) -> None:
        context = self._services.runtime.tls
        if context is None or is_local(self._client):
            self._client.write(b"N")
        elif self.rest:
            raise SQLError(
                PROTOCOL_VIOLATION,
                "received unencrypted data after SSL request",
                detail="This could be either a client-software bug or evidence of an attempted"
                " man-in-the-middle attack.",
            )
        else:
            self._client.write(b"S")
            self._client.pause_reading()
            self._waits = True
            self._spawn(self._start_tls(context))

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        timeout = self._services.runtime.config.client_login_timeout
        try:
            await self._client.start_tls(context, timeout)
        except OSError as error:
            reason = f"could not accept SSL connection: {tls.explain(error)}"
            raise ConnectionError(reason) from None
        self._waits = False
        self._client.resume_reading()
        self.feed(b"")  # what came with the end of the handshake waits here

    def _check_tls(self) -> None:
        """Raises SQLError if client_tls_sslmode demands TLS, and there is none."""
        mode = self._services.runtime.config.client_tls_sslmode
        if mode in tls.REQUIRED and not (self._client.is_encrypted or is_local(self._client)):
            raise SQLError(
                INVALID_AUTHORIZATION_SPECIFICATION,
                "SSL required",
                detail=f"The proxy takes no unencrypted connections (client_tls_sslmode = {mode}).",
            )


def is_local(client: Connection) -> bool:
    """Whether it came by a Unix socket."""
    family = client.transport.get_extra_info("socket").family
    return bool(family == socket.AF_UNIX)


def may_send_password(client: Connection) -> bool:
    """Whether nobody else can read what it sends."""
    if client.is_encrypted or is_local(client):
        return True
    peer = client.transport.get_extra_info("peername")
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _unsupported(raw: bytes) -> SQLError:
    """A startup packet of another protocol, or a request that was answered already."""
    major, minor = int.from_bytes(raw[4:6], "big"), int.from_bytes(raw[6:8], "big")
    return SQLError(
        FEATURE_NOT_SUPPORTED,
        f"unsupported frontend protocol {major}.{minor}: server supports 3.0 to {_NEWEST}",
    )
