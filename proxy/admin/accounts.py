"""Accounts of the page of jobs: HTTP Basic authentication against the auth_file.

Invariant: guessing passwords is slow and does not reveal users: an unknown one takes as long as a
known one. A correct password is remembered, as a digest keyed by this process, as long as the file
has the same secret. `site` ensures that the connection keeps passwords to itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
from dataclasses import dataclass
from typing import Final

from protocol.auth import md5_secret
from protocol.scram import ScramSecret
from proxy.auth.rate_limit import RateLimiter
from proxy.auth.secret import MD5Secret, Secret
from proxy.log import Event, logger
from proxy.runtime import Runtime

_SCHEME: Final = "basic "

_MAX_REMEMBERED: Final = 100

_LONGEST: Final = 1000
"""Characters of a header that may contain a name and a password."""

_MAX_CONCURRENT: Final = 2
"""Concurrent checks; each costs milliseconds of a core."""


class TooManyError(Exception):
    """Too many wrong passwords have come from this address."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user who has logged in.

    Attributes:
        user: the name.
        may_cancel: whether it is in admin_users.
    """

    user: str
    may_cancel: bool


class Accounts:
    """Checks passwords."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._rate_limiter = RateLimiter(burst=10, rate=0.2)
        self._known: dict[bytes, None] = {}
        self._checking = asyncio.Semaphore(_MAX_CONCURRENT)

    async def log_in(self, header: str, runtime: Runtime, client_key: str) -> Account | None:
        """The account for an Authorization header; None if the password is wrong.

        Args:
            header: its value.
            runtime: has the users and the auth_file.
            client_key: identifies the client (`rate_limit.client_key`).

        Raises TooManyError without checking.
        """
        given = _basic(header)
        if given is None:
            return None
        user, password = given
        name = user.decode("utf-8", "replace")
        is_allowed = name in runtime.config.watchers
        secret = runtime.credentials.secret_in_file(user) if is_allowed else None
        digest = self._digest(user, password, secret)
        if not (secret is not None and digest in self._known):
            if self._rate_limiter.take(client_key, asyncio.get_running_loop().time()) is None:
                raise TooManyError
            async with self._checking:
                is_right = await asyncio.to_thread(_is_right, user, password, secret, runtime)
            if not (is_right and secret is not None):
                values = {"user": name[:100], "host": client_key}
                logger.warning(Event("admin login refused", values))
                return None
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[digest] = None
        return Account(name, name in runtime.config.admins)

    def token(self, account: Account) -> str:
        """The token that a request for changes must carry; pages of other sites cannot read it."""
        return hmac.digest(self._key, b"token\0" + account.user.encode(), "sha256").hex()

    def has_token(self, account: Account, token: str) -> bool:
        return hmac.compare_digest(self.token(account).encode(), token.encode())

    def _digest(self, user: bytes, password: bytes, secret: Secret | None) -> bytes:
        parts = (user, password, type(secret).__name__.encode(), _content(secret))
        data = b"".join(b"%d:%b" % (len(part), part) for part in parts)
        return hmac.digest(self._key, data, "sha256")


def _basic(header: str) -> tuple[bytes, bytes] | None:
    if header[: len(_SCHEME)].lower() != _SCHEME or len(header) > 2 * _LONGEST:
        return None
    try:
        decoded = base64.b64decode(header[len(_SCHEME) :].strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    user, colon, password = decoded.partition(b":")
    return (user, password) if colon and password and b"\0" not in decoded else None


def _content(secret: Secret | None) -> bytes:
    match secret:
        case None:
            return b""
        case ScramSecret():
            return secret.serialize()
        case MD5Secret(text):
            return text
        case _:
            return secret.password


def _is_right(user: bytes, password: bytes, secret: Secret | None, runtime: Runtime) -> bool:
    """Whether a password matches a secret; in any case a SCRAM key is derived."""
    check = runtime.checks.check(user, secret).secret
    derived = ScramSecret.from_password(password, salt=check.salt, iterations=check.iterations)
    is_scram = hmac.compare_digest(derived.stored_key, check.stored_key)
    if isinstance(secret, MD5Secret):
        return hmac.compare_digest(md5_secret(user, password), secret.text)
    return is_scram
