"""What a client sends up to its StartupMessage: requests for encryption, or a cancel request.

Invariant: each request for encryption is answered once, and nothing that came unencrypted is read
as if it had been encrypted.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Coroutine

from protocol.errors import (
    INVALID_AUTHORIZATION_SPECIFICATION,
    PROTOCOL_VIOLATION,
    ProtocolViolation,
    SQLError,
)
from protocol.startup import (
    CancelRequest,
    GSSENCRequest,
    RefusedStartup,
    SSLRequest,
    StartupMessage,
    StartupPacket,
    parse_startup_packet,
    startup_packet_length,
)
from proxy.net import tls
from proxy.net.connection import Connection
from proxy.reasons import explain
from proxy.session.services import Services


class StartupPackets:
    """The startup packets of one client.

    Attributes:
        rest: bytes behind the last packet.
    """

    def __init__(
        self,
        services: Services,
        client: Connection,
        accept: Callable[[StartupMessage | CancelRequest | RefusedStartup, bytes], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        """
        Args:
            services: has the certificate, and says whether TLS is required.
            client: its connection.
            accept: takes what the client wants, as a packet and as its bytes. Before a login,
                reading stops until its connection is told to continue; before a refusal, for good.
            spawn: runs the handshake, and ends the session on an error.
        """
        self.rest = bytearray()
        self._services = services
        self._client = client
        self._accept = accept
        self._spawn = spawn
        self._waits = False  # for the end of a handshake, or for ever
        self._tls_asked = False
        self._gss_asked = False

    def feed(self, data: bytes) -> None:
        """Add what the client has sent.

        Raises SQLError; ProtocolViolation: close without an answer.
        """
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
                _end_of("GSSAPI encryption request", self.rest)
            case CancelRequest():
                self._waits = True
                self._accept(packet, raw)
            case StartupMessage():
                self._check_tls()
                self._hand_on(packet, raw)
            case RefusedStartup():
                self._hand_on(packet, raw)
            case SSLRequest() | GSSENCRequest():
                # Answered before: a server now takes it for a protocol version.
                self._hand_on(RefusedStartup(packet.code), raw)

    def _hand_on(self, packet: StartupMessage | RefusedStartup, raw: bytes) -> None:
        self._client.pause_reading()
        self._waits = True
        self._accept(packet, raw)

    def _direct_tls(self) -> None:
        """TLS from the first byte on, for which both sides must name the protocol (ALPN)."""
        self._tls_asked = True
        if not tls.speaks_postgresql(self._client.transport):
            raise ProtocolViolation(
                "received direct SSL connection request without ALPN protocol negotiation extension"
            )

    def _answer_ssl_request(self) -> None:
        context = self._services.runtime.tls
        if context is None or self._client.peer.is_local:
            self._client.write(b"N")
            _end_of("SSL request", self.rest)
        else:
            self._client.write(b"S")
            self._client.pause_reading()
            self._waits = self._gss_asked = True
            self._spawn(self._start_tls(context, bytes(self.rest)))

    async def _start_tls(self, context: ssl.SSLContext, behind: bytes) -> None:
        """`behind`: what came behind the request, unencrypted."""
        timeout = self._services.runtime.config.client_login_timeout
        try:
            await self._client.start_tls(context, timeout)
        except OSError as error:
            reason = f"could not accept SSL connection: {explain(error)}"
            raise ConnectionError(reason) from None
        _end_of("SSL request", behind)
        self._waits = False
        self._client.resume_reading()
        self.feed(b"")  # what came with the end of the handshake

    def _check_tls(self) -> None:
        """Raises SQLError if client_tls_sslmode requires TLS and there is none."""
        mode = self._services.runtime.config.client_tls_sslmode
        if mode in tls.REQUIRED and not (self._client.is_encrypted or self._client.peer.is_local):
            raise SQLError(
                INVALID_AUTHORIZATION_SPECIFICATION,
                "SSL required",
                detail=f"The proxy takes no unencrypted connections (client_tls_sslmode = {mode}).",
            )


def may_send_password(client: Connection) -> bool:
    """Whether nobody else can read what the client sends."""
    return client.is_encrypted or client.peer.is_on_this_machine


def _end_of(request: str, rest: bytes | bytearray) -> None:
    """Raises SQLError if something follows the request."""
    if rest:
        raise SQLError(
            PROTOCOL_VIOLATION,
            f"received unencrypted data after {request}",
            detail="This could be either a client-software bug or evidence of an attempted"
            " man-in-the-middle attack.",
        )
