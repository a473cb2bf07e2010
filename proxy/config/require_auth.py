"""What a server may ask for in a login: libpq's ``require_auth``, and the policy that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.scram import MIN_ITERATIONS

SCRAM: Final = "scram-sha-256"
NONE: Final = "none"
METHODS: Final = ("password", "md5", "gss", "sspi", SCRAM, "oauth", NONE)
"""libpq's names; `NONE`: the server asks for nothing (trust, peer, cert)."""


def parse_require_auth(text: str) -> frozenset[str]:
    """Reads a list of allowed methods, or of forbidden ones, each with ``!``.

    Returns the allowed ones. Raises ValueError, like libpq, for unknown, repeated or mixed ones.
    """
    names = text.split(",")
    negative = [name.startswith("!") for name in names]
    methods = [name.removeprefix("!") for name in names]
    for name in methods:
        if name not in METHODS:
            raise ValueError(
                f'invalid require_auth value: "{name}" (allowed: {", ".join(METHODS)})'
            )
    if any(negative) and not all(negative):
        raise ValueError("require_auth: methods with and without ! cannot be mixed")
    if len(set(methods)) < len(methods):
        raise ValueError("require_auth: a method is given more than once")
    return frozenset(METHODS).difference(methods) if all(negative) else frozenset(methods)


@dataclass(frozen=True, slots=True)
class Policy:
    """What one server may ask for, and be sent.

    Attributes:
        required: the methods that require_auth allows; None for all.
        is_proven: whether the server's certificate is verified, or it is on this machine.
        sslmode: for errors.
    """

    required: frozenset[str] | None = None
    is_proven: bool = True
    sslmode: str = ""

    @property
    def min_iterations(self) -> int:
        """The minimum iteration count of SCRAM with a password. The server chooses the count, and a
        small one makes the password cheap to guess from our answer; so only a proven server may."""
        return 1 if self.is_proven else MIN_ITERATIONS

    def allows_cleartext(self, *, ours: bool) -> bool:
        """Whether a password may be sent in clear text. One of the proxy's own (`ours`) goes only
        to a proven server, unless require_auth is given."""
        return not ours or self.is_proven or self.required is not None

    @property
    def unproven(self) -> str:
        """Why the server's identity is not proven, for DETAIL."""
        return f"Nothing proves that it is the server: sslmode={self.sslmode} verifies nothing."


ANYTHING: Final = Policy()
