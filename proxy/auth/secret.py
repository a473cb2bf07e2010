"""A role's secret as known to the proxy: the password, or what the server stores for it.

Invariant: a secret is in no repr, error or log line. Secrets are bytes, as on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from protocol.auth import is_md5_secret
from protocol.scram import MECHANISM, ScramSecret


@dataclass(frozen=True, slots=True)
class Cleartext:
    """The password itself."""

    password: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MD5Secret:
    """``md5`` and 32 digits, as in pg_authid."""

    text: bytes = field(repr=False)


Secret: TypeAlias = Cleartext | MD5Secret | ScramSecret


def parse_secret(text: bytes) -> Secret:
    """Tells passwords and secrets apart as PostgreSQL does.

    Raises ValueError for a malformed SCRAM secret, which is a truncated one, not a password.
    """
    if text.startswith(MECHANISM + b"$"):
        return ScramSecret.parse(text)
    return MD5Secret(text) if is_md5_secret(text) else Cleartext(text)
