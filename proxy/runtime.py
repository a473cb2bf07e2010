"""The live objects made of a configuration: what is read from files, and derived from it.

Invariant: a `Runtime` is complete or an error. It is made before anything is served, and again at
each reload: the server replaces the old one at once, or keeps it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from proxy import private
from proxy.auth import password_command
from proxy.auth.checks import Check, Checks
from proxy.auth.credentials import Credentials, CredentialStore
from proxy.auth.observer import LoginObserver
from proxy.auth.password_command import PasswordCommand
from proxy.backends.auth_query import AuthQuery
from proxy.backends.route import Route
from proxy.backends.upstream import Dialer
from proxy.config import Config, ConfigError, check_together
from proxy.config.keepalive import Keepalive
from proxy.config.require_auth import SCRAM
from proxy.log import logger
from proxy.net import tls
from proxy.net.service_manager import ServiceManager
from proxy.reasons import explain

T = TypeVar("T")

LAST_WORDS: Final = 2.0
"""Seconds for connections to send the rest when the time to shut down is over."""

_FIRST_LOOK: Final = 1.0
"""Seconds that startup waits for a server that is not required."""

_SHORTEST_SECRET: Final = 32
"""Bytes of the replicas' secret."""

_LOOK_INTERVAL: Final = 0.2
_LOOK_MAX_INTERVAL: Final = 5.0
"""Seconds before looking for the server again: at first, and at most."""

FIXED: Final = (
    *("listen", "admin_listen", "takeover", "workers", "replica_secret_file"),
    *("tcp_keepalive", "tcp_keepidle", "tcp_keepintvl", "tcp_keepcnt", "tcp_user_timeout"),
)
"""Settings that a reload cannot change: of listening sockets, and of the processes."""


class Runtime:
    """A usable configuration.

    Raises:
        ConfigError: from the constructor, for an invalid file.
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
            self.credentials.secrets_of_files(),
        )
        self.auth_query = AuthQuery(config, self.dialer)
        self.password_command = PasswordCommand(config)
        self.replica_secret = _replica_secret(config.replica_secret_file)

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
        if login.method is not None and self.password_command.enabled:
            password = await self.password_command.password(route.host, database, user)
            return dataclasses.replace(
                found, password=password, is_ours=True, source=password_command.SOURCE
            )
        asked = login.method is not None and self.auth_query.enabled
        if asked and found.password is None and found.secret is None:
            queried = await self.auth_query.secret(route.host, user)
            found = find(queried=queried, has_auth_query=True)
        return found

    async def check_of(
        self, route: Route, database: bytes, user: bytes, client_key: str
    ) -> Check | None:
        """How to check a client that claims to be a role; None if the proxy has no secrets.

        Args:
            route: to the session's server.
            database: that the client wants, for the passfile.
            user: the role.
            client_key: identifies the client (`rate_limit.client_key`).
        """
        if not (self.credentials.has_files or self.auth_query.enabled):
            return None
        host = route.host
        found = self.credentials.secret(host, database, user)
        found = found or await self.auth_query.secret(host, user, client_key)
        return self.checks.check(user, found)

    async def check(self) -> Route:
        """Check that there is a server, and log which. Raises OSError."""
        try:
            route = await self.dialer.check()
        except OSError as error:
            reason = explain(error)
            raise OSError(f"cannot reach the server {self.config.upstream}: {reason}") from None
        logger.info("passing on to %s%s", route, " (TLS)" if route.encrypted else "")
        self._warn_of_unverified_servers()
        return route

    def _warn_of_unverified_servers(self) -> None:
        """Warn if the proxy's secrets might be sent to an unverified server."""
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


def _replica_secret(path: Path | None) -> bytes | None:
    """The secret that all replicas share. Raises ConfigError."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            if private.is_exposed(os.fstat(file.fileno())):
                raise ConfigError(f"replica_secret_file: {private.exposed(path)}")
            secret = file.read().strip()
    except OSError as error:
        raise ConfigError(f"replica_secret_file: cannot read {path}: {explain(error)}") from None
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"replica_secret_file: {path} has {len(secret)} bytes, and needs {_SHORTEST_SECRET};"
            f" openssl rand -base64 48 > {path} makes a secret"
        )
    return secret


async def find_server(
    runtime: Callable[[], Runtime], manager: ServiceManager
) -> asyncio.Task[None] | None:
    """Check that there is a server. If none is required yet, keep looking in the task returned.

    Args:
        runtime: has its address; a reload replaces it.
        manager: the service manager, to be informed.

    Raises OSError: there is no server, but one is required.
    """
    looking = asyncio.ensure_future(runtime().check())
    if not runtime().config.server_required:
        await asyncio.wait([looking], timeout=_FIRST_LOOK)
        if not looking.done() or isinstance(looking.exception(), OSError):
            again = _look_again(runtime, manager, looking)
            return asyncio.get_running_loop().create_task(again)
    manager.status(f"Passing on to {await looking}")
    return None


async def _look_again(
    runtime: Callable[[], Runtime], manager: ServiceManager, looking: asyncio.Future[Route]
) -> None:
    """Look until there is a server; each new reason for failure is logged."""
    delay, said = _LOOK_INTERVAL, ""
    manager.status("Looking for the server")
    while True:
        try:
            manager.status(f"Passing on to {await looking}")
            return
        except OSError as error:
            if str(error) != said:
                said = str(error)
                logger.warning("%s; clients are refused until it is there", error)
                manager.status(f"Looking for the server: {error}")
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LOOK_MAX_INTERVAL)
        looking = asyncio.ensure_future(runtime().check())


def client_keepalive(config: Config) -> Keepalive:
    """What listening sockets pass on to connections."""
    return Keepalive(
        bool(config.tcp_keepalive),
        config.tcp_keepidle,
        config.tcp_keepintvl,
        config.tcp_keepcnt,
        config.tcp_user_timeout,
    )


def reloaded(old: Config, new: Config) -> tuple[Config, list[str]]:
    """What a reload makes of a new configuration, and the settings that it cannot change, as they
    belong to the listening sockets.

    Raises ConfigError: old and new settings are incompatible.
    """
    fixed = [name for name in FIXED if getattr(new, name) != getattr(old, name)]
    # How connections are accepted depends on whether there is TLS.
    if "disable" in (new.client_tls_sslmode, old.client_tls_sslmode) and (
        new.client_tls_sslmode != old.client_tls_sslmode
    ):
        fixed.append("client_tls_sslmode")
    config = dataclasses.replace(new, **{name: getattr(old, name) for name in fixed})
    check_together(config)
    return config, fixed


class Reloaded(NamedTuple):
    """The outcome of a reload.

    Attributes:
        error: why the configuration was not changed; None if it was.
        fixed: the settings that need a restart.
    """

    error: str | None
    fixed: list[str]


def reload(
    manager: ServiceManager, read_again: Callable[[], T], take_over: Callable[[T], list[str]]
) -> Reloaded:
    """Handles SIGHUP: read the configuration again, or keep it. Logged.

    Args:
        manager: the service manager, to be informed.
        read_again: reads it; raises ConfigError.
        take_over: applies it; returns what it could not change; raises ConfigError.
    """
    manager.reloading()
    try:
        fixed = take_over(read_again())
    except ConfigError as error:
        logger.error("the configuration stays as it was: %s", error)
        return Reloaded(str(error), [])
    finally:
        manager.reloaded()
    for name in fixed:
        logger.warning("%s cannot be changed without restarting the proxy", name)
    logger.info("the configuration was read again")
    return Reloaded(None, fixed)
