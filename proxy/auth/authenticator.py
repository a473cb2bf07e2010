"""Answers the server's authentication requests in one of the proxy's own logins.

Invariant: a SCRAM exchange that has begun is completed, in order, so a server that does not know
the role's secret cannot skip its proof.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import INVALID_AUTHORIZATION_SPECIFICATION, ProtocolViolation, SQLError
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
)
from protocol.scram import MECHANISM, ScramClient
from proxy.auth.credentials import Credentials
from proxy.auth.methods import CLEARTEXT_HINT, PROVE_HINT, Guard, in_words

_HINT: Final = "Give the proxy the role's password in its passfile or auth_file, or set auth_query."
_HINT_MD5: Final = f"{_HINT} In the auth_file, the MD5 secret from pg_authid is enough."
_HINT_SCRAM: Final = (
    f"{_HINT} In the auth_file, the SCRAM secret from pg_authid is enough for clients that log in"
    " through the proxy by SCRAM."
)
_HINT_HBA: Final = (
    "Let pg_hba.conf ask for scram-sha-256 or another password method where the proxy connects."
)


class Authenticator:
    """Answers the authentication requests of one login with given credentials."""

    __slots__ = ("_credentials", "_expected", "_guard", "_scram")

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._guard = Guard(credentials.policy)
        self._scram: ScramClient | None = None
        # The only request allowed next within a SCRAM exchange.
        self._expected: type[AuthenticationRequest] | None = None

    def respond(self, request: AuthenticationRequest) -> bytes | None:
        """The message to send; None if the request needs no answer.

        Raises:
            SQLError: 28000. There is nothing to log in with; the server asks for what the proxy
                cannot do or must not send; or it does not prove that it knows the SCRAM secret.
        """
        if self._expected is not None and not isinstance(request, self._expected):
            raise self._failed("The server broke off its SCRAM-SHA-256 conversation.")
        self._guard.check(request)
        match request:
            case AuthenticationOk():
                return None
            case AuthenticationCleartextPassword():
                return self._password_message(self._cleartext(), request, _HINT)
            case AuthenticationMD5Password(salt):
                response = self._credentials.md5_response(salt)
                return self._password_message(response, request, _HINT_MD5)
            case AuthenticationSASL(mechanisms) if MECHANISM in mechanisms:
                return self._client_first(request)
            case AuthenticationSASLContinue(server_first) if self._scram is not None:
                return self._client_final(self._scram, server_first)
            case AuthenticationSASLFinal(server_final) if self._scram is not None:
                self._server_final(self._scram, server_final)
                return None
        raise self._failed(
            f"The server asks for {in_words(request)}, which the proxy cannot do for a client.",
            hint=_HINT_HBA,
        )

    def _cleartext(self) -> bytes | None:
        credentials, policy = self._credentials, self._credentials.policy
        if credentials.password is not None and not policy.allows_cleartext(
            ours=credentials.is_ours
        ):
            raise self._failed(
                f"The server asks for a cleartext password. {policy.unproven}", hint=CLEARTEXT_HINT
            )
        return credentials.password

    def _password_message(
        self, password: bytes | None, request: AuthenticationRequest, hint: str
    ) -> bytes:
        if password is None:
            raise self._no_password(request, hint)
        return PasswordMessage(password).serialize()

    def _client_first(self, request: AuthenticationSASL) -> bytes:
        self._scram = self._credentials.scram_client()
        if self._scram is None:
            raise self._no_password(request, _HINT_SCRAM)
        self._expected = AuthenticationSASLContinue
        return SASLInitialResponse(MECHANISM, self._scram.first_message()).serialize()

    def _client_final(self, scram: ScramClient, server_first: bytes) -> bytes:
        try:
            client_final = scram.final_message(server_first)
        except ProtocolViolation as violation:
            hint = None if self._credentials.policy.is_proven else PROVE_HINT
            raise self._failed(f"SCRAM-SHA-256: {violation}.", hint=hint) from None
        self._expected = AuthenticationSASLFinal
        return SASLResponse(client_final).serialize()

    def _server_final(self, scram: ScramClient, server_final: bytes) -> None:
        try:
            scram.verify(server_final)
        except ProtocolViolation as violation:
            raise self._failed(f"SCRAM-SHA-256: {violation}.") from None
        self._expected = AuthenticationOk

    def _no_password(self, request: AuthenticationRequest, hint: str) -> SQLError:
        return SQLError(
            INVALID_AUTHORIZATION_SPECIFICATION,
            f'no password for role "{self._role}"{self._credentials.purpose}',
            detail=f"The server asks for {in_words(request)}. {self._credentials.searched()}",
            hint=hint,
        )

    def _failed(self, detail: str, *, hint: str | None = None) -> SQLError:
        purpose = self._credentials.purpose.removesuffix(" with")
        return SQLError(
            INVALID_AUTHORIZATION_SPECIFICATION,
            f'could not log in as role "{self._role}"{purpose}',
            detail=detail,
            hint=hint,
        )

    @property
    def _role(self) -> str:
        return self._credentials.user.decode("utf-8", "replace")
