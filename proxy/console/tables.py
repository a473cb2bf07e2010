"""What SHOW shows: columns, and the rows that this process knows.

Invariant: a row is a list of JSON values, so that it can be sent to another process; times are in
PostgreSQL's text form. Column names are PgBouncer's or, for jobs, the extension's, where they have
such columns. No row has a password, a secret or a cookie.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeAlias

from protocol.values import oids
from proxy import __version__
from proxy.backends.identity import Login
from proxy.config import SETTINGS
from proxy.jobs.job import Job
from proxy.jobs.service import JobService
from proxy.net.connection import Connection
from proxy.runtime import FIXED, Runtime
from proxy.session.services import Served
from proxy.sql.recoding import readable

Value: TypeAlias = "str | int | float | bool | None"
Row: TypeAlias = "list[Value]"
Columns: TypeAlias = "Mapping[str, int]"
"""Type OIDs by column name."""

_TEXT, _INT4, _INT8 = oids.TEXT, oids.INT4, oids.INT8
_TIME: Final = oids.TIMESTAMPTZ

_BEGAN: Final = datetime.now(UTC)

TABLES: Final[Mapping[str, Columns]] = {
    "jobs": {
        "pid": _INT4,
        "worker": _INT4,
        "user": _TEXT,
        "database": _TEXT,
        "host": _TEXT,
        "label": _TEXT,
        "state": _TEXT,
        "launched_at": _TIME,
        "finished_at": _TIME,
        "elapsed_ms": _INT8,
        "progress": _INT4,
        "progress_message": _TEXT,
        "row_count": _INT8,
        "command_tag": _TEXT,
        "sqlstate": _TEXT,
        "error_message": _TEXT,
        "sql_preview": _TEXT,
    },
    "sessions": {
        "id": _TEXT,
        "worker": _INT4,
        "user": _TEXT,
        "database": _TEXT,
        "state": _TEXT,
        "addr": _TEXT,
        "port": _INT4,
        "local_addr": _TEXT,
        "local_port": _INT4,
        "connect_time": _TIME,
        "host": _TEXT,
        "backend_pid": _INT4,
        "jobs": _INT4,
        "tls": _TEXT,
        "application_name": _TEXT,
    },
    "spares": {
        "worker": _INT4,
        "user": _TEXT,
        "database": _TEXT,
        "host": _TEXT,
        "ready": _INT4,
        "opening": _INT4,
        "waiting": _INT4,
    },
    "channels": {
        "worker": _INT4,
        "user": _TEXT,
        "database": _TEXT,
        "host": _TEXT,
        "idle": _INT4,
        "used": _INT4,
        "waiting": _INT4,
    },
    "stats": {
        "database": _TEXT,
        "jobs_launched": _INT8,
        "jobs_completed": _INT8,
        "jobs_failed": _INT8,
        "jobs_canceled": _INT8,
        "jobs_timed_out": _INT8,
        "jobs_active": _INT8,
        "avg_execution_ms": oids.FLOAT8,
    },
    "workers": {
        "worker": _INT4,
        "pid": _INT4,
        "state": _TEXT,
        "sessions": _INT4,
        "jobs": _INT4,
        "spares": _INT4,
        "channels": _INT4,
        "start_time": _TIME,
    },
    "config": {"key": _TEXT, "value": _TEXT, "default": _TEXT, "changeable": _TEXT},
    "version": {"version": _TEXT},
}
"""The columns of each table."""


class LocalProcess(Protocol):
    """The process, as the tables see it."""

    @property
    def runtime(self) -> Runtime:
        """The live objects made of the configuration."""

    @property
    def jobs(self) -> JobService:
        """The jobs of all sessions."""

    @property
    def sessions(self) -> Collection[Served]:
        """All sessions that have not ended."""


def rows(name: str, process: LocalProcess) -> Iterator[Row]:
    """The rows of a table that this process knows; others may get a turn between rows.

    For ``stats`` and ``workers`` they are the input of `merged_stats` and `workers`.
    """
    return _ROWS[name](process)


def session_id(number: int) -> str:
    """Identifies a session among those of all processes."""
    return f"{os.getpid()}.{number}"


# The tables


def _jobs(process: LocalProcess) -> Iterator[Row]:
    return map(_job, list(process.jobs.registry))


def _job(job: Job) -> Row:
    percentage, message = job.progress
    return [
        *(job.pid or None, os.getpid(), _text(job.user), _text(job.database), str(job.route)),
        *(_of(job, job.label), _text(job.state), _time(job.launched_at), _time(job.finished_at)),
        *(job.elapsed_ms, percentage, _of(job, message), job.row_count, _text(job.command_tag)),
        *(_text(job.error_field("C")), _of(job, job.error_field("M")), _of(job, job.preview)),
    ]


def sorted_jobs(found: list[Row]) -> list[Row]:
    """Running jobs first, then waiting ones, each with the last launched first."""
    names = list(TABLES["jobs"])
    state, launched = names.index("state"), names.index("launched_at")
    found.sort(key=lambda row: str(row[launched]), reverse=True)
    order = {"running": 0, "queued": 1, "pending": 1}
    found.sort(key=lambda row: order.get(str(row[state]), 2))
    return found


def _sessions(process: LocalProcess) -> Iterator[Row]:
    for session in sorted(process.sessions, key=lambda session: session.summary.number):
        seen = session.summary
        yield [
            *(session_id(seen.number), os.getpid(), _text(seen.user), _text(seen.database)),
            *(seen.state, *_addresses(session.client), _time(seen.connected_at)),
            *(None if session.is_console else str(session.route), seen.backend_pid or None),
            *(seen.jobs, _tls(session.client), _text(seen.application_name)),
        ]


def _addresses(client: Connection) -> Iterator[Value]:
    """The client's address and port, and ours."""
    if not client.is_open:
        yield from (None, None, None, None)
        return
    own = client.transport.get_extra_info("sockname")
    for address in (client.peer.name, own):
        yield from address[:2] if isinstance(address, tuple) else ("unix", None)


def _tls(client: Connection) -> str:
    found = client.transport.get_extra_info("cipher") if client.is_open else None
    return "" if found is None else f"{found[1]}/{found[0]}"


def _logins(found: Iterator[tuple[Login, int, int, int]]) -> Iterator[Row]:
    for login, *numbers in found:
        names = (_text(login.user), _text(login.database), str(login.route))
        yield [os.getpid(), *names, *numbers]


def _stats(process: LocalProcess) -> Iterator[Row]:
    for database, counts in list(process.jobs.counts.items()):
        ended = counts.completed, counts.failed, counts.canceled, counts.timed_out
        yield [_text(database), counts.launched, *ended, counts.active, counts.total_ms]


def merged_stats(found: list[Row]) -> list[Row]:
    """One row for each database, over all processes; the last column is the mean."""
    sums: dict[str, list[int]] = {}
    for database, *numbers in found:
        before = sums.get(str(database), [0] * len(numbers))
        sums[str(database)] = [a + int(b or 0) for a, b in zip(before, numbers, strict=True)]
    merged: list[Row] = []
    for database, (launched, completed, failed, canceled, timed_out, active, ms) in sorted(
        sums.items()
    ):
        ended = completed + failed + canceled
        mean = round(ms / ended, 3) if ended else 0.0
        merged.append([database, launched, completed, failed, canceled, timed_out, active, mean])
    return merged


def _worker(process: LocalProcess) -> Iterator[Row]:
    spares = sum(ready for _, ready, _, _ in process.jobs.spares.overview())
    channels = sum(idle + used for _, idle, used, _ in process.jobs.channels.overview())
    running = len(process.jobs.registry.running)
    yield [os.getpid(), len(process.sessions), running, spares, channels, _time(_BEGAN)]


def workers(processes: list[Row], known: list[Row]) -> list[Row]:
    """The table, from the supervisor's rows about processes (number, pid, state, sessions) and from
    the rows of those that have answered."""
    of_pid = {row[0]: row[2:] for row in known}
    return [[*process, *of_pid.get(process[1], [None] * 4)] for process in processes]


def _config(process: LocalProcess) -> Iterator[Row]:
    config = process.runtime.config
    for field in SETTINGS:
        yield [
            field.name,
            _shown(getattr(config, field.name)),
            str(field.metadata["default"]),
            "no" if field.name in FIXED else "yes",
        ]


def _shown(value: Any) -> str:
    """A setting as in the file, except for lists and the upstream, which is its hosts."""
    match value:
        case None:
            return ""
        case bool():
            return "on" if value else "off"
        case float() if value == math.inf:
            return "unlimited"
        case float():
            return f"{value:g}s"
        case tuple():
            return ", ".join(map(_shown, value))
        case _:
            return str(value)


def _version(process: LocalProcess) -> Iterator[Row]:
    yield [f"pg-background-proxy {__version__}"]


_ROWS: Final[Mapping[str, Callable[[LocalProcess], Iterator[Row]]]] = {
    "jobs": _jobs,
    "sessions": _sessions,
    "spares": lambda process: _logins(process.jobs.spares.overview()),
    "channels": lambda process: _logins(process.jobs.channels.overview()),
    "stats": _stats,
    "workers": _worker,
    "config": _config,
    "version": _version,
}


def _of(job: Job, text: bytes | None) -> str | None:
    return None if text is None else readable(text, job.encoding).replace("\0", "?")


def _text(name: bytes | None) -> str | None:
    return None if name is None else name.decode("utf-8", "replace").replace("\0", "?")


def _time(moment: datetime | None) -> str | None:
    """A time as PostgreSQL prints it with DateStyle ISO and TimeZone UTC."""
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00"


def as_text(value: Value) -> bytes | None:
    """The text form of a row's value."""
    if value is None:
        return None
    if isinstance(value, bool):
        return b"t" if value else b"f"
    return str(value).encode("utf-8", "replace")
