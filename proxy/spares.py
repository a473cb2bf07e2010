"""Side backends that are logged in before they are needed.

The rule: a spare is what a fresh login would have been a moment ago, and serves one job like it.
Nobody gets one who has not been let in by the server as that role. None is opened for a role and
database that never launch, none lives longer than `spare_lifetime`, and none takes a connection
slot that is among the last free ones. So a role's new password, a lost membership, a DROP ROLE or
an ALTER ROLE … SET is obeyed by launches after `spare_lifetime` at the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import SQLError
from proxy.backend import Backend, ServerError
from proxy.log import logger

_RETRY: Final = 5.0
"""Seconds until spares are tried again for a role that could not have one."""

_GIVE_WAY: Final = (0.02, 0.1, 0.3)
"""Seconds to wait for the server to free the slots of spares that gave way, at each try."""

Open = Callable[[], Awaitable[Backend]]

_WARM_UP: Final = b"""
SELECT pg_catalog.pg_backend_pid(),
       pg_catalog.set_config('application_name', 'pg_background spare', false),
       LEAST(
           m.setting::pg_catalog.int4 OPERATOR(pg_catalog.-) r.reserved OPERATOR(pg_catalog.-)
           a.used OPERATOR(pg_catalog.-) (m.setting::pg_catalog.int4 OPERATOR(pg_catalog./) 10),
           CASE WHEN o.rolconnlimit OPERATOR(pg_catalog.>=) 0 OR
                     d.datconnlimit OPERATOR(pg_catalog.>=) 0 THEN 0 END
       )
FROM pg_catalog.pg_settings m,
     (SELECT pg_catalog.sum(s.setting::pg_catalog.int4)::pg_catalog.int4 AS reserved
      FROM pg_catalog.pg_settings s
      WHERE s.name OPERATOR(pg_catalog.=) 'superuser_reserved_connections'
         OR s.name OPERATOR(pg_catalog.=) 'reserved_connections') r,
     (SELECT pg_catalog.count(*)::pg_catalog.int4 AS used
      FROM pg_catalog.pg_stat_activity) a,
     pg_catalog.pg_roles o, pg_catalog.pg_database d
WHERE m.name OPERATOR(pg_catalog.=) 'max_connections'
  AND o.rolname OPERATOR(pg_catalog.=) session_user
  AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
"""
"""Fills the backend's caches; the third column is above 0 if the server can spare the slot."""


@dataclass(slots=True)
class _Pool:
    """The spares of one login, oldest first, and those that are being opened."""

    ready: list[Backend] = field(default_factory=list)
    opening: int = 0
    not_before: float = 0.0


class Spares:
    """The spares of all roles and databases."""

    def __init__(self, count: int, lifetime: float) -> None:
        """
        Args:
            count: how many to keep for each login; 0 for none at all.
            lifetime: seconds after which one that nobody needed is closed, and not replaced.
        """
        self._count = count
        self._lifetime = lifetime
        self._pools: dict[Hashable, _Pool] = {}
        # When the server may still be closing the last ones, by the loop's clock.
        self._closing_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, login: Hashable, open_one: Open) -> tuple[Backend, bool]:
        """A backend for a job, and whether it is a spare; others are opened to replace it.

        Args:
            login: what a spare must have in common with this one: server, role, database and the
                settings of the startup packet.
            open_one: opens and logs in a backend; raises SQLError.
        """
        pool = self._pools.setdefault(login, _Pool())
        while pool.ready:
            backend = pool.ready.pop()
            if backend.is_alive:
                self._fill(login, pool, open_one)
                return backend, True
        backend = await self._open_now(open_one)
        self._fill(login, pool, open_one)
        return backend, False

    async def _open_now(self, open_one: Open) -> Backend:
        """Open one for a job. Spares give way to it if there is no room for both."""
        for delay in _GIVE_WAY:
            try:
                return await open_one()
            except SQLError as error:
                if not (error.sqlstate.startswith("53") and self._give_way()):
                    raise
            await asyncio.sleep(delay)
        return await open_one()

    def _give_way(self) -> bool:
        """Close all spares, and those that are being opened; whether there were any."""
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
        if tasks or ready:
            self._closing_until = now + sum(_GIVE_WAY)
        return now < self._closing_until

    def _fill(self, login: Hashable, pool: _Pool, open_one: Open) -> None:
        if asyncio.get_running_loop().time() < pool.not_before:
            return
        for _ in range(self._count - len(pool.ready) - pool.opening):
            pool.opening += 1
            task = asyncio.get_running_loop().create_task(self._add(login, pool, open_one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _add(self, login: Hashable, pool: _Pool, open_one: Open) -> None:
        loop = asyncio.get_running_loop()
        try:
            backend = await open_one()
            try:
                row = await backend.query(_WARM_UP)
                if row[2] is None or int(row[2]) <= 0:
                    raise ConnectionError("the server has no connection to spare")
            except BaseException:
                backend.terminate()
                raise
            pool.ready.append(backend)
            loop.call_later(self._lifetime, self._expire, login, pool, backend)
        except (SQLError, ServerError, OSError, ValueError, LookupError) as error:
            # The last two, ProtocolViolation among them, are about an answer that is none.
            logger.debug("no spare backend: %s", error)
            pool.not_before = loop.time() + _RETRY
        finally:
            pool.opening -= 1

    def _expire(self, login: Hashable, pool: _Pool, backend: Backend) -> None:
        if backend in pool.ready:
            pool.ready.remove(backend)
            backend.terminate()
        if not pool.ready and not pool.opening:
            self._pools.pop(login, None)

    def close(self) -> None:
        """Close them all."""
        self._give_way()
        self._pools.clear()
