"""How an answer gets to a function that runs in the database: through a backend that it can see.

Invariant: nothing is written anywhere. An answer stands in what pg_stat_get_activity() shows of a
channel, an idle backend of ours with the session's login role, and is gone when the next one comes
or the channel goes. A session has a channel to itself from its first call to the end of the
statement; then another session of the same role may have it. What is shown is text without quotes
or blanks, so it needs no escaping.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from protocol.errors import ProtocolViolation, SQLError
from proxy.backends.backend import Backend, Row, number
from proxy.backends.identity import IDENTITY, SYSTEM_ID_QUERY, Login
from proxy.log import logger

Open = Callable[[], Awaitable[Backend]]
Rows = list[Row]

APPLICATION_NAME: Final = b"pg_background channel"

_SET_UP: Final = (
    b"SELECT CASE WHEN pg_catalog.current_setting('track_activities')"
    b" OPERATOR(pg_catalog.=) 'on' THEN s.setting END,"
    b" CASE WHEN CAST(pg_catalog.current_setting('server_version_num') AS pg_catalog.int4)"
    b" OPERATOR(pg_catalog.>=) 120000 THEN"
    b" pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', false) END,"
    b" CASE WHEN CAST(pg_catalog.current_setting('server_version_num') AS pg_catalog.int4)"
    b" OPERATOR(pg_catalog.>=) 140000 THEN"
    b" pg_catalog.set_config('idle_session_timeout', '0', false) END, %b"
    b" FROM pg_catalog.pg_settings s"
    b" WHERE s.name OPERATOR(pg_catalog.=) 'track_activity_query_size'" % IDENTITY
)

_REST: Final = (
    b"SELECT pg_catalog.set_config('application_name', '%b', false),"
    b" pg_catalog.pg_advisory_unlock_all()" % APPLICATION_NAME
)

_LARGEST: Final = 16 * 1024
"""More is not shown at once, because each look copies that much of every backend."""

_FULL_TIMEOUT: Final = 15.0
"""Seconds to wait for a channel that another session has, when the server takes no more."""


class Channel:
    """One channel.

    Attributes:
        room: how many characters of a query can be seen; 0 if none.
        system_id: of the database cluster (`identity`).
        identity: of its login, if that was for another session.
        timer: closes it when it is no longer needed.
    """

    def __init__(
        self,
        login: Login,
        backend: Backend,
        room: int,
        system_id: bytes,
        identity: bytes | None,
    ) -> None:
        self.login = login
        self._identity = identity
        self.identity: bytes | None = None
        self.system_id = system_id
        self.room = room
        self._backend = backend
        self.timer: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Rows]] = set()

    async def query(self, sql: bytes) -> Rows:
        """The rows of a query, which runs to its end even if the caller is cancelled.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        task = asyncio.get_running_loop().create_task(self._query(sql))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Rows]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("channel: %s", task.exception())

    async def _query(self, sql: bytes) -> Rows:
        async with self._lock:
            if not self.is_alive:
                raise ConnectionError("the channel is closed")
            return await self._backend.rows(sql)

    async def rest(self) -> None:
        """Show nothing and lock nothing."""
        await self.query(_REST)
        self.identity = self._identity or b""

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return self._backend.is_alive and not self._backend.transport.is_closing()

    def terminate(self) -> None:
        """End it."""
        self._backend.terminate()


class Channels:
    """The channels of all sessions."""

    def __init__(self, lifetime: float, prepare: bytes) -> None:
        """
        Args:
            lifetime: seconds after which an unused one is closed.
            prepare: SQL that each runs first.
        """
        self._prepare = prepare
        self.lifetime = lifetime
        self._idle: dict[Login, list[Channel]] = {}
        self._waiting: dict[Login, list[asyncio.Future[Channel]]] = {}
        # What others have and may give back, or are about to have.
        self._lent: set[Channel] = set()
        self._opening: Counter[Login] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def lease(self, login: Login, open_one: Open) -> Channel:
        """A channel for one session.

        Args:
            login: what sessions must have in common to share one.
            open_one: opens and logs in a backend; raises SQLError.

        Raises SQLError, OSError, ProtocolViolation.
        """
        idle = self._idle.get(login, [])
        while idle:
            channel = idle.pop()
            if channel.timer is not None:
                channel.timer.cancel()
            if channel.is_alive:
                self._lent.add(channel)
                return channel
        self._opening[login] += 1
        try:
            backend = await open_one()
        except SQLError as error:
            if not error.sqlstate.startswith("53") or not self._may_be_returned(login):
                raise
            try:
                return await self._returned(login)
            except TimeoutError:
                raise error from None
        finally:
            self._opening[login] -= 1
        try:
            row = await backend.row(self._prepare + b"; " + _SET_UP)
            system_id, *_ = await backend.row(SYSTEM_ID_QUERY)
        except BaseException:
            backend.terminate()
            raise
        room = (number(row[0]) or 1) - 1
        channel = Channel(login, backend, min(room, _LARGEST), system_id or b"", row[-1])
        self._lent.add(channel)
        return channel

    def _may_be_returned(self, login: Login) -> bool:
        self._lent = {channel for channel in self._lent if channel.is_alive}
        return self._opening[login] > 1 or any(channel.login == login for channel in self._lent)

    async def _returned(self, login: Login) -> Channel:
        waiter: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(login, [])
        waiting.append(waiter)
        try:
            return await asyncio.wait_for(waiter, _FULL_TIMEOUT)
        except (asyncio.CancelledError, TimeoutError):
            if waiter.done() and not waiter.cancelled():
                self.give_back(waiter.result())
            raise
        finally:
            waiting.remove(waiter)
            if not waiting:
                self._waiting.pop(login, None)

    def give_back(self, channel: Channel) -> None:
        """The session has done with it."""
        task = asyncio.get_running_loop().create_task(self._take_back(channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_back(self, channel: Channel) -> None:
        try:
            await channel.rest()
        except (SQLError, OSError, ProtocolViolation):
            channel.terminate()
            return
        for waiter in self._waiting.get(channel.login, ()):
            if not waiter.done():
                waiter.set_result(channel)
                return
        self._lent.discard(channel)
        self._idle.setdefault(channel.login, []).append(channel)
        loop = asyncio.get_running_loop()
        channel.timer = loop.call_later(self.lifetime, self._expire, channel)

    def _expire(self, channel: Channel) -> None:
        idle = self._idle.get(channel.login, [])
        if channel in idle:
            idle.remove(channel)
            channel.terminate()
        if not idle:
            self._idle.pop(channel.login, None)

    def give_way(self) -> bool:
        """Close those that are idle; whether there were any."""
        return self.retire(lambda login: True)

    def retire(self, matches: Callable[[Login], bool]) -> bool:
        """The same for those of some logins alone."""
        logins = [login for login in self._idle if matches(login)]
        idle = [channel for login in logins for channel in self._idle.pop(login)]
        for channel in idle:
            channel.terminate()
        return bool(idle)
