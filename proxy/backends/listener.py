"""Learns by NOTIFY that a transaction has committed.

Invariant: PostgreSQL delivers a NOTIFY if its transaction commits and no savepoint around it was
rolled back, in commit order. So a word that is heard means a commit; a word not heard before one
of ours, sent after the end of the transaction, means none (`Listener.catch_up`). A listener has a
notification channel of its own with an unguessable name, and a backend of the login role whose
transactions it follows: another role can neither end it nor see the name.
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
from proxy.backends.session_setup import Row
from proxy.log import logger
from proxy.reasons import explain

Open = Callable[[], Awaitable[Backend]]

APPLICATION_NAME: Final = b"pg_background listener"

_TIMEOUT: Final = 15.0
"""Seconds to wait for an answer. A NOTIFY waits for other transactions that are committing."""

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
    """A random payload, used once."""
    return secrets.token_hex(16).encode()


class PooledError(Exception):
    """There is a connection pooler in between, where LISTEN does not work."""


class Listener:
    """One listening connection.

    Attributes:
        channel: the name of its notification channel.
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
            backend: a logged-in backend that nobody else uses.
            channel: the name of its notification channel.
            heard: called with each word.
            lost: called when the connection ends by itself.
        """
        self.channel = channel
        self._backend = backend
        self._heard = heard
        self._lost = lost
        self._lock = asyncio.Lock()
        self._rows: list[Row] = []
        self._error: ServerError | None = None
        self._ready: asyncio.Future[None] | None = None
        # A word of ours that was sent, and the wait for it.
        self._own: tuple[bytes, asyncio.Future[None]] | None = None
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def begin(self) -> None:
        """LISTEN. Raises PooledError, ServerError, ConnectionError, ProtocolViolation."""
        row, *_ = await self._query(_SET_UP)
        if number(row[0]) != self._backend.pid:
            raise PooledError
        await self._query(b"LISTEN %b" % self.channel)

    async def catch_up(self) -> None:
        """Wait until everything was heard that had been committed before this call.

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
        """When the backend with this pid began; None if there is none.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        rows = await self._query(_START % pid)
        return (rows[0][0] or b"") if rows else None

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return not self._reader.done()

    def close(self) -> None:
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
            await asyncio.wait_for(future, _TIMEOUT)
        except TimeoutError:
            # A late answer would be taken for that to another query.
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
                    future.exception()  # nobody may be waiting

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
    """Open a listener.

    Args:
        login: whose transactions it follows.
        open_one: opens a backend; raises SQLError.
        heard: see `Listener`.
        lost: see `Listener`.
        channel: name used by a previous listener; None for a new one.

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
