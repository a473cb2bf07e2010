"""Side backends that are logged in before they are needed.

Invariant: a spare is what a new login would have been a moment ago, and serves one job like it. A
session gets one only if the server has let it in as that role. None is opened for a role and
database that never launch, none lives longer than `spare_lifetime`, and none takes a connection
slot that is among the last free ones. Each remembers the `identity` of its login: the launch
that takes one compares it with the present one, and retires all spares of that login if it has
changed. What SQL cannot see, a new password or pg_hba.conf, takes effect after `spare_lifetime` at
the latest.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import ProtocolViolation, SQLError
from proxy.backends.backend import Backend, number
from proxy.backends.channels import Channels, Open
from proxy.backends.identity import IDENTITY, SYSTEM_ID, Login, StaleLoginError
from proxy.log import logger

_RETRY: Final = 5.0
"""Seconds until spares are tried again for a role that could not have one."""

LONGEST_COMMAND: Final = 4096
"""Bytes of an SQL text that may be a command about databases; they are short."""

DATABASE_COMMANDS: Final = (b"drop", b"alter", b"create")

_GIVE_WAY: Final = (0.02, 0.1, 0.3)
"""Seconds to wait for the server to free the slots of spares that gave way, at each try."""

Key = tuple[Login, tuple[tuple[bytes, bytes], ...]]
"""What a spare must have in common with who takes it: the login, and the settings of the startup
packet."""

_REPLACE_AFTER: Final = 0.002
"""Seconds until a spare that was taken is replaced: the launch comes first."""

_WARM_UP: Final = b"""
SELECT pg_catalog.pg_backend_pid(),
       pg_catalog.set_config('application_name', 'pg_background spare', false),
       LEAST(
           s.most OPERATOR(pg_catalog.-) s.reserved OPERATOR(pg_catalog.-) a.used
           OPERATOR(pg_catalog.-) (s.most OPERATOR(pg_catalog./) 10),
           CASE WHEN o.rolconnlimit OPERATOR(pg_catalog.>=) 0 OR
                     d.datconnlimit OPERATOR(pg_catalog.>=) 0 THEN 0 END
       ),
       %b,
       %b
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
""" % (SYSTEM_ID, IDENTITY)
"""Fills the backend's caches; the third column is above 0 if the server can spare the slot."""


@dataclass(slots=True)
class _Pool:
    """The spares of one login, oldest first, and those that are being opened.

    ``waiting``: launches that found none ready, and wait for one that is being opened.
    """

    ready: list[Backend] = field(default_factory=list)
    opening: int = 0
    not_before: float = 0.0
    waiting: deque[asyncio.Future[Backend | None]] = field(default_factory=deque)
    refill: asyncio.TimerHandle | None = None


class Spares:
    """The spares of all roles and databases."""

    def __init__(
        self,
        count: int,
        lifetime: float,
        channels: Channels,
        others_give_way: Callable[[], Awaitable[bool]],
    ) -> None:
        """
        Args:
            count: how many to keep for each login; 0 for none at all.
            lifetime: seconds after which an unused one is closed, and not replaced.
            channels: idle ones give way as spares do.
            others_give_way: has the other processes close theirs; whether there were any.
        """
        self.count = count
        self.lifetime = lifetime
        self._channels = channels
        self._others_give_way = others_give_way
        self._pools: dict[Key, _Pool] = {}
        # When the server may still be closing the last ones, by the loop's clock.
        self._closing_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

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
                _REPLACE_AFTER, self._fill, key, pool, open_one
            )
        return backend, spare is not None

    def _ready(self, pool: _Pool) -> Backend | None:
        while pool.ready:
            backend = pool.ready.pop()
            if backend.is_alive:
                return backend
        return None

    async def _opening(self, pool: _Pool) -> Backend | None:
        """One that is being opened and has no taker yet: it is ready sooner than a new one. None if
        that fails."""
        if pool.opening <= len(pool.waiting):
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
        """Give a new spare, or the news that there is none, to a launch that waits for it."""
        while pool.waiting:
            waiter = pool.waiting.popleft()
            if not waiter.done():
                waiter.set_result(backend)
                return True
        return False

    async def open_now(self, open_one: Open) -> Backend:
        """Open one that is needed. Spares give way to it if there is no room for both.

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
        """Close all spares, those that are being opened, and unused channels; whether there were
        any."""
        channels = self._channels.give_way()
        now = asyncio.get_running_loop().time()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        ready = [backend for pool in self._pools.values() for backend in pool.ready]
        for backend in ready:
            backend.terminate()
        for pool in self._pools.values():
            pool.ready.clear()
            pool.not_before = now + _RETRY
        if tasks or ready or channels:
            self._closing_until = now + sum(_GIVE_WAY)
        return now < self._closing_until

    def leave(self, sql: bytes) -> None:
        """Close the spares and unused channels in the databases that a statement, in lower case,
        seems to name, and open none there for a while."""
        sql = sql.replace(b'""', b'"')
        names = sql + b" template1" if b"create" in sql else sql
        self._close_all(lambda login: login.database.lower() in names, pause=_RETRY)

    def retire(self, login: Login) -> None:
        """Close the spares and unused channels of a login that would now come to something else."""
        self._close_all(lambda other: other == login)

    def _close_all(self, matches: Callable[[Login], bool], pause: float = 0.0) -> None:
        """`pause`: seconds in which no others are opened."""
        self._channels.retire(matches)
        until = asyncio.get_running_loop().time() + pause
        for (login, _), pool in self._pools.items():
            if matches(login):
                pool.not_before = max(pool.not_before, until if pause else 0.0)
                for backend in pool.ready:
                    backend.terminate()
                pool.ready.clear()

    def _fill(self, key: Key, pool: _Pool, open_one: Open) -> None:
        pool.refill = None
        if asyncio.get_running_loop().time() < pool.not_before:
            return
        for _ in range(self.count - len(pool.ready) - pool.opening + len(pool.waiting)):
            pool.opening += 1
            task = asyncio.get_running_loop().create_task(self._add(key, pool, open_one))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._opened, pool))

    def _opened(self, pool: _Pool, task: asyncio.Task[None]) -> None:
        # Also called for a task that was cancelled before it began.
        self._tasks.discard(task)
        pool.opening -= 1
        if len(pool.waiting) > pool.opening:
            self._hand_on(pool, None)

    async def _add(self, key: Key, pool: _Pool, open_one: Open) -> None:
        loop = asyncio.get_running_loop()
        taken = False
        try:
            backend = await open_one()
            try:
                row = await backend.row(_WARM_UP, 5)
                if number(row[0]) != backend.pid:
                    # It would say nothing of the connection that the job will get, or keep others
                    # from having it.
                    raise ConnectionError("there is a connection pooler before the server")
                backend.system_id = row[3]
                await backend.remember_identity(key[0], row[4])
                taken = self._hand_on(pool, backend)
                if not taken and number(row[2]) <= 0:
                    raise ConnectionError("the server has no connection to spare")
                if not taken and loop.time() < pool.not_before:
                    raise ConnectionError("it is to give way by now")
            except BaseException:
                backend.terminate()
                raise
            if not taken:
                pool.ready.append(backend)
                loop.call_later(self.lifetime, self._expire, key, pool, backend)
        except (SQLError, StaleLoginError, OSError, ProtocolViolation) as error:
            logger.debug("no spare backend: %s", error)
            pool.not_before = loop.time() + _RETRY

    def _expire(self, key: Key, pool: _Pool, backend: Backend) -> None:
        if backend in pool.ready:
            pool.ready.remove(backend)
            backend.terminate()
        if not (pool.ready or pool.opening or pool.refill) and self._pools.get(key) is pool:
            del self._pools[key]

    def close(self) -> None:
        """Close them all."""
        for pool in self._pools.values():
            if pool.refill is not None:
                pool.refill.cancel()
        self.give_way()
        self._pools.clear()
