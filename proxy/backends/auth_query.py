"""Asks the server for the secrets of roles: PgBouncer's ``auth_query`` and ``auth_user``.

Invariant: a result is like a line of the auth_file; it lets no client in. It serves to check a
client, and to log in again as a role that the server has let in already. Found or not, it is
remembered for `LIFETIME` only, so that an old password stops working after that.

A lookup may be for a client that has not logged in, and anybody can name a role. So the client does
not decide where the query runs (`Config.lookup_database`), and lookups for the clients of one
address are limited, as are the log lines about them.
"""

from __future__ import annotations

import asyncio
from typing import Final

from protocol.errors import ServerError, SQLError
from proxy.auth.rate_limit import RateLimiter
from proxy.auth.secret import Secret, parse_secret
from proxy.backends.upstream import Dialer
from proxy.config import Config, Host
from proxy.log import logger
from proxy.reasons import explain

LIFETIME: Final = 10.0
"""Seconds for which an answer is remembered."""

_MAX_REMEMBERED: Final = 1000
_AT_A_TIME: Final = 4
"""Concurrent lookups; any client may cause one."""

BURST: Final = 20.0
RATE: Final = 5.0
MAX_WAITING: Final = 20.0
"""Limits of lookups for clients of one address that have not logged in: at once, per second, and
waiting. A role whose answer is remembered needs none."""

_SILENCE: Final = 60.0
"""Seconds before the log repeats itself."""


class AuthQuery:
    """Asks for secrets as auth_user, except for roles in the auth_file."""

    def __init__(self, config: Config, dialer: Dialer) -> None:
        self.enabled = bool(config.auth_user and config.auth_query)
        self._config = config
        self._dialer = dialer
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._remembered: dict[tuple[Host, bytes], tuple[float, Secret | None]] = {}
        self._rate_limiter = RateLimiter(BURST, RATE, MAX_WAITING)
        self._log_limiter = RateLimiter(1.0, 1 / _SILENCE)

    async def secret(self, host: Host, user: bytes, client_key: str | None = None) -> Secret | None:
        """The role's secret; None if it has none, or the lookup failed (logged).

        Args:
            host: the server.
            user: the role.
            client_key: identifies a client that has not logged in (`rate_limit.client_key`); None
                if it has.
        """
        if not self.enabled or user == self._config.auth_user.encode():
            return None
        key = host, user
        loop = asyncio.get_running_loop()
        if client_key is not None and not self._remembers(key, loop.time()):
            delay = self._rate_limiter.take(client_key, loop.time())
            if delay is None:
                self._warn(
                    client_key,
                    "too many logins from %s want auth_query: at most %g a second are looked up",
                    *(client_key, RATE),
                )
                return None
            await asyncio.sleep(delay)
        async with self._turns:
            now = loop.time()
            until, secret = self._remembered.get(key, (0.0, None))
            if until <= now:
                secret = await self._ask_and_log(*key)
                self._remember(key, now, secret)
        return secret

    def _remembers(self, key: tuple[Host, bytes], now: float) -> bool:
        return self._remembered.get(key, (0.0, None))[0] > now

    def _warn(self, what: str, text: str, *arguments: object) -> None:
        """Log this, unless it was logged in the last minute: strangers may cause it."""
        if self._log_limiter.take(what, asyncio.get_running_loop().time()) is not None:
            logger.warning(text + " (said once a minute)", *arguments)

    def _remember(self, key: tuple[Host, bytes], now: float, secret: Secret | None) -> None:
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered = {k: v for k, v in self._remembered.items() if v[0] > now}
        if len(self._remembered) < _MAX_REMEMBERED:
            self._remembered[key] = now + LIFETIME, secret

    async def _ask_and_log(self, host: Host, user: bytes) -> Secret | None:
        try:
            async with asyncio.timeout(self._config.connect_timeout or None):
                return await self._ask(host, user)
        except (ServerError, ValueError) as error:
            reason = explain(error)
        except SQLError as error:
            reason = error.detail or error.message
        except OSError as error:
            reason = explain(error)
        role = user.decode("utf-8", "replace")
        self._warn(reason, 'auth_query for role "%s" failed: %s', role, reason)
        return None

    async def _ask(self, host: Host, user: bytes) -> Secret | None:
        """Raises SQLError, OSError, ServerError; ValueError for a malformed secret."""
        backend = await self._dialer.login_as_auth_user(host)
        try:
            row = await backend.query(self._config.auth_query.encode(), user)
        finally:
            backend.terminate()
        if not row:
            return None
        if len(row) < 2:
            raise ValueError("it must return two columns, the role and its secret")
        try:
            return None if not row[1] else parse_secret(row[1])
        except ValueError:
            raise ValueError("it returned a malformed SCRAM-SHA-256 secret") from None
