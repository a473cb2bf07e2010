"""Writes the outcomes of jobs to a table of their database, `pg_background_history`, and reads it.

Invariant: the launching session never waits for this. A job gets a row once it has run for a
moment; the row is completed when it has ended. Another backend writes it: a channel with the role
that the job was launched with, so the state of the job's own backend does not matter, and jobs that
end together are written together. The channel stays while the end of a job with a row is to come:
if both the channel and the job's backend are gone, nobody will write the end, and the job is lost.
The server decides what a role may read and write (`extension/sql/record.sql`, `history_view.sql`).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from protocol.errors import CONNECTION_FAILURE, ProtocolViolation, ServerError, SQLError
from protocol.messages import ErrorResponse
from proxy.backends.channels import Channel
from proxy.backends.identity import Login
from proxy.config import Config
from proxy.jobs.context import Context
from proxy.jobs.job import Job
from proxy.jobs.registry import FULL_SQL_SIZE, NO_PID, Handle, JobRecord, shortened
from proxy.jobs.retries import RetriedJob
from proxy.jobs.termination import LendChannel
from proxy.log import logger
from proxy.reasons import explain
from proxy.sql.encodings import NO_CONVERSION, array_2_text, array_text
from proxy.sql.recoding import recoded

FIELDS: Final = 19
"""Number of fields of a row, as _pg_background_record takes it."""

MAX_ROWS_PER_WRITE: Final = 500
"""Rows in one write."""

_SOON: Final = 0.1
"""Seconds after which a running job gets its row. If it ends earlier, only its outcome is written.
"""

_MAX_PENDING: Final = 10_000
_MAX_PENDING_OF_ROLE: Final = 2_000
"""Limits of unwritten rows: of the process, and of one role."""

_SQL_SIZE: Final = 8 * 1024

_AGAIN: Final = (0.2, 1.0, 5.0)
_PASSING: Final = ("08", "40", "53", "55", "57")
"""Seconds before a failed write is retried, and the error classes for which it is: problems of the
connection, locks, lack of resources."""

_QUIET: Final = 60.0
"""Seconds between warnings for one login."""

_READ_TIMEOUT: Final = 5.0
"""Seconds for a query on the history."""

MAX_ROWS_READ: Final = 1_000
"""Rows of the history in a list, the newest."""

_BEGIN: Final = b"BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE"
_LIMITS: Final = (
    b"SELECT pg_catalog.set_config('client_encoding', $1, true),"
    b" pg_catalog.set_config('statement_timeout', '10s', true),"
    b" pg_catalog.set_config('lock_timeout', '3s', true)"
)
_SET: Final = b"SELECT pg_catalog.set_config($1, $2, true)"
_AS_STORED: Final = (
    b"SELECT pg_catalog.set_config('client_encoding',"
    b" pg_catalog.current_setting('server_encoding'), true)"
)
"""Keeps the server from converting: a single row that it cannot convert would hide all others."""

Command = tuple[bytes, Sequence[bytes]]


class SessionRole(NamedTuple):
    """The role as which a session reads and writes: its login, and what it has become since.

    Attributes:
        session_role: by SET SESSION AUTHORIZATION.
        set_role: by SET ROLE, or ``none``.
        encoding: client_encoding, of the names and the jobs' texts.
        server_encoding: of the database.
    """

    login: Login
    session_role: bytes
    set_role: bytes
    encoding: bytes
    server_encoding: bytes

    @classmethod
    def of(
        cls, login: Login, context: Context, encoding: bytes, server_encoding: bytes
    ) -> SessionRole:
        """The role of a call in a session with these encodings."""
        if server_encoding == b"SQL_ASCII":
            encoding = server_encoding  # no conversion: the database takes any bytes
        return cls(login, context.session_role, context.set_role, encoding, server_encoding)

    def taken(self) -> list[Command]:
        """The commands by which a channel becomes this role in a transaction."""
        commands: list[Command] = [(_LIMITS, (self.encoding,))]
        if self.session_role != self.login.user:
            commands.append((_SET, (b"session_authorization", self.session_role)))
        commands.append((_SET, (b"role", self.set_role)))
        return commands


@dataclass(slots=True, eq=False)
class _Entry:
    """A job that has a row, or may get one."""

    job: Job
    sql: bytes
    queued_at: datetime
    is_noted: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Writer:
    """Writes the rows of one role, one batch after another.

    ``open``: jobs whose rows have no end yet.
    """

    lease: LendChannel
    channel: Channel | None = None
    open: set[_Entry] = field(default_factory=set)
    pending: dict[Handle, _Entry] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class PastJob(JobRecord):
    """A job as read from the history."""

    def __init__(self, row: Sequence[bytes | None], cluster: bytes) -> None:
        """`row`: a row of `_READ`. Raises ValueError."""
        pid, cookie, role_id, state, started, finished, rows, tag, code, message, *rest = row
        label, sql, attempts, server_encoding = rest
        super().__init__(
            int(pid or 0),
            int(cookie or 0),
            sql or b"",
            queue_size=0,
            role_id=int(role_id or 0),
            cluster=cluster,
            encoding=_encoding_of_table(server_encoding or b""),
            label=label,
        )
        self._state = state or b""
        self.launched_at = _time(started) or self.launched_at
        self.finished_at = _time(finished)
        self.finished = self._state != b"running"
        self.attempts = int(attempts or 1)
        if tag is not None:
            self.tags = [tag if rows is None else tag + b" " + rows]
        if code is not None or message is not None or self._state == b"lost":
            fields = {"C": code or CONNECTION_FAILURE.encode(), "M": message or _LOST}
            self.error = ErrorResponse({"S": b"ERROR", **fields})

    @property
    def state(self) -> bytes:
        """running, stopped, canceled, error or lost."""
        return self._state


_LOST: Final = b"nobody knows how the job has ended"

_READ: Final = b"""
SELECT h.pid, h.cookie, h.role_id, h.state, EXTRACT(EPOCH FROM h.started_at),
  EXTRACT(EPOCH FROM h.finished_at), h.row_count, h.command_tag, h.sqlstate, h.message, h.label,
  pg_catalog."left"(h.sql, 480), h.attempts,
  pg_catalog.current_setting('server_encoding') FROM %b.pg_background_history h"""
_OF_HANDLES: Final = (
    b" WHERE EXISTS(SELECT 1 FROM ROWS FROM (pg_catalog.unnest(CAST($1 AS pg_catalog.int4[])),"
    b" pg_catalog.unnest(CAST($2 AS pg_catalog.int8[]))) AS p(pid, cookie)"
    b" WHERE p.cookie OPERATOR(pg_catalog.=) h.cookie"
    b" AND p.pid OPERATOR(pg_catalog.=) ANY (ARRAY[%d, h.pid]))" % NO_PID
)
_NEWEST: Final = b" ORDER BY h.started_at DESC LIMIT %d" % MAX_ROWS_READ


class History:
    """The history of the jobs of this process."""

    def __init__(
        self,
        config: Callable[[], Config],
        give_back: Callable[[Channel], None],
        find: bytes,
    ) -> None:
        """
        Args:
            config: returns the current configuration.
            give_back: takes a channel that was lent.
            find: SQL that returns the quoted schema of the history, if there is one.
        """
        self._config = config
        self._give_back = give_back
        self._find = find
        self._writers: dict[SessionRole, _Writer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        # When each login may be warned about again, by the loop's clock.
        self._is_quiet: dict[Login, float] = {}
        self._proxy = f"{socket.gethostname()}/{os.getpid()}".encode("ascii", "replace")

    @property
    def is_on(self) -> bool:
        """Whether the history is written, and so worth reading."""
        return self._config().history != "off"

    # Writing

    def follow(
        self, job: Job, sql: bytes, role: SessionRole, lease: LendChannel, *, waited: float
    ) -> None:
        """Record a job that has been started.

        Args:
            job: may have ended already.
            sql: its whole string; of a detached job, it has only the beginning.
            waited: seconds for room.
            role: as which it was launched.
            lease: lends a channel with the job's login.
        """
        config = self._config()
        if config.history == "off" or (config.history == "labeled" and job.label is None):
            return
        sql = shortened(sql, _SQL_SIZE if config.history_sql else FULL_SQL_SIZE, job.encoding)
        if not config.history_sql:
            sql = b"sha256:" + hashlib.sha256(sql).hexdigest().encode()
        entry = _Entry(job, sql, job.launched_at - timedelta(seconds=waited))
        writer = self._writers.setdefault(role, _Writer(lease))
        note = functools.partial(self._note, role, writer, entry)
        if not job.finished:
            entry.timer = asyncio.get_running_loop().call_later(_SOON, note)
            if isinstance(job, RetriedJob):
                job.on_change = functools.partial(self._changed, note, entry)
        job.when_finished(note)

    def _changed(self, note: Callable[[], None], entry: _Entry) -> None:
        """A retried job has another backend, or none for a while."""
        if entry.is_noted:
            note()

    def _note(self, role: SessionRole, writer: _Writer, entry: _Entry) -> None:
        """Have the present state of the job written."""
        if entry.timer is not None:
            entry.timer.cancel()
        if not (entry.is_noted or self._is_worth_a_row(entry.job)):
            self._forget(role, writer)
            return
        if entry.job.handle not in writer.pending:
            if self._count >= _MAX_PENDING or len(writer.pending) >= _MAX_PENDING_OF_ROLE:
                self._warn(role.login, "too much is to be written; jobs have no row")
                return
            self._count += 1
        entry.is_noted = True  # from now on it may have a row
        writer.pending[entry.job.handle] = entry
        if writer.task is None:
            self._writers[role] = writer
            writer.task = asyncio.get_running_loop().create_task(self._write_all(role, writer))
            self._tasks.add(writer.task)
            writer.task.add_done_callback(self._tasks.discard)

    def _is_worth_a_row(self, job: Job) -> bool:
        return self._config().history != "errors" or _state(job) != b"stopped"

    def _forget(self, role: SessionRole, writer: _Writer) -> None:
        is_idle = writer.task is None and not writer.open
        if is_idle and self._writers.get(role) is writer:
            del self._writers[role]

    async def _write_all(self, role: SessionRole, writer: _Writer) -> None:
        try:
            while writer.pending:
                handles = list(writer.pending)[:MAX_ROWS_PER_WRITE]
                entries = [writer.pending.pop(handle) for handle in handles]
                self._count -= len(entries)
                writer.open.update(entries)
                is_written = await self._write(role, writer, entries)
                writer.open -= {each for each in entries if each.job.finished or not is_written}
                writer.open |= {each for each in writer.pending.values() if each.job.finished}
        finally:
            self._count -= len(writer.pending)
            writer.task = None
            if writer.channel is not None and not writer.open:
                self._give_back(writer.channel)
                writer.channel = None
            self._forget(role, writer)

    async def _write(self, role: SessionRole, writer: _Writer, entries: list[_Entry]) -> bool:
        """Write the present state of these jobs. Returns whether that worked."""
        for delay in (*_AGAIN, None):
            try:
                await self._write_once(role, writer, [self._row(entry, role) for entry in entries])
            except (SQLError, OSError, ProtocolViolation) as error:
                reason = explain(error)
                lasts = isinstance(error, SQLError) and error.sqlstate[:2] not in _PASSING
                if isinstance(error, ServerError) and error.sqlstate[:2] == "22":
                    reason = await self._write_one_by_one(role, writer, entries)
                    if not reason:
                        return True
                elif delay is not None and not lasts:
                    await asyncio.sleep(delay)
                    continue
                self._warn(role.login, f"{len(entries)} jobs have no row: {reason}")
                return False
            else:
                return True
        return False

    async def _write_one_by_one(
        self, role: SessionRole, writer: _Writer, entries: list[_Entry]
    ) -> str:
        """Write each row by itself, since the server cannot convert some text; a row that has it is
        written in ASCII. Returns the error, if it was another."""
        reason = ""
        for entry in entries:
            row = self._row(entry, role)
            in_ascii = [None if text is None else _ascii(text) for text in row]
            try:
                try:
                    await self._write_once(role, writer, [row])
                except ServerError as error:
                    if error.sqlstate[:2] != "22":
                        raise
                    await self._write_once(role, writer, [in_ascii])
            except (SQLError, OSError, ProtocolViolation) as error:
                reason = explain(error)
        return reason

    async def _write_once(
        self, role: SessionRole, writer: _Writer, rows: Sequence[Sequence[bytes | None]]
    ) -> None:
        """Raises SQLError, OSError, ProtocolViolation."""
        if writer.channel is not None and not writer.channel.is_alive:
            self._give_back(writer.channel)
            writer.channel = None
        if writer.channel is None:
            writer.channel = await writer.lease()
        schema = await self._schema(writer.channel, role)
        if schema is None:
            self._warn(role.login, "there is no table for the jobs")
            writer.open.clear()
            return
        record = b"SELECT %b._pg_background_record($1)" % schema
        await writer.channel.transact(
            (_BEGIN, ()),
            *role.taken(),
            (record, (array_2_text(rows, role.encoding),)),
            (b"COMMIT", ()),
        )

    def _warn(self, login: Login, message: str) -> None:
        """Log a warning, at most once a minute for each login."""
        now = asyncio.get_running_loop().time()
        if self._is_quiet.get(login, 0.0) <= now:
            self._is_quiet = {each: until for each, until in self._is_quiet.items() if until > now}
            self._is_quiet[login] = now + _QUIET
            names = [name.decode("utf-8", "replace") for name in (login.user, login.database)]
            logger.warning("history: %s (role %s, database %s)", message, *names)

    async def _schema(self, channel: Channel, role: SessionRole) -> bytes | None:
        *_, last = await channel.transact((_LIMITS, (role.encoding,)), (self._find, ()))
        return last[0] if len(last) == 1 else None

    def _row(self, entry: _Entry, role: SessionRole) -> list[bytes | None]:
        """The present state of a job, for _pg_background_record."""
        job, config = entry.job, self._config()
        rests = isinstance(job, RetriedJob) and job.rests
        percentage, progress = job.progress
        is_worth_it = self._is_worth_a_row(job)
        values = [
            *(job.pid, job.cookie, 0 if rests else job.backend_pid),
            job.label,  # its length is limited already
            *(entry.sql, _epoch(entry.queued_at), _epoch(job.launched_at)),
            *(_epoch(job.finished_at), config.history_retention),
            *(_state(job) if is_worth_it else None, job.attempts, job.row_count, job.command_tag),
            *(job.error_field(code) for code in "CMD"),
            *(percentage, progress, self._proxy),
        ]
        assert len(values) == FIELDS
        # Text in an encoding that a job has set itself may be invalid in this one.
        is_raw = role.server_encoding in NO_CONVERSION
        target = _encoding_of_table(role.server_encoding) if is_raw else job.encoding
        return [
            None
            if value is None
            else recoded(value, job.encoding, target)
            if isinstance(value, bytes)
            else str(value).encode()
            for value in values
        ]

    async def finish(self, seconds: float) -> None:
        """Write what is pending, within this many seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    # Reading

    async def read(
        self,
        role: SessionRole,
        lease: LendChannel,
        cluster: bytes,
        handles: Sequence[Handle] | None,
    ) -> list[PastJob]:
        """The history of these jobs, or the newest, as this role may see it; empty on failure."""
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                channel = await lease()
                try:
                    rows = await self._read(channel, role, handles)
                finally:
                    self._give_back(channel)
            return [PastJob(row, cluster) for row in rows]
        except (SQLError, OSError, ProtocolViolation, ValueError) as error:
            logger.info("history: %s", explain(error))
            return []

    async def _read(
        self, channel: Channel, role: SessionRole, handles: Sequence[Handle] | None
    ) -> list[tuple[bytes | None, ...]]:
        schema = await self._schema(channel, role)
        if schema is None:
            return []
        query: Command = (_READ % schema + _NEWEST, ())
        if handles is not None:
            pids = [b"%d" % pid for pid, _ in handles]
            cookies = [b"%d" % cookie for _, cookie in handles]
            arrays = [array_text(column, role.encoding) for column in (pids, cookies)]
            query = (_READ % schema + _OF_HANDLES, arrays)
        rows = await channel.transact(*role.taken(), (_AS_STORED, ()), query)
        return [row for row in rows if len(row) == _COLUMNS]


_COLUMNS: Final = 14
"""Number of columns of `_READ`."""


def _state(job: Job) -> bytes:
    if job.is_abandoned:
        return b"lost"
    if job.is_lost and job.error is not None and job.error.sqlstate == CONNECTION_FAILURE:
        return b"lost"
    return job.state


def _epoch(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _time(epoch: bytes | None) -> datetime | None:
    return None if epoch is None else datetime.fromtimestamp(float(epoch), UTC)


def _encoding_of_table(server_encoding: bytes) -> bytes:
    """The encoding of texts in the table. In a database that takes any bytes it is UTF-8, since one
    text in another encoding would break each list that includes it."""
    return b"UTF8" if server_encoding == b"SQL_ASCII" else server_encoding


def _ascii(text: bytes) -> bytes:
    return text.decode("ascii", "replace").replace("\N{REPLACEMENT CHARACTER}", "?").encode()
