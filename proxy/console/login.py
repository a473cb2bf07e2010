"""Who gets into the console.

Invariant: nobody, unless admin_users or stats_users name somebody; otherwise there is no console,
and a database of its name is the server's. A client proves its identity by SCRAM-SHA-256 with the
auth_file's secret, or by being, over a Unix socket, the operating system's user that the proxy runs
as, who could do anything to the proxy anyway. Without the password, a client cannot find out which
names are in the lists or in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

from protocol.errors import (
    FEATURE_NOT_SUPPORTED,
    INVALID_PASSWORD,
    TOO_MANY_CONNECTIONS,
    ProtocolViolation,
    SQLError,
)
from protocol.kinds import F
from protocol.messages import (
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    BackendKeyData,
    NegotiateProtocolVersion,
    ParameterStatus,
    SASLInitialResponse,
    SASLResponse,
)
from protocol.scram import MECHANISM, ScramServer
from protocol.startup import StartupMessage
from proxy import __version__
from proxy.auth.rate_limit import RateLimiter, client_key
from proxy.auth.secret import MD5Secret
from proxy.config import Config
from proxy.console.actions import ConsoleActions
from proxy.console.conversation import LONGEST, ConsoleUser, Conversation
from proxy.log import Event, logger
from proxy.net.connection import Connection
from proxy.net.inbox import Inbox
from proxy.runtime import Runtime

DATABASE: Final = b"pg_background_proxy"
"""The database name that a client asks for."""

_BURST: Final = 10
_RATE: Final = 1.0
_MAX_WAITING: Final = 10
"""Logins by password from one address: at once, per second, and waiting."""

MAX_CLIENTS: Final = 20
_KEPT_FREE: Final = 4
"""Clients of one process, and how many of these places stats_users cannot take."""

_PARAMETERS: Final = {
    "server_version": f"{__version__}/pg_background_proxy",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "default_transaction_read_only": "off",
    "in_hot_standby": "off",
    "is_superuser": "off",
}
"""Parameters that drivers expect from a server."""


class ConsoleLogin:
    """Lets clients in to the console of one process, and serves them.

    Args:
        runtime: has the lists and the secrets; a reload replaces it.
        actions: carry out the commands.
    """

    def __init__(self, runtime: Callable[[], Runtime], actions: ConsoleActions) -> None:
        self._runtime = runtime
        self.actions = actions
        self._rate_limiter = RateLimiter(_BURST, _RATE, _MAX_WAITING)
        self._clients = 0

    @property
    def _config(self) -> Config:
        return self._runtime().config

    def is_for(self, startup: StartupMessage) -> bool:
        """Whether a client asks for the console, and there is one."""
        config = self._config
        return startup.database == DATABASE and bool(config.admin_users or config.stats_users)

    async def serve(
        self, client: Connection, startup: StartupMessage, rest: bytes, let_in: Callable[[], None]
    ) -> None:
        """Log a client in, and serve it until it leaves; see `session.services.Services`.

        Raises SQLError, ProtocolViolation, ConnectionError.
        """
        if b"replication" in startup.parameters:
            raise SQLError(FEATURE_NOT_SUPPORTED, "the console has no replication")
        inbox = Inbox(client)
        inbox.bound(lambda kind: LONGEST)
        client.receive = inbox.feed
        client.resume_reading()
        inbox.feed(rest)
        _negotiate(client, startup)
        is_own = is_own_user(client)
        if not is_own:
            await self._authenticate(client, inbox, startup.user)
        name = startup.user.decode("utf-8", "replace")
        console_user = ConsoleUser(name, self._runtime, is_own=is_own)
        with self._place(console_user):
            let_in()
            greeting = [AuthenticationOk().serialize()]
            parameters = _PARAMETERS | {
                "session_authorization": console_user.name,
                "application_name": _text(startup.application_name),
            }
            greeting += [
                ParameterStatus(name.encode(), value.encode()).serialize()
                for name, value in parameters.items()
            ]
            # A cancel request with this key has no effect: no command runs for long.
            greeting.append(BackendKeyData(os.getpid(), secrets.token_bytes(4)).serialize())
            client.write(b"".join(greeting))
            await Conversation(client, inbox, console_user, self.actions).run()

    async def _authenticate(self, client: Connection, inbox: Inbox, user: bytes) -> None:
        """Raises SQLError, FATAL, unless the client proves its identity."""
        await self._await_turn(client, user)
        name = user.decode("utf-8", "replace")
        is_known = name in (*self._config.admin_users, *self._config.stats_users)
        known = self._runtime().credentials.secret_in_file(user) if is_known else None
        check = self._runtime().checks.check(user, known)
        conversation = ScramServer(check.secret)
        client.write(AuthenticationSASL((MECHANISM,)).serialize())
        initial = SASLInitialResponse.parse(await _answer(inbox))
        if initial.mechanism != MECHANISM or initial.response is None:
            raise ProtocolViolation("client selected an invalid SASL authentication mechanism")
        first = conversation.first_message(initial.response)
        client.write(AuthenticationSASLContinue(first).serialize())
        final = SASLResponse.parse(await _answer(inbox)).response
        if not conversation.verify(final) or check.known is None:
            reason = None
            if is_known and known is None:
                reason = "the auth_file has nothing for it"
            elif is_known and isinstance(known, MD5Secret):
                reason = "what the auth_file has for it is no password and no SCRAM secret"
            raise self._refused(client, user, reason)
        client.write(AuthenticationSASLFinal(conversation.final_message()).serialize())

    async def _await_turn(self, client: Connection, user: bytes) -> None:
        """Raises SQLError, FATAL, if too many clients of the address are waiting."""
        address = client_key(client.peer.name)
        delay = self._rate_limiter.take(address, asyncio.get_running_loop().time())
        if delay is None:
            raise SQLError(
                TOO_MANY_CONNECTIONS,
                "too many logins to the console",
                detail=f"From one address there may be {_RATE:g} a second.",
                severity="FATAL",
            )
        if delay:
            await asyncio.sleep(delay)

    def _refused(self, client: Connection, user: bytes, reason: str | None) -> SQLError:
        address = client_key(client.peer.name)
        values = {"user": _text(user), "host": address, "reason": reason}
        logger.warning(Event("console login failed", values))
        return SQLError(
            INVALID_PASSWORD,
            f'password authentication failed for user "{_text(user)}"',
            severity="FATAL",
        )

    @contextlib.contextmanager
    def _place(self, user: ConsoleUser) -> Iterator[None]:
        """Raises SQLError, FATAL, if too many clients are in the console."""
        most = MAX_CLIENTS if user.is_admin else MAX_CLIENTS - _KEPT_FREE
        if self._clients >= most:
            raise SQLError(
                TOO_MANY_CONNECTIONS,
                "sorry, too many clients of the console already",
                detail=f"A process has {MAX_CLIENTS} at the most, {_KEPT_FREE} of them for"
                " admin_users.",
                severity="FATAL",
            )
        self._clients += 1
        try:
            yield
        finally:
            self._clients -= 1


def is_own_user(client: Connection) -> bool:
    """Whether a client is the operating system's user that we run as. Only a direct Unix socket
    tells (SO_PEERCRED); behind a load balancer it would be the load balancer's user."""
    if client.peer.sender is not None:
        return False
    sock = client.transport.get_extra_info("socket")
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return False
    with socket.socket(fileno=os.dup(sock.fileno())) as same:
        credentials = same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return bool(uid == os.geteuid())


_UCRED: Final = struct.Struct("=iII")
"""Linux's struct ucred: pid, uid, gid."""


def _negotiate(client: Connection, startup: StartupMessage) -> None:
    """Tell a client that asks for a newer protocol, or options, what it gets."""
    options = tuple(name for name in startup.parameters if name.startswith(b"_pq_."))
    if startup.version > (3, 0) or options:
        client.write(NegotiateProtocolVersion((3, 0), options).serialize())


async def _answer(inbox: Inbox) -> bytes:
    """The body of the client's answer. Raises ProtocolViolation."""
    kind, body = await inbox.next()
    if kind != F.PASSWORD_MESSAGE:
        raise ProtocolViolation(f"expected password response, got message type {kind}")
    return body


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
