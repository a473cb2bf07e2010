"""Checks whether the server accepts logins now.

Invariant: with ``auth_user`` the proxy logs in. Without it, it has no role of its own and does what
pg_isready does: it sends a startup packet and sees whether the server continues the login. If the
role does not exist or may not log in from here, the server still accepts logins.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from protocol.errors import ProtocolViolation, ServerError
from protocol.framing import MessageBuffer, limit_before_login
from protocol.kinds import B
from protocol.messages import ErrorResponse
from protocol.startup import StartupMessage
from proxy.backends.upstream import APPLICATION_NAME, Dialer
from proxy.config import Config

_USER: Final = b"pg_background_proxy"
"""The role in the startup packet if there is no auth_user."""

_UNABLE: Final = ("53", "57", "58", "XX")
"""Classes of SQLSTATEs that say that nobody can log in now."""


async def probe(dialer: Dialer, config: Config) -> None:
    """Raises OSError or SQLError if nobody can log in."""
    route, greeted = await dialer.connect(_Probe)
    try:
        if config.auth_user:
            (await dialer.login_as_auth_user(route.host)).terminate()
            return
        database = config.lookup_database.encode()
        startup = {b"user": _USER, b"database": database, b"application_name": APPLICATION_NAME}
        greeted.transport.write(StartupMessage(startup).serialize())
        kind, body = await greeted.answer
        if kind == B.ERROR_RESPONSE:
            error = ErrorResponse.parse(body)
            if error.sqlstate[:2] in _UNABLE:
                raise ServerError(error)
        elif kind != B.AUTHENTICATION:
            raise ConnectionError("it is no PostgreSQL server")
    except ProtocolViolation as error:
        raise ConnectionError(str(error)) from None
    finally:
        greeted.transport.abort()


class _Probe(asyncio.Protocol):
    """A connection whose first message is the answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._buffer = MessageBuffer()
        self._buffer.limit = limit_before_login

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.answer.done():
            return
        self._buffer.feed(data)
        try:
            message = self._buffer.next_message()
        except ProtocolViolation as error:
            self._fail(ConnectionError(str(error)))
            return
        if message is not None:
            self.answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # no warning if nobody waits
