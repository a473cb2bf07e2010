"""The way to the server: which host, and which kind of connection.

Invariant: every connection to the server is opened here, so all go the same way: a session's own,
side backends, cancel requests, checks of hosts. A `Route` records it for those that must follow.
Terms and semantics are libpq's (manual, "Parameter Key Words"). Two things differ because the login
is the client's: target_session_attrs is checked as ``auth_user``, and remembered for a while; and a
second attempt by ``sslmode`` is left to the session, which alone sees the server refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final, TypeVar, cast

from protocol.errors import (
    INVALID_AUTHORIZATION_SPECIFICATION,
    ProtocolViolation,
    ServerError,
    SQLError,
)
from protocol.startup import CancelRequest, SSLRequest, StartupMessage
from proxy.auth.credentials import CredentialStore
from proxy.auth.rate_limit import RateLimiter
from proxy.backends.backend import Backend, open_backend, send_cancel
from proxy.backends.route import Route
from proxy.config import Config, Host
from proxy.log import logger
from proxy.net import tls
from proxy.net.descriptors import OutOfDescriptorsError, is_shortage, report
from proxy.reasons import cause, explain
from proxy.stats import counters

P = TypeVar("P", bound=asyncio.BaseProtocol)

STATE_LIFETIME: Final = 5.0
"""Seconds for which a host's state is remembered."""

APPLICATION_NAME: Final = b"pg-background-proxy"
"""The proxy's own connections in pg_stat_activity."""

_STATE_QUERY: Final = (
    b"SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')"
)


@dataclass(frozen=True, slots=True)
class HostState:
    """What decides whether a host matches target_session_attrs."""

    in_recovery: bool
    read_only: bool

    def has(self, attrs: str) -> bool:
        """Whether a session there would match this target_session_attrs."""
        return {
            "any": True,
            "read-write": not (self.in_recovery or self.read_only),
            "read-only": self.in_recovery or self.read_only,
            "primary": not self.in_recovery,
            "standby": self.in_recovery,
        }[attrs]


class HandshakeError(ConnectionError):
    """The server has TLS, but the handshake failed."""


class Dialer:
    """Opens connections to the hosts of the upstream.

    Raises:
        ConfigError: from the constructor, for a certificate or key that cannot be used.
    """

    def __init__(self, config: Config, credentials: CredentialStore) -> None:
        self._config = config
        self._upstream = config.upstream
        self._credentials = credentials
        self._context = tls.server_context(config.upstream)
        self._states: dict[Host, tuple[float, HostState]] = {}
        self._looking: defaultdict[Host, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._log_limiter = RateLimiter(burst=10, rate=0.2)

    async def connect(
        self, factory: Callable[[], P], skip: Collection[Host] = (), route: Route | None = None
    ) -> tuple[Route, P]:
        """Connect to the first host that accepts and matches target_session_attrs.

        Args:
            factory: makes the protocol.
            skip: hosts not to be tried.
            route: the way to go, if already decided.

        Raises OSError if no host does; the message has each reason.
        """
        if route is not None:
            return route, await self.connect_by(route, factory)
        wanted = self._upstream.target_session_attrs
        failures: dict[str, None] = {}
        for attrs in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
            for host in self._upstream.hosts:
                if host in skip:
                    continue
                try:
                    if attrs != "any" and not (await self._state(host)).has(attrs):
                        failures[f"{host}: session is not {attrs}"] = None
                        continue
                    return await self._connect_host(host, factory)
                except OutOfDescriptorsError:
                    raise
                except (OSError, SQLError) as error:
                    self._states.pop(host, None)
                    failures[f"{host}: {cause(error)}"] = None
        raise ConnectionError("; ".join(failures))

    async def connect_by(self, route: Route, factory: Callable[[], P]) -> P:
        """Connect again by the same route. Raises OSError."""
        async with _counted(), self._in_time(route.host):
            if route.encrypted:
                return (await self._encrypted(route.host, factory, optional=False))[1]
            return await self._plain(route.host, factory)

    def alternative(self, route: Route) -> Route | None:
        """The other way that sslmode allows when the server refuses a connection before its login.

        pg_hba.conf may have lines for hostssl or hostnossl alone. An alternative has no other.
        """
        first = {"allow": False, "prefer": True}.get(self._upstream.sslmode)
        if route.host.is_local or route.encrypted is not first:
            return None
        return Route(route.host, not route.encrypted)

    def others(self, tried: Collection[Host]) -> bool:
        """Whether there are hosts other than these."""
        return any(host not in tried for host in self._upstream.hosts)

    async def cancel(
        self,
        route: Route | None,
        request: CancelRequest,
        is_meant: Callable[[], bool] = lambda: True,
    ) -> None:
        """Send a cancel request by its session's route; a failure is logged.

        A request for no known session may belong to another proxy, such as a predecessor. It goes
        to all hosts; those that did not issue the key ignore it.

        `is_meant`: as for `send_cancel`.
        """

        ways = self._upstream.hosts if route is None else (route,)
        reasons = await asyncio.gather(*(self._send_cancel(way, request, is_meant) for way in ways))
        # Anybody can send such requests, in any number.
        if all(reasons) and (
            self._log_limiter.take(None, asyncio.get_running_loop().time()) is not None
        ):
            logger.warning(
                "could not pass on a cancel request: %s", "; ".join(filter(None, reasons))
            )

    async def _send_cancel(
        self, way: Route | Host, request: CancelRequest, is_meant: Callable[[], bool]
    ) -> str | None:
        """Send it. Returns why that failed, if so."""

        async def connect(factory: Callable[[], P]) -> P:
            if isinstance(way, Route):
                return await self.connect_by(way, factory)
            return (await self._connect_host(way, factory))[1]

        try:
            async with asyncio.timeout(self._config.connect_timeout or None):
                await send_cancel(connect, request, is_meant)
        except OSError as error:
            return explain(error)
        return None

    async def check(self) -> Route:
        """Check that there is a server: ask it for TLS, as a client does first, and close.

        Raises OSError.
        """
        route, protocol = await self.connect(_Greeting)
        if route.host.is_local or self._upstream.sslmode in ("disable", "allow"):
            protocol.greet()  # unless TLS was requested already
            with contextlib.suppress(OSError):
                async with self._in_time(route.host):
                    await protocol.answer
        protocol.transport.close()
        return route

    async def login_as_auth_user(self, host: Host) -> Backend:
        """A connection for the proxy's own queries.

        The administrator decides where it goes and what names mean there: no client names the
        database, and startup parameters override ALTER DATABASE SET and ALTER ROLE SET.

        Raises OSError; SQLError if auth_user is not let in.
        """
        user = self._config.auth_user.encode()
        database = self._config.lookup_database.encode()
        startup = StartupMessage(
            {
                b"user": user,
                b"database": database,
                b"application_name": APPLICATION_NAME,
                b"search_path": b"pg_catalog",
            }
        )
        credentials = self._credentials.own_credentials(
            host, database, user, self._upstream.policy(host)
        )
        taken: list[Route] = []

        async def first(factory: Callable[[], P]) -> P:
            route, protocol = await self._connect_host(host, factory)
            taken.append(route)
            return protocol

        async def second(factory: Callable[[], P]) -> P:
            return await self.connect_by(cast(Route, self.alternative(taken[0])), factory)

        timeout = self._config.connect_timeout
        try:
            return await open_backend(first, startup, credentials, timeout)
        except SQLError as error:
            refused = error.sqlstate == INVALID_AUTHORIZATION_SPECIFICATION
            if not (refused and taken and self.alternative(taken[0])):
                raise
            return await open_backend(second, startup, credentials, timeout)

    # States of hosts

    async def _state(self, host: Host) -> HostState:
        """Raises OSError or SQLError."""
        async with self._looking[host]:
            now = asyncio.get_running_loop().time()
            until, state = self._states.get(host, (0.0, None))
            if state is None or until <= now:
                state = await self._look(host)
                self._states[host] = (now + STATE_LIFETIME, state)
            return state

    async def _look(self, host: Host) -> HostState:
        backend = await self.login_as_auth_user(host)
        try:
            async with self._in_time(host):
                in_recovery, read_only, *_ = await backend.row(_STATE_QUERY, 2)
        except (ServerError, ProtocolViolation) as error:
            raise ConnectionError(explain(error)) from None
        finally:
            backend.terminate()
        return HostState(in_recovery == b"t", read_only == b"on")

    # Connections to one host

    async def _connect_host(self, host: Host, factory: Callable[[], P]) -> tuple[Route, P]:
        """Connect with or without TLS, as sslmode prefers."""
        async with _counted(), self._in_time(host):
            mode = "disable" if host.is_local else self._upstream.sslmode
            if mode not in ("disable", "allow"):
                try:
                    return await self._encrypted(host, factory, optional=mode == "prefer")
                except HandshakeError:
                    if mode != "prefer":
                        raise
            return Route(host), await self._plain(host, factory)

    @contextlib.asynccontextmanager
    async def _in_time(self, host: Host) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.connect_timeout or None):
                yield
        except TimeoutError:
            raise TimeoutError(f"connection to {host} timed out") from None
        except OSError as error:
            if not is_shortage(error):
                raise
            report("connect to the server")
            raise OutOfDescriptorsError from None

    async def _plain(self, host: Host, factory: Callable[[], P]) -> P:
        loop = asyncio.get_running_loop()
        if host.is_local:
            path = f"{host.name}/.s.PGSQL.{host.port}"
            return (await loop.create_unix_connection(factory, path))[1]
        transport, protocol = await loop.create_connection(factory, *_address(host))
        self._upstream.keepalive.apply(transport.get_extra_info("socket"))
        return protocol

    async def _encrypted(
        self, host: Host, factory: Callable[[], P], *, optional: bool
    ) -> tuple[Route, P]:
        """Connect with TLS; if `optional`, without it to a server that has none."""
        if self._upstream.sslnegotiation == "direct":
            return Route(host, encrypted=True), await self._direct(host, factory)
        greeting = await self._plain(host, _Greeting)
        transport = greeting.transport
        try:
            greeting.greet()
            encrypted = await greeting.answer
            if not (encrypted or optional):
                raise ConnectionError("server does not support SSL, but SSL was required")
            protocol = factory()
            if encrypted:
                transport = await self._handshake(transport, protocol, host)
            else:
                transport.set_protocol(protocol)
        except BaseException:
            transport.abort()
            raise
        protocol.connection_made(transport)
        if not encrypted:
            transport.resume_reading()
        return Route(host, encrypted), protocol

    async def _handshake(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, host: Host
    ) -> asyncio.Transport:
        assert self._context is not None
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport,
                protocol,
                self._context,
                server_hostname=host.name,
                ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT,
            )
        except OSError as error:
            raise HandshakeError(explain(error)) from None
        if encrypted is None:
            raise HandshakeError("the server closed the connection")
        return encrypted

    async def _direct(self, host: Host, factory: Callable[[], P]) -> P:
        try:
            transport, protocol = await asyncio.get_running_loop().create_connection(
                factory,
                *_address(host),
                ssl=self._context,
                server_hostname=host.name,
                ssl_shutdown_timeout=tls.SHUTDOWN_TIMEOUT,
            )
        except ssl.SSLError as error:
            raise HandshakeError(explain(error)) from None
        self._upstream.keepalive.apply(transport.get_extra_info("socket"))
        if not tls.speaks_postgresql(transport):
            transport.abort()
            raise HandshakeError(
                "direct SSL connection was established without ALPN protocol negotiation extension"
            )
        return protocol


class _Greeting(asyncio.Protocol):
    """Asks a server for TLS. `answer`: whether it has it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def greet(self) -> None:
        self.transport.write(SSLRequest().serialize())

    def data_received(self, data: bytes) -> None:
        # Further bytes belong to the next protocol, which must be set first.
        self.transport.pause_reading()
        if self.answer.done():
            return
        if data in (b"S", b"N"):
            self.answer.set_result(data == b"S")
        elif data[:1] == b"S":
            self._fail("received unencrypted data after SSL response")
        else:
            self._fail("received invalid response to SSL negotiation")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(explain(exc) if exc else "the server closed the connection")

    def _fail(self, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionError(reason))
            self.answer.exception()  # no warning if the caller is gone


@contextlib.asynccontextmanager
async def _counted() -> AsyncIterator[None]:
    try:
        yield
    except OSError:
        counters.failed_connects += 1
        raise
    counters.connects += 1


def _address(host: Host) -> tuple[str, int]:
    return host.hostaddr or host.name, host.port
