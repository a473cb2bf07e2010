"""Spares: side backends that are logged in before they are needed.

Invariant: a spare is what a new login would have been a moment ago, and serves one job like it. A
session gets one only if the server has let it in as that role. Spares are opened only for logins
that launch, live no longer than `spare_lifetime`, and never take one of the last free connection
slots. Each remembers the `identity` that its login had before it began, and compares it with the
present one after the login and before it does anything for a job; on a difference the launch
retires all spares of that login. So the first one to log in, a scout, is no spare. What SQL cannot
see, a new password, takes effect after `spare_lifetime` at the latest.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, cast

from protocol.errors import ProtocolViolation, SQLError
from proxy.backends.backend import Backend, number
from proxy.backends.channels import Channels, Open
from proxy.backends.identity import HAS_LOGIN_TRIGGERS, IDENTITY, SYSTEM_ID, Login, StaleLoginError
from proxy.log import logger
from proxy.reasons import explain

_RETRY: Final = 5.0
"""Seconds before spares are tried again for a login that could not have one."""

LONGEST_COMMAND: Final = 4096
"""Bytes of SQL text that may be a command about databases; these are short."""

DATABASE_COMMANDS: Final = (b"drop", b"alter", b"create")

_GIVE_WAY: Final = (0.02, 0.1, 0.3)
"""Seconds to wait for the server to free the slots of spares that gave way, by attempt."""


class KeptBackend(Protocol):
    """A backend kept for the next job of a session (`reuse`)."""

    @property
    def login(self) -> Login: ...
    def close(self) -> None: ...


Key = tuple[Login, tuple[tuple[bytes, bytes], ...]]
"""What a spare and its user must have in common: the login, and the settings in the startup packet.
"""

_REPLACE_AFTER: Final = 0.01
_REPLACE_LAST: Final = 0.002
"""Seconds before a used spare is replaced, and the last one: launch and result come first."""

_LASTS: Final = 0.5
"""Seconds for which the server is assumed to have many free slots, once it had."""
_MANY: Final = 20
"""Number of free slots, besides those to be left free, that counts as many."""

GREETING: Final = (
    b"SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_postmaster_start_time(),"
    b" CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.<>) 0 THEN"
    b" ARRAY[pg_catalog.set_config('application_name', 'pg_background spare', false)] END,"
    b" pg_catalog.current_setting('client_encoding')"
)
"""Fills the backend's caches for the setup."""

_ROOM: Final = (
    b"""
SELECT LEAST(
           s.most OPERATOR(pg_catalog.-) s.reserved OPERATOR(pg_catalog.-) a.used
           OPERATOR(pg_catalog.-) (s.most OPERATOR(pg_catalog./) 10),
           CASE WHEN o.rolconnlimit OPERATOR(pg_catalog.>=) 0 OR
                     d.datconnlimit OPERATOR(pg_catalog.>=) 0 THEN 0 END
       ), pg_catalog.pg_postmaster_start_time(), %b
FROM (SELECT pg_catalog.current_setting('max_connections')::pg_catalog.int4 AS most,
             pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4
             OPERATOR(pg_catalog.+) CASE
                 WHEN pg_catalog.current_setting('server_version_num')::pg_catalog.int4
                      OPERATOR(pg_catalog.>=) 160000
                 THEN pg_catalog.current_setting('reserved_connections')::pg_catalog.int4
                 ELSE 0 END AS reserved) s,
     (SELECT pg_catalog.count(*)::pg_catalog.int4 AS used
      FROM pg_catalog.pg_stat_get_activity(NULL)) a,
     pg_catalog.pg_roles o, pg_catalog.pg_database d
WHERE o.rolname OPERATOR(pg_catalog.=) session_user
  AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
"""
    % SYSTEM_ID
)
"""The number of slots for spares, the server's start time, and its system identifier. In a new
backend this takes a millisecond, so it is not asked for each of many."""


_SCOUT: Final = b"SELECT pg_catalog.pg_backend_pid(), " + HAS_LOGIN_TRIGGERS + b", " + IDENTITY
"""Whether there is a pooler; whether a login may give something else each time; the identity."""


class _Server(NamedTuple):
    """What need not be asked for each spare.

    Attributes:
        started: identifies this server since its last restart.
        asked: when, by the loop's clock.
        room: as in `_ROOM`.
    """

    started: bytes | None
    system_id: bytes | None
    asked: float
    room: int


@dataclass(slots=True)
class _Pool:
    """The spares of one key, oldest first, and those being opened.

    ``identity``: what the next login gives (`identity`), unless that changes; None if not known.
    ``surprises``: how often it had changed after all, since the last login that gave it.
    ``server``: as the last one that asked has learned.
    ``scout``: the task that finds out the identity.
    ``opening``: the tasks that open more.
    ``waiting``: launches that found none ready, and wait for one of these.
    """

    ready: list[Backend] = field(default_factory=list)
    identity: bytes | None = None
    surprises: int = 0
    server: _Server | None = None
    scout: asyncio.Task[None] | None = None
    opening: set[asyncio.Task[None]] = field(default_factory=set)
    not_before: float = 0.0
    waiting: deque[asyncio.Future[Backend | None]] = field(default_factory=deque)
    refill: asyncio.TimerHandle | None = None


def is_named(login: Login, sql: bytes) -> bool:
    """Whether a lower-case statement about databases seems to name the login's."""
    sql = sql.replace(b'""', b'"')
    names = sql + b" template1" if b"create" in sql else sql
    return login.database.lower() in names


class Spares:
    """The spares of all roles and databases.

    Attributes:
        kept: backends that have run a job, of all sessions.
    """

    def __init__(
        self,
        count: int,
        lifetime: float,
        reuse_lifetime: float,
        channels: Channels,
        others_give_way: Callable[[], Awaitable[bool]],
    ) -> None:
        """
        Args:
            count: how many to keep for each login; 0 for none.
            lifetime: seconds after which an unused spare is closed and not replaced.
            reuse_lifetime: the same for a backend that has run a job; 0 if none is reused.
            channels: idle ones give way as spares do.
            others_give_way: has other processes close theirs; returns whether there were any.
        """
        self.count = count
        self.lifetime = lifetime
        self._channels = channels
        self._others_give_way = others_give_way
        self._pools: dict[Key, _Pool] = {}
        # Until when the server may still be closing spares, by the loop's clock.
        self._closing_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self.kept: set[KeptBackend] = set()
        self.reuse_lifetime = reuse_lifetime

    @property
    def ready(self) -> int:
        """Number of spares that wait for a job."""
        return len(self.kept) + sum(len(pool.ready) for pool in self._pools.values())

    @property
    def opening(self) -> int:
        """Number of spares being opened."""
        return sum(len(pool.opening) for pool in self._pools.values())

    async def take(self, key: Key, open_one: Open) -> tuple[Backend, bool]:
        """A backend for a job, and whether it is a spare; others are opened to replace it.

        Args:
            key: which spares will do.
            open_one: opens and logs in a backend; raises SQLError.
        """
        pool = self._pools.setdefault(key, _Pool())
        spare = self._ready(pool) or await self._opening(pool)
        backend = spare or await self.open_now(open_one)
        if pool.refill is None:
            pool.refill = asyncio.get_running_loop().call_later(
                _REPLACE_AFTER if pool.ready else _REPLACE_LAST, self._refill, key, pool, open_one
            )
        return backend, spare is not None

    def _ready(self, pool: _Pool) -> Backend | None:
        while pool.ready:
            backend = pool.ready.pop()
            if backend.is_alive:
                return backend
        return None

    async def _opening(self, pool: _Pool) -> Backend | None:
        """A spare that is being opened, without a taker yet; None if that fails."""
        if len(pool.opening) <= len(pool.waiting):
            return None
        waiter: asyncio.Future[Backend | None] = asyncio.get_running_loop().create_future()
        pool.waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and (backend := waiter.result()):
                backend.terminate()
            raise
        finally:
            if waiter in pool.waiting:
                pool.waiting.remove(waiter)

    def _hand_on(self, pool: _Pool, backend: Backend | None) -> bool:
        """Give a new spare, or None if opening it failed, to a launch that waits for it."""
        while pool.waiting:
            waiter = pool.waiting.popleft()
            if not waiter.done():
                waiter.set_result(backend)
                return True
        return False

    async def open_now(self, open_one: Open) -> Backend:
        """Open a backend that is needed now. Spares give way if there is no room for both.

        Raises SQLError.
        """
        for delay in _GIVE_WAY:
            try:
                return await open_one()
            except SQLError as error:
                if not error.sqlstate.startswith("53"):
                    raise
                had_some = self.give_way()
                if not (await self._others_give_way() or had_some):
                    raise
            await asyncio.sleep(delay)
        return await open_one()

    def give_way(self) -> bool:
        """Close all spares, even those being opened, and unused channels; whether any existed."""
        channels = self._channels.give_way()
        now = asyncio.get_running_loop().time()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        ready = [backend for pool in self._pools.values() for backend in pool.ready]
        for backend in ready:
            backend.terminate()
        kept = tuple(self.kept)
        for one in kept:
            one.close()
        for pool in self._pools.values():
            pool.ready.clear()
            pool.identity = None
            pool.not_before = now + _RETRY
        if tasks or ready or kept or channels:
            self._closing_until = now + sum(_GIVE_WAY)
        return now < self._closing_until

    def leave(self, sql: bytes) -> None:
        """Close spares and unused channels in the databases that a lower-case statement seems to
        name, and open none there for a while."""
        self._close_all(lambda login: is_named(login, sql), pause=_RETRY)

    def retire(self, login: Login) -> None:
        """Close spares and unused channels of a login whose identity has changed."""
        self._close_all(lambda other: other == login)

    def _close_all(self, matches: Callable[[Login], bool], pause: float = 0.0) -> None:
        """`pause`: seconds for which no others are opened."""
        self._channels.retire(matches)
        for kept in tuple(self.kept):
            if matches(kept.login):
                kept.close()
        until = asyncio.get_running_loop().time() + pause
        for (login, _), pool in self._pools.items():
            if matches(login):
                pool.identity = None
                pool.not_before = max(pool.not_before, until if pause else 0.0)
                for backend in pool.ready:
                    backend.terminate()
                pool.ready.clear()

    def _refill(self, key: Key, pool: _Pool, open_one: Open) -> None:
        pool.refill = None
        self._fill(key, pool, open_one)

    def _fill(self, key: Key, pool: _Pool, open_one: Open) -> None:
        loop = asyncio.get_running_loop()
        missing = self.count - len(pool.ready) - len(pool.opening) + len(pool.waiting)
        if missing <= 0 or loop.time() < pool.not_before:
            return
        if pool.identity is None:
            if pool.scout is None:
                pool.scout = self._start(pool, self._scout(key, pool, open_one))
            return
        for _ in range(missing):
            pool.opening.add(self._start(pool, self._add(key, pool, open_one, pool.identity)))

    def _start(self, pool: _Pool, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._opened, pool))
        return task

    def _opened(self, pool: _Pool, task: asyncio.Task[None]) -> None:
        # Also called for tasks cancelled before they began.
        self._tasks.discard(task)
        pool.opening.discard(task)
        if task is pool.scout:
            pool.scout = None
        if len(pool.waiting) > len(pool.opening):
            self._hand_on(pool, None)

    async def _scout(self, key: Key, pool: _Pool, open_one: Open) -> None:
        """Find out what a login gives by one that is no spare: it may have got what was before."""
        loop = asyncio.get_running_loop()
        try:
            backend = await open_one()
            try:
                pool.server = await self._look_around(backend)
                pid, has_triggers, identity, *_ = await backend.row(_SCOUT, 3)
            finally:
                backend.terminate()
            if number(pid) != backend.pid:
                # It would not show what connection the job gets, nor keep one free for it.
                raise ConnectionError("there is a connection pooler before the server")
            if pool.server.room <= 0:
                raise ConnectionError("the server has no connection to spare")
            if has_triggers == b"t":
                raise ConnectionError("what event triggers do at login may be different each time")
            if identity is None:
                raise StaleLoginError("the server would not let it in now")
        except (SQLError, StaleLoginError, OSError, ProtocolViolation) as error:
            logger.debug("no spare backend: %s", explain(error))
            pool.not_before = loop.time() + _RETRY
        else:
            pool.identity = identity
            self._fill(key, pool, open_one)

    async def _look_around(self, backend: Backend) -> _Server:
        now = asyncio.get_running_loop().time()
        room, started, system_id, *_ = await backend.row(_ROOM, 3)
        return _Server(started, system_id, now, number(room))

    async def _add(self, key: Key, pool: _Pool, open_one: Open, identity: bytes) -> None:
        """`identity`: what the login is expected to give."""
        loop = asyncio.get_running_loop()
        taken = False
        try:
            backend = await open_one()
            try:
                server = await self._greet(key[0], pool, backend, identity)
                backend.system_id = server.system_id
                # Now, lest it is counted twice when others are opened.
                pool.opening.discard(cast("asyncio.Task[None]", asyncio.current_task()))
                taken = self._hand_on(pool, backend)
                if not taken and server.room <= 0:
                    raise ConnectionError("the server has no connection to spare")
                if not taken and loop.time() < pool.not_before:
                    raise ConnectionError("it is to give way by now")
            except BaseException:
                backend.terminate()
                raise
            if not taken:
                pool.ready.append(backend)
                loop.call_later(self.lifetime, self._expire, key, pool, backend)
        except StaleLoginError as error:
            logger.debug("not a spare backend: %s", explain(error))
            pool.opening.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            if pool.identity is identity:
                pool.identity = None
                pool.surprises += 1
                if pool.surprises > 1:
                    pool.not_before = loop.time() + _RETRY
            self._fill(key, pool, open_one)
        except (SQLError, OSError, ProtocolViolation) as error:
            logger.debug("no spare backend: %s", explain(error))
            pool.not_before = loop.time() + _RETRY

    async def _greet(self, login: Login, pool: _Pool, backend: Backend, identity: bytes) -> _Server:
        """Have a new spare remember its login and fill its caches. Returns its server's data.

        Mostly that is as for the last spare: then this takes one round trip.

        Raises what `Backend.remember_identity` raises; ConnectionError if the spare will not do.
        """
        now = asyncio.get_running_loop().time()
        server = pool.server
        if server is not None and (server.room <= _MANY or now > server.asked + _LASTS):
            server = None
        while True:
            server = server or await self._look_around(backend)
            greeting = await backend.remember_identity(login, identity, GREETING)
            if number(greeting[0]) != backend.pid:
                raise ConnectionError("there is a connection pooler before the server")
            if pool.identity is not identity:
                raise StaleLoginError("it has logged in before others were retired")
            if greeting[1] == server.started:
                pool.server, pool.surprises = server, 0
                return server
            server = None  # restarted, or another server

    def _expire(self, key: Key, pool: _Pool, backend: Backend) -> None:
        if backend in pool.ready:
            pool.ready.remove(backend)
            backend.terminate()
        busy = pool.ready or pool.opening or pool.refill or pool.scout
        if not busy and self._pools.get(key) is pool:
            del self._pools[key]

    def overview(self) -> Iterator[tuple[Login, int, int, int]]:
        """For each login: the numbers of spares ready, of spares being opened, and of launches
        that wait for one."""
        for (login, _), pool in list(self._pools.items()):
            yield login, len(pool.ready), len(pool.opening), len(pool.waiting)

    def close(self) -> None:
        for pool in self._pools.values():
            if pool.refill is not None:
                pool.refill.cancel()
        self.give_way()
        self._pools.clear()
