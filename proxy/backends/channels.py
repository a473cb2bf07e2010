"""Channels: backends through which functions that run in the database get answers.

Invariant: nothing is written anywhere. An answer is what pg_stat_get_activity() shows of a channel,
an idle backend of ours with the session's login role; it is gone with the next answer or the
channel. A session has a channel to itself from its first call to the end of the statement; then
another session of the same role may have it, and soon it shows nothing but a word for the next
question. What it shows has no quotes, so it needs no escaping.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from protocol.errors import ServerError, SQLError
from proxy.backends.backend import Backend, number
from proxy.backends.identity import IDENTITY, SYSTEM_ID_QUERY, Login
from proxy.backends.session_setup import Row
from proxy.log import logger
from proxy.reasons import explain

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
    b"%%bSELECT pg_catalog.pg_advisory_unlock_all(),"
    b" pg_catalog.set_config('application_name', '%b', false)" % APPLICATION_NAME
)

_LARGEST: Final = 16 * 1024
"""Limit of what is shown at once, since each look copies that much of every backend."""

_REST_AFTER: Final = 0.02
"""Seconds before an unused channel rests, which takes time: a session may call again at once."""

_FULL_TIMEOUT: Final = 15.0
"""Seconds to wait for another session's channel if the server accepts no more connections."""


class Channel:
    """One channel.

    Attributes:
        room: how many characters of its query others can see; 0 if none.
        system_id: of the database cluster (`identity`).
        identity: of its login, if made for another session.
        timer: lets it rest, or closes it, when it is no longer needed.
        word: shown and not used yet.
        comment: the beginning of the query that shows it.
        is_locked: whether it holds the lock that goes with the word.
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
        self.word: bytes | None = None
        self.comment = b""
        self.is_locked = False
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Rows]] = set()

    async def query(self, sql: bytes) -> Rows:
        """The rows of a query, which runs to its end even if the caller is cancelled.

        Raises ServerError, ConnectionError, ProtocolViolation.
        """
        return await asyncio.shield(self.query_nowait(sql))

    async def transact(self, *commands: tuple[bytes, Sequence[bytes]]) -> Rows:
        """The rows of commands with parameters that form one transaction (`Backend.transact`). A
        failed block that they have begun is ended. Raises as `query` does."""
        task = asyncio.get_running_loop().create_task(self._transact(commands))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    async def _transact(self, commands: Sequence[tuple[bytes, Sequence[bytes]]]) -> Rows:
        async with self._lock:
            if not self.is_alive:
                raise ConnectionError("the channel is closed")
            try:
                return await self._backend.transact(*commands)
            except ServerError as error:
                if not error.is_fatal:
                    await self._backend.rows(b"ROLLBACK")
                raise

    def query_nowait(self, sql: bytes) -> asyncio.Task[Rows]:
        """`query` in a task, since nobody waits for the rows."""
        task = asyncio.get_running_loop().create_task(self._query(sql))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Rows]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("channel: %s", explain(error))

    async def _query(self, sql: bytes) -> Rows:
        async with self._lock:
            if not self.is_alive:
                raise ConnectionError("the channel is closed")
            return await self._backend.rows(sql)

    def offer(self, word: bytes, comment: bytes) -> None:
        """Note a word that is about to be shown, to prove the next question with."""
        self.word, self.comment = word, comment

    def take_word(self) -> bytes | None:
        """The word shown, for one use."""
        word, self.word = self.word, None
        self.comment = b""
        return word

    def when_lost(self, then: Callable[[], None]) -> None:
        """Call `then` if the connection ends, or has ended, while the session has the channel."""
        if self.is_alive:
            self._backend.on_lost = then
        else:
            then()

    def for_another(self) -> None:
        """The session is done: the next one must check that the login still holds."""
        self._backend.on_lost = None
        self.identity = self._identity or b""

    def rest(self) -> asyncio.Task[Rows]:
        """Show only the word for the next question, and release locks, before the next lease."""
        self.is_locked = False
        return self.query_nowait(_REST % self.comment)

    @property
    def pid(self) -> int:
        """The backend's pid, according to BackendKeyData."""
        return self._backend.pid

    @property
    def is_alive(self) -> bool:
        """Whether the connection is up."""
        return self._backend.is_alive and not self._backend.transport.is_closing()

    def terminate(self) -> None:
        """Close the connection."""
        self._backend.on_lost = None
        self._backend.terminate()


def _end_broken(channel: Channel, task: asyncio.Task[Rows]) -> None:
    if task.cancelled() or task.exception() is not None:
        channel.terminate()


class Channels:
    """The channels of all sessions."""

    def __init__(self, lifetime: float, prepare: bytes) -> None:
        """
        Args:
            lifetime: seconds after which an unused channel is closed.
            prepare: SQL that each channel runs first.
        """
        self._prepare = prepare
        self.lifetime = lifetime
        self._idle: dict[Login, list[Channel]] = {}
        self._waiting: dict[Login, list[asyncio.Future[Channel]]] = {}
        # Those that are lent, and the number being opened.
        self._lent: set[Channel] = set()
        self._opening: Counter[Login] = Counter()

    @property
    def idle(self) -> int:
        """Number of channels that nobody uses."""
        return sum(map(len, self._idle.values()))

    @property
    def lent(self) -> int:
        """Number of channels lent to sessions."""
        return sum(channel.is_alive for channel in self._lent)

    async def lease(self, login: Login, open_one: Open) -> Channel:
        """A channel for one session.

        Args:
            login: what sessions must have in common to share a channel.
            open_one: opens a backend; raises SQLError.

        Raises SQLError, OSError, ProtocolViolation.
        """
        idle = self._idle.get(login, [])
        while idle:
            channel = idle.pop()
            if self._lend(channel):
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

    def take(self, login: Login, pid: int) -> Channel | None:
        """Lease the idle channel with this pid, if it shows a word."""
        idle = self._idle.get(login, [])
        for channel in idle:
            if channel.pid == pid and channel.word is not None:
                idle.remove(channel)
                return channel if self._lend(channel) else None
        return None

    def _lend(self, channel: Channel) -> bool:
        if channel.timer is not None:
            channel.timer.cancel()
        if not channel.is_alive:
            return False
        self._lent.add(channel)
        return True

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
        """A session is done with a channel."""
        channel.for_another()
        if not channel.is_alive:
            self._lent.discard(channel)
            return
        for waiter in self._waiting.get(channel.login, ()):
            if not waiter.done():
                waiter.set_result(channel)
                return
        self._lent.discard(channel)
        self._idle.setdefault(channel.login, []).append(channel)
        loop = asyncio.get_running_loop()
        channel.timer = loop.call_later(_REST_AFTER, self._let_rest, channel)

    def _let_rest(self, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        channel.timer = loop.call_later(self.lifetime, self._expire, channel)
        channel.rest().add_done_callback(functools.partial(_end_broken, channel))

    def _expire(self, channel: Channel) -> None:
        idle = self._idle.get(channel.login, [])
        if channel in idle:
            idle.remove(channel)
            channel.terminate()
        if not idle:
            self._idle.pop(channel.login, None)

    def overview(self) -> Iterator[tuple[Login, int, int, int]]:
        """For each login: the number of idle channels, of lent ones, and of waiting sessions."""
        lent = Counter(channel.login for channel in self._lent if channel.is_alive)
        for login in {*self._idle, *lent, *self._waiting}:
            idle = sum(channel.is_alive for channel in self._idle.get(login, ()))
            yield login, idle, lent[login], len(self._waiting.get(login, ()))

    def give_way(self) -> bool:
        """Close the idle ones. Returns whether there were any."""
        return self.retire(lambda login: True)

    def retire(self, matches: Callable[[Login], bool]) -> bool:
        """Close the idle ones of some logins. Returns whether there were any."""
        logins = [login for login in self._idle if matches(login)]
        idle = [channel for login in logins for channel in self._idle.pop(login)]
        for channel in idle:
            channel.terminate()
        return bool(idle)
