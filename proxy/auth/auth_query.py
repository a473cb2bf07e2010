"""Secrets of roles, asked of the server itself: PgBouncer's ``auth_query`` and ``auth_user``.

The rule: what is found here is one more line of the auth_file, and lets nobody in. It is used to
check a client, and to log in once more as a role that the server has let in already. It is
remembered for `LIFETIME`, found or not, so that an old password is of no use for longer than that.
"""

from __future__ import annotations

import asyncio
from typing import Final

from protocol.errors import SQLError
from proxy.auth.credentials import Secret, parse_secret
from proxy.config import Config, Host
from proxy.jobs.backend import ServerError
from proxy.log import logger
from proxy.net import tls
from proxy.net.upstream import Dialer

LIFETIME: Final = 10.0
"""Seconds that an answer is remembered."""

_MAX_REMEMBERED: Final = 1000
_AT_A_TIME: Final = 4
"""Lookups at the same time: who may ask is anybody who has a role's name."""


class AuthQuery:
    """Asks for secrets as auth_user. Not for roles that the auth_file knows."""

    def __init__(self, config: Config, dialer: Dialer) -> None:
        self.enabled = bool(config.auth_user and config.auth_query)
        self._config = config
        self._dialer = dialer
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._remembered: dict[tuple[Host, bytes, bytes], tuple[float, Secret | None]] = {}

    async def secret(self, host: Host, database: bytes, user: bytes) -> Secret | None:
        """The role's secret; None if there is none, or if it could not be asked for (logged)."""
        if not self.enabled or user == self._config.auth_user.encode():
            return None
        database = self._config.auth_dbname.encode() or database
        key = host, database, user
        async with self._turns:
            now = asyncio.get_running_loop().time()
            until, secret = self._remembered.get(key, (0.0, None))
            if until <= now:
                secret = await self._ask_and_log(*key)
                self._remember(key, now, secret)
        return secret

    def _remember(self, key: tuple[Host, bytes, bytes], now: float, secret: Secret | None) -> None:
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered = {k: v for k, v in self._remembered.items() if v[0] > now}
        if len(self._remembered) < _MAX_REMEMBERED:
            self._remembered[key] = now + LIFETIME, secret

    async def _ask_and_log(self, host: Host, database: bytes, user: bytes) -> Secret | None:
        try:
            async with asyncio.timeout(self._config.connect_timeout or None):
                return await self._ask(host, database, user)
        except SQLError as error:
            reason = error.detail or error.message
        except OSError as error:
            reason = tls.explain(error) or "no answer in time"
        except (ServerError, ValueError) as error:
            reason = str(error)
        role = user.decode("utf-8", "replace")
        logger.warning('auth_query for role "%s" failed: %s', role, reason)
        return None

    async def _ask(self, host: Host, database: bytes, user: bytes) -> Secret | None:
        """Raises SQLError, OSError, ServerError; ValueError for an answer that is no secret."""
        backend = await self._dialer.login_as_auth_user(host, database)
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
