"""What a server may ask for before it has proved who it is: libpq's ``require_auth``.

The invariant: every request of a login at the server goes through a `Guard`, whoever answers it:
the client itself, the proxy in the client's place, or the proxy for a job or a question of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from protocol.scram import MECHANISM, MIN_ITERATIONS

SCRAM: Final = "scram-sha-256"
NONE: Final = "none"
METHODS: Final = ("password", "md5", "gss", "sspi", SCRAM, "oauth", NONE)
"""libpq's names; `NONE` is a server that lets in without asking (trust, peer, cert)."""

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


def parse_require_auth(text: str) -> frozenset[str]:
    """Reads a list of methods, or of methods with ``!`` before them, which are those not allowed.

    Returns those that are. Raises ValueError, as libpq refuses: an unknown method, one that comes
    twice, or both kinds in one list.
    """
    names = text.split(",")
    negative = [name.startswith("!") for name in names]
    methods = [name.removeprefix("!") for name in names]
    for name in methods:
        if name not in METHODS:
            raise ValueError(f'require_auth: "{name}" is none of {", ".join(METHODS)}')
    if any(negative) and not all(negative):
        raise ValueError("require_auth: methods with and without ! cannot be mixed")
    if len(set(methods)) < len(methods):
        raise ValueError("require_auth: a method is given more than once")
    return frozenset(METHODS).difference(methods) if all(negative) else frozenset(methods)


@dataclass(frozen=True, slots=True)
class Policy:
    """What one server may have.

    Attributes:
        required: what require_auth allows; None if it is not given.
        is_proven: nobody else can be in the server's place: its certificate is verified, or it is
            on this machine.
        sslmode: for errors.
    """

    required: frozenset[str] | None = None
    is_proven: bool = True
    sslmode: str = ""

    @property
    def min_iterations(self) -> int:
        """Of SCRAM, for a password. With fewer it is cheaper to guess from our answer, and it is a
        server that chooses: few are taken from one that is proven alone."""
        return 1 if self.is_proven else MIN_ITERATIONS

    def allows_cleartext(self, *, ours: bool) -> bool:
        """Whether a password goes out in clear: one of the proxy's own files goes only to a server
        that is proven, unless require_auth says that passwords do."""
        return not ours or self.is_proven or self.required is not None

    @property
    def unproven(self) -> str:
        """Why the server is not, as an error's DETAIL says it."""
        return f"Nothing proves that it is the server: sslmode={self.sslmode} verifies nothing."


ANYTHING: Final = Policy()

PROVE_HINT: Final = "Set sslmode=verify-full and sslrootcert in upstream."
CLEARTEXT_HINT: Final = (
    f"{PROVE_HINT} Or, if nobody else can answer in its place, set require_auth=password there."
)


class Guard:
    """Sees each request of one login before it is answered."""

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
    """A request's method by libpq's name; another name for what libpq has none of."""
    if isinstance(request, AuthenticationSASL):
        names = [name.removesuffix(b"-PLUS") for name in request.mechanisms]
        if MECHANISM in names:
            return SCRAM
        return "oauth" if b"OAUTHBEARER" in names else "sasl"
    return _NAMES.get(type(request), in_words(request))


def in_words(request: AuthenticationRequest) -> str:
    """What a request asks for."""
    if isinstance(request, AuthenticationSASL):
        names = [name.decode("ascii", "replace") for name in request.mechanisms]
        return "SCRAM-SHA-256" if MECHANISM in request.mechanisms else f"SASL ({', '.join(names)})"
    return _WORDS[type(request)]
