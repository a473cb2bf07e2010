"""Keeps backends whose jobs have ended for the next jobs of the same session.

Invariant: other sessions never meet what a job has left in a backend, and its own session only what
DISCARD ALL leaves. A backend is reset as soon as its job ends, so it keeps no locks or temporary
tables. It serves another job only once the session is done with the last one, which its pid means
until then. It is not reused if something noticeable may survive DISCARD ALL (`_RESET`,
`is_remembered`), or if its job was cancelled: a signal may still arrive.

To the server it is a spare (`spares`): its login still holds and is no older than a spare's may be,
and it gives way when spares do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias

from protocol.errors import ProtocolViolation, SQLError
from proxy.backends.backend import Backend
from proxy.backends.identity import HAS_LOGIN_TRIGGERS, Login, StaleLoginError
from proxy.backends.spares import GREETING, Key, Spares
from proxy.log import logger
from proxy.reasons import explain
from proxy.sql.lexer import READING

_FORGETFUL: Final = """
    adminpack amcheck autoinc aws_commons aws_s3 bloom btree_gin btree_gist citext cube dict_int
    dict_xsyn earthdistance file_fdw fuzzystrmatch hstore insert_username intagg intarray lo ltree
    moddatetime old_snapshot pageinspect pg_buffercache pg_cron pg_freespacemap pg_partman
    pg_prewarm pg_repack pg_stat_statements pg_surgery pg_trgm pg_visibility pg_walinspect pgaudit
    pgcrypto pgrowlocks pgstattuple plpgsql postgis postgis_raster postgis_topology rds_tools seg
    sslinfo tablefunc tcn tsm_system_rows tsm_system_time unaccent uuid-ossp vector xml2
    """.split()  # noqa: SIM905 - one word a name
"""Extensions that keep nothing in a session. Others may: dblink and postgres_fdw connections, isn a
setting, hypopg indexes, procedural languages globals."""

STYLES: Final = (b"DateStyle", b"IntervalStyle")
"""Settings that affect how rows of a job from inside the database are read."""

_KNOWN: Final = (*READING, *STYLES)
"""Settings that the proxy must know; a job's text is read by their values at its start."""

_RESET: Final = (
    GREETING
    + (
        b", NOT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname OPERATOR(pg_catalog.<>)"
        b" ALL (CAST('{%b}' AS pg_catalog.name[])))"
        b" AND NOT EXISTS (SELECT FROM pg_catalog.pg_language WHERE lanname OPERATOR(pg_catalog.<>)"
        b" ALL (CAST('{internal,c,sql,plpgsql}' AS pg_catalog.name[])))"
        # Local buffers may exist, whose number can no longer be changed.
        b" AND pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.=) 0"
        # What they do in a new session is undone by a reset.
        b" AND NOT %b"
        # Not everybody can see a session's origin. Those named pg_… belong to subscriptions.
        b" AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_origin"
        b" WHERE pg_catalog.left(roname, 3) OPERATOR(pg_catalog.<>) 'pg_')"
        # Temporary ones.
        b" AND NOT EXISTS (SELECT FROM pg_catalog.pg_get_replication_slots()"
        b" WHERE active_pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())"
        % (",".join(_FORGETFUL).encode(), HAS_LOGIN_TRIGGERS)
    )
    + b"".join(b", pg_catalog.current_setting('%b')" % name for name in _KNOWN)
)
"""Asks what a new spare is asked, for state that survives DISCARD ALL, and for `_KNOWN`."""

_LONGEST_READ: Final = 64 * 1024
"""Bytes of a job's SQL that are searched."""

_RESET_AFTER: Final = 0.001
"""Seconds, since the answer to a launch goes first if its job has already ended."""

ReleaseBackend: TypeAlias = Callable[[], None]
"""Called when the session is done with the job whose backend was kept."""

KeepBackend: TypeAlias = "Callable[[Backend], ReleaseBackend | None]"
"""Takes a backend whose job has ended; returns None if it is closed."""


def is_remembered(sql: bytes) -> bool:
    """Whether a job may leave state that no query finds: a base backup lasts for a session."""
    return len(sql) > _LONGEST_READ or b"backup" in sql.lower()


class Reuse:
    """The kept backends of one session, oldest first."""

    def __init__(self, spares: Spares) -> None:
        self._spares = spares
        self._kept: list[_KeptBackend] = []
        self._is_closed = False

    def take(self, key: Key) -> Backend | None:
        """A backend that is ready. `key`: as for `Spares.take`."""
        for kept in reversed(self._kept):
            if kept.key == key and kept.is_ready:
                kept.forget()
                return kept.backend
        return None

    def keep(self, key: Key, backend: Backend) -> ReleaseBackend | None:
        """A `KeepBackend` for backends with this key."""
        spares = self._spares
        age = asyncio.get_running_loop().time() - backend.logged_in
        lifetime = min(spares.reuse_lifetime, spares.lifetime - age)
        is_wanted = lifetime > 0 and len(self._kept) < spares.count and not self._is_closed
        # Opened for one job, a backend does not remember what its login was based on.
        if not is_wanted or backend.is_spent or backend.identity is None:
            backend.terminate()
            return None
        return _KeptBackend(key, backend, lifetime, spares, self._kept).use.end

    def close(self) -> None:
        """The session ends."""
        self._is_closed = True
        for kept in tuple(self._kept):
            kept.close()


class _Use:
    """A job's hold on a kept backend, while the session has the job."""

    def __init__(self) -> None:
        self.is_over = False

    def end(self) -> None:
        """The session is done with the job."""
        self.is_over = True


class _KeptBackend:
    """A kept backend, listed for its session and in `Spares`."""

    def __init__(
        self,
        key: Key,
        backend: Backend,
        lifetime: float,
        spares: Spares,
        others: list[_KeptBackend],
    ) -> None:
        self.key = key
        self.backend = backend
        self._spares = spares
        self._others = others
        self.use = _Use()
        self._is_reset = False
        backend.rest()
        backend.on_lost = self.close
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(lifetime, self.close)
        self._resetting: asyncio.Task[None] | None = None
        self._begin = loop.call_later(_RESET_AFTER, self._begin_reset)
        others.append(self)
        spares.kept.add(self)

    @property
    def login(self) -> Login:
        """The backend's login."""
        return self.key[0]

    @property
    def is_ready(self) -> bool:
        """Whether it may serve another job."""
        return self.use.is_over and self._is_reset and self.backend.is_alive

    def _begin_reset(self) -> None:
        self._resetting = asyncio.get_running_loop().create_task(self._reset())

    async def _reset(self) -> None:
        try:
            row = await self.backend.reset(self.login, _RESET)
            is_forgotten, *values = row[-1 - len(_KNOWN) :]
            if is_forgotten != b"t":
                raise ConnectionError("something may remember its last job")
            settings = zip(_KNOWN, values, strict=True)
            self.backend.parameters |= {name: value or b"" for name, value in settings}
            self._is_reset = True
        except (SQLError, StaleLoginError, OSError, ProtocolViolation) as error:
            logger.debug("a backend is not used again: %s", explain(error))
            self.close()

    def forget(self) -> None:
        """Remove it from the lists."""
        self._timer.cancel()
        self.backend.on_lost = None
        self._spares.kept.discard(self)
        if self in self._others:
            self._others.remove(self)

    def close(self) -> None:
        self.forget()
        self._begin.cancel()
        if self._resetting is not None:
            self._resetting.cancel()
        self.backend.terminate()
