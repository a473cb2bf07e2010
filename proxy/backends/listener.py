"""How the proxy learns that a transaction has committed: from a notification that it sends then.

Invariant: PostgreSQL sends what NOTIFY says if the transaction that said it commits, and no
savepoint around it was rolled back; in the order of the commits. So a word that was heard is a
commit. And a word that was not heard before one of ours, sent after the end of its transaction, is
none (`Listener.catch_up`). A listener has a channel of its own with a name that nobody can guess,
and is a backend of the login role whose transactions it follows: another role cannot end it, nor
see its name.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from protocol.errors import ProtocolViolation, ServerError
from protocol.kinds import B
from protocol.messages import DataRow, ErrorResponse, NotificationResponse, Query
from proxy.backends.backend import Backend, number
from proxy.backends.identity import Login
from proxy.backends.takeover import Row
from proxy.log import logger
from proxy.reasons import explain

Open = Callable[[], Awaitable[Backend]]

APPLICATION_NAME: Final = b"pg_background listener"

_PATIENCE: Final = 15.0
"""Seconds that an answer to a query may take. A NOTIFY waits for others that are committing."""

_SET_UP: Final = (
    b"SELECT pg_catalog.pg_backend_pid(),"
    b" CASE WHEN CAST(pg_catalog.current_setting('server_version_num') AS pg_catalog.int4)"
    b" OPERATOR(pg_catalog.>=) 140000 THEN"
    b" pg_catalog.set_config('idle_session_timeout', '0', false) END"
)

_START: Final = (
    b"SELECT CAST(a.backend_start AS pg_catalog.text) FROM pg_catalog.pg_stat_get_activity(%d) a"
)


def new_word() -> bytes:
    """What a notification says, once."""
    return secrets.token_hex(16).encode()


class PooledError(Exception):
    """There is a connection pooler in between, behind which nothing can be listened to."""


class Listener:
    """One connection that listens.

    Attributes:
        channel: the name of the channel.
    """

    def __init__(
        self,
        backend: Backend,
        channel: bytes,
        heard: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        """
        Args:
            backend: that has logged in, and nobody else uses.
            channel: the name of the channel.
            heard: is given each word that comes.
            lost: is called when the connection ends by itself.
        """
        self.channel = channel
        self._backend = backend
        self._heard = heard
        self._lost = lost
        self._lock = asyncio.Lock()
        self._rows: list[Row] = []
        self._error: ServerError | None = None
        self._ready: asyncio.Future[None] | None = None
        # A word of ours that is on its way, and who waits for it.
        self._own: tuple[bytes, asyncio.Future[None]] | None = None
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def begin(self) -> None:
        """Listen. Raises PooledError, ServerError, ConnectionError, ProtocolViolation."""
        row, *_ = await self._query(_SET_UP)
        if number(row[0]) != self._backend.pid:
            raise PooledError
        await self._query(b"LISTEN %b" % self.channel)

    async def catch_up(self) -> None:
        """Returns when all was heard that was committed before the call.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        word, came = new_word(), asyncio.get_running_loop().create_future()
        async with self._lock:
            self._own = (word, came)
            try:
                await self._ask(b"NOTIFY %b, '%b'" % (self.channel, word))
                await self._in_time(came)
            finally:
                self._own = None

    async def start_of(self, pid: int) -> bytes | None:
        """When the backend with this PID has begun; None if there is none.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        rows = await self._query(_START % pid)
        return (rows[0][0] or b"") if rows else None

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return not self._reader.done()

    def close(self) -> None:
        """End it."""
        self._reader.cancel()
        self._backend.terminate()

    async def _query(self, sql: bytes) -> list[Row]:
        async with self._lock:
            return await self._ask(sql)

    async def _ask(self, sql: bytes) -> list[Row]:
        if not self.is_alive:
            raise ConnectionError("the listener is gone")
        self._rows, self._error = [], None
        self._ready = asyncio.get_running_loop().create_future()
        self._backend.transport.write(Query(sql).serialize())
        await self._in_time(self._ready)
        if self._error is not None:
            raise self._error
        return self._rows

    async def _in_time(self, future: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(future, _PATIENCE)
        except TimeoutError:
            # What comes after that would be taken for the answer to something else.
            self._backend.transport.abort()
            raise ConnectionError("the server does not answer the listener") from None

    async def _read(self) -> None:
        try:
            while True:
                self._take(*await self._backend.next_message())
        except (ConnectionError, ProtocolViolation, OSError) as error:
            logger.debug("listener: %s", explain(error))
            self._backend.terminate()
            asyncio.get_running_loop().call_soon(self._lost)
        finally:
            for future in (self._ready, self._own and self._own[1]):
                if future and not future.done():
                    future.set_exception(ConnectionError("the listener is gone"))
                    future.exception()  # perhaps nobody waits for it any more

    def _take(self, kind: int, body: bytes) -> None:
        if kind == B.NOTIFICATION_RESPONSE:
            self._notified(NotificationResponse.parse(body))
        elif kind == B.DATA_ROW:
            self._rows.append(DataRow.parse(body).values)
        elif kind == B.ERROR_RESPONSE:
            self._error = ServerError(ErrorResponse.parse(body))
            if self._error.is_fatal:
                raise ConnectionError(str(self._error))
        elif kind == B.READY_FOR_QUERY and self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _notified(self, notification: NotificationResponse) -> None:
        if notification.channel != self.channel:
            return
        if self._own is not None and notification.payload == self._own[0]:
            if not self._own[1].done():
                self._own[1].set_result(None)
        else:
            self._heard(notification.payload)


async def listen(
    login: Login,
    open_one: Open,
    heard: Callable[[bytes], None],
    lost: Callable[[], None],
    channel: bytes | None = None,
) -> Listener:
    """A new listener.

    Args:
        login: whose transactions it follows.
        open_one: opens and logs in a backend; raises SQLError.
        heard: as for `Listener`.
        lost: the same.
        channel: that one before it had; None for a new one.

    Raises SQLError, PooledError, ServerError, OSError, ProtocolViolation.
    """
    backend = await open_one()
    name = channel or b"pg_background_" + secrets.token_hex(16).encode()
    listener = Listener(backend, name, heard, lost)
    try:
        await listener.begin()
    except BaseException:
        listener.close()
        raise
    logger.debug("listening for commits as %s", login)
    return listener
