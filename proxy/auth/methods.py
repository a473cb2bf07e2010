"""Checks the server's authentication requests against libpq's ``require_auth``.

Invariant: every request of a login at the server goes through a `Guard`, whether the client answers
it, the proxy in the client's place, or the proxy for a side backend.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import INVALID_AUTHORIZATION_SPECIFICATION, SQLError
from protocol.messages import (
    AuthenticationCleartextPassword,
    AuthenticationGSS,
    AuthenticationGSSContinue,
    AuthenticationKerberosV5,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationRequest,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    AuthenticationSCMCredential,
    AuthenticationSSPI,
)
from protocol.scram import MECHANISM
from proxy.config.require_auth import METHODS, NONE, SCRAM, Policy

_NAMES: Final[dict[type[AuthenticationRequest], str]] = {
    AuthenticationCleartextPassword: "password",
    AuthenticationMD5Password: "md5",
    AuthenticationGSS: "gss",
    AuthenticationGSSContinue: "gss",
    AuthenticationSSPI: "sspi",
}

_WORDS: Final[dict[type[AuthenticationRequest], str]] = {
    AuthenticationOk: "nothing",
    AuthenticationCleartextPassword: "a cleartext password",
    AuthenticationGSS: "GSSAPI",
    AuthenticationGSSContinue: "GSSAPI",
    AuthenticationKerberosV5: "Kerberos V5",
    AuthenticationMD5Password: "an MD5 password",
    AuthenticationSASLContinue: "SASL",
    AuthenticationSASLFinal: "SASL",
    AuthenticationSCMCredential: "SCM credentials",
    AuthenticationSSPI: "SSPI",
}

PROVE_HINT: Final = "Set sslmode=verify-full and sslrootcert in upstream."
CLEARTEXT_HINT: Final = (
    f"{PROVE_HINT} Or, if no other machine can answer in its place, set require_auth=password."
)


class Guard:
    """Checks each request of one login before it is answered."""

    __slots__ = ("_asked", "_policy", "_proved")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._asked: str | None = None
        self._proved = False

    def check(self, request: AuthenticationRequest) -> None:
        """Raises SQLError, FATAL, for a request that require_auth does not allow."""
        required = self._policy.required
        match request:
            case AuthenticationOk():
                if required is not None and self._asked == SCRAM and not self._proved:
                    raise _failed("The server did not complete its SCRAM-SHA-256 conversation.")
                method = self._asked or NONE
            case AuthenticationSASLContinue():
                return
            case AuthenticationSASLFinal():
                self._proved = True
                return
            case _:
                method = self._asked = method_of(request)
        if required is not None and method not in required:
            allowed = ", ".join(name for name in METHODS if name in required)
            raise _failed(
                f"The server asks for {in_words(request)}; require_auth allows {allowed}."
            )


def _failed(detail: str) -> SQLError:
    return SQLError(
        INVALID_AUTHORIZATION_SPECIFICATION,
        "the server's authentication method is not allowed",
        detail=detail,
        hint="Let pg_hba.conf ask for a method that require_auth in the proxy's upstream allows.",
        severity="FATAL",
    )


def method_of(request: AuthenticationRequest) -> str:
    """A request's method, by libpq's name or, where libpq has none, another."""
    if isinstance(request, AuthenticationSASL):
        names = [name.removesuffix(b"-PLUS") for name in request.mechanisms]
        if MECHANISM in names:
            return SCRAM
        return "oauth" if b"OAUTHBEARER" in names else "sasl"
    return _NAMES.get(type(request), in_words(request))


def in_words(request: AuthenticationRequest) -> str:
    """A request's content, for people to read."""
    if isinstance(request, AuthenticationSASL):
        names = [name.decode("ascii", "replace") for name in request.mechanisms]
        return "SCRAM-SHA-256" if MECHANISM in request.mechanisms else f"SASL ({', '.join(names)})"
    return _WORDS[type(request)]
