"""Observes a client's login as it passes, and keeps what can be used to log in again.

Invariant: nothing is known before the server has accepted the login, and a secret is in no repr.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.errors import ProtocolViolation
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from protocol.scram import MECHANISM, ClientFinal, ClientFirst, ScramSecret, client_key_from_proof
from proxy.auth.methods import in_words


@dataclass(frozen=True, slots=True)
class ScramLogin:
    """The content of a SCRAM login (`client_key_from_proof`)."""

    auth_message: bytes = field(repr=False)
    proof: bytes = field(repr=False)

    def client_key(self, secret: ScramSecret) -> bytes | None:
        """The ClientKey; None if the login used another secret."""
        return client_key_from_proof(secret.stored_key, self.auth_message, self.proof)


class LoginObserver:
    """Watches a client's login pass through the proxy, and keeps what can be used again.

    The server judges the login. Malformed or misplaced messages are no errors here; they only make
    the observer forget what it has seen.

    Attributes:
        accepted: whether AuthenticationOk was seen.
        method: what the server asked the client for, as worded in an error's DETAIL; None if it
            asked for nothing (trust, peer, cert).
    """

    def __init__(self) -> None:
        self.accepted = False
        self.method: str | None = None
        self._on_response: Callable[[bytes], None] | None = None
        self._password: bytes | None = None
        self._client_first_bare = b""
        self._server_first = b""
        self._scram: ScramLogin | None = None

    @classmethod
    def of_code(cls) -> LoginObserver:
        """For a role that no client has logged in as, but as which SQL in a session runs.

        The SQL must prove that before this is used (`proxy.extension.in_database`).
        """
        observer = cls()
        observer.accepted = True
        observer.method = "the password of another role"
        return observer

    def __repr__(self) -> str:
        return f"<LoginObserver accepted={self.accepted} method={self.method!r}>"

    @property
    def password(self) -> bytes | None:
        """The cleartext password that the client was let in with, if it sent one."""
        return self._password if self.accepted else None

    @property
    def scram(self) -> ScramLogin | None:
        """The SCRAM-SHA-256 (or -PLUS) login that the client was let in with, if any."""
        return self._scram if self.accepted else None

    def backend_message(self, type: int, body: bytes) -> None:
        """See a message of the server; type ``R`` matters, up to AuthenticationOk."""
        if self.accepted or type != AuthenticationOk.type:
            return
        try:
            request = parse_authentication(body)
        except ProtocolViolation:
            self._forget()
            return
        match request:
            case AuthenticationOk():
                self.accepted = True
            case AuthenticationSASLContinue(server_first) if self._client_first_bare:
                self._server_first = server_first
                self._on_response = self._client_final
            case AuthenticationSASLFinal() if self._scram:
                pass
            case _:
                self._begin(request)

    def frontend_message(self, body: bytes) -> None:
        """See a message of type ``p``: the client's answer to the server's last request."""
        if self.accepted:
            return
        on_response, self._on_response = self._on_response, None
        if on_response is None:  # not asked for, or useless to us
            self._forget()
            return
        try:
            on_response(body)
        except ProtocolViolation:
            self._forget()

    def _begin(self, request: AuthenticationRequest) -> None:
        self._forget()
        self.method = in_words(request)
        if isinstance(request, AuthenticationCleartextPassword):
            self._on_response = self._cleartext
        elif isinstance(request, AuthenticationSASL):
            self._on_response = self._client_first

    def _forget(self) -> None:
        self._on_response = None
        self._password = None
        self._client_first_bare = b""
        self._server_first = b""
        self._scram = None

    def _cleartext(self, body: bytes) -> None:
        self._password = PasswordMessage.parse(body).password

    def _client_first(self, body: bytes) -> None:
        initial = SASLInitialResponse.parse(body)
        if initial.mechanism in (MECHANISM, MECHANISM + b"-PLUS"):
            self._client_first_bare = ClientFirst.parse(initial.response or b"").bare

    def _client_final(self, body: bytes) -> None:
        final = ClientFinal.parse(SASLResponse.parse(body).response)
        said = (self._client_first_bare, self._server_first, final.without_proof)
        self._scram = ScramLogin(b",".join(said), final.proof)
