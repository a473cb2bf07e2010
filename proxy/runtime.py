"""The objects made of a configuration: what is read from files, and what is derived from it.

Invariant: a `Runtime` is whole or an error. It is made before anything is served, and again with
each reload: the server replaces the old one by the new one at once, or keeps the old one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Final, TypeVar

from proxy.auth.checks import Check, Checks
from proxy.auth.credentials import Credentials, CredentialStore
from proxy.auth.observer import LoginObserver
from proxy.backends.auth_query import AuthQuery
from proxy.backends.route import Route
from proxy.backends.upstream import Dialer
from proxy.config import Config, ConfigError, check_together
from proxy.config.gucs import DEFAULT_QUEUE_SIZE, MAX_WORKERS, WORKER_TIMEOUT
from proxy.config.keepalive import Keepalive
from proxy.config.require_auth import SCRAM
from proxy.log import logger
from proxy.net import tls

T = TypeVar("T")

LAST_WORDS: Final = 2.0
"""Seconds that connections get to send what is left when the time to shut down is over."""

_FIXED: Final = (
    *("listen", "workers"),
    *("tcp_keepalive", "tcp_keepidle", "tcp_keepintvl", "tcp_keepcnt", "tcp_user_timeout"),
)
"""Settings that belong to the listening sockets, or to who serves them."""


class Runtime:
    """A configuration that can be used.

    Raises:
        ConfigError: from the constructor, for a file that is not what it should be.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        try:
            self.credentials = CredentialStore(config.passfile, config.auth_file)
        except ValueError as error:
            raise ConfigError(f"auth_file: {error}") from None
        self.tls = tls.client_context(config)
        self.dialer = Dialer(config, self.credentials)
        self.checks = Checks(
            config.client_tls_key_file if self.tls is not None else None,
            self.credentials.secrets_of_file(),
        )
        self.auth_query = AuthQuery(config, self.dialer)
        self.own_settings = {
            MAX_WORKERS.name: str(config.max_workers),
            DEFAULT_QUEUE_SIZE.name: config.default_queue_size,
            WORKER_TIMEOUT.name: config.worker_timeout,
        }

    async def credentials_of(
        self, route: Route, database: bytes, user: bytes, login: LoginObserver
    ) -> Credentials:
        """What a role can log in with again, once the server has accepted its login."""
        find = functools.partial(
            self.credentials.credentials,
            *(route.host, database, user, login),
            policy=self.config.upstream.policy(route.host),
        )
        found = find()
        asked = login.method is not None and self.auth_query.enabled
        if asked and found.password is None and found.secret is None:
            queried = await self.auth_query.secret(route.host, user)
            found = find(queried=queried, has_auth_query=True)
        return found

    async def check_of(
        self, route: Route, database: bytes, user: bytes, stranger: str
    ) -> Check | None:
        """What to check a client with that claims to be a role; None if the proxy has no secrets.

        Args:
            route: to the session's server.
            database: that the client wants; the passfile may ask for it.
            user: the role.
            stranger: whose connection it is (`pace.who`).
        """
        if not (self.credentials.has_files or self.auth_query.enabled):
            return None
        host = route.host
        found = self.credentials.secret(host, database, user)
        found = found or await self.auth_query.secret(host, user, stranger)
        return self.checks.check(user, found)

    async def check(self) -> Route:
        """See whether there is a server, and log which. Raises OSError."""
        try:
            route = await self.dialer.check()
        except OSError as error:
            raise OSError(f"cannot reach the server {self.config.upstream}: {error}") from None
        logger.info("passing on to %s%s", route, " (TLS)" if route.encrypted else "")
        self._warn_of_strangers()
        return route

    def _warn_of_strangers(self) -> None:
        """Warn if an unverified server can be sent the proxy's secrets."""
        config = self.config
        names = ("passfile", "auth_file", "auth_user")
        secrets = [name for name in names if getattr(config, name)]
        unproven = [host for host in config.upstream.hosts if not config.upstream.proves(host)]
        if secrets and unproven and config.upstream.require_auth != frozenset({SCRAM}):
            logger.warning(
                "nothing proves that %s is the server, and the proxy logs in there with what it has"
                " in %s (sslmode=%s verifies nothing): set sslmode=verify-full and sslrootcert in"
                " upstream, or require_auth=scram-sha-256",
                *(",".join(map(str, unproven)), ", ".join(secrets), config.upstream.sslmode),
            )


def client_keepalive(config: Config) -> Keepalive:
    """What listening sockets hand down to connections."""
    return Keepalive(
        bool(config.tcp_keepalive),
        config.tcp_keepidle,
        config.tcp_keepintvl,
        config.tcp_keepcnt,
        config.tcp_user_timeout,
    )


def reloaded(old: Config, new: Config) -> tuple[Config, list[str]]:
    """What a reload makes of a new configuration, and the settings that it wanted to change in
    vain: those hold as long as the listening sockets do.

    Raises ConfigError: these and the new ones do not go together.
    """
    fixed = [name for name in _FIXED if getattr(new, name) != getattr(old, name)]
    # How connections are accepted depends on whether there is TLS at all.
    if "disable" in (new.client_tls_sslmode, old.client_tls_sslmode) and (
        new.client_tls_sslmode != old.client_tls_sslmode
    ):
        fixed.append("client_tls_sslmode")
    config = dataclasses.replace(new, **{name: getattr(old, name) for name in fixed})
    check_together(config)
    return config, fixed


def reload(read_again: Callable[[], T], take_over: Callable[[T], list[str]]) -> None:
    """What SIGHUP asks for: the configuration is read again, or stays as it is. Logged.

    Args:
        read_again: reads it; raises ConfigError.
        take_over: makes it hold; returns what it could not change; raises ConfigError.
    """
    try:
        fixed = take_over(read_again())
    except ConfigError as error:
        logger.error("the configuration stays as it was: %s", error)
        return
    for name in fixed:
        logger.warning("%s cannot be changed without restarting the proxy", name)
    logger.info("the configuration was read again")
