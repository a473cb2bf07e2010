"""Short ways to launch jobs, fetch their results, and look at their outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg import sql
from psycopg.abc import Query
from psycopg.errors import Diagnostic

from tests.support.servers import Connection

T = TypeVar("T")
Row = tuple[Any, ...]
Fields = dict[str, str | None]

TIMEOUT: Final = 20.0

DIAGNOSTICS: Final = (
    "severity",
    "severity_nonlocalized",
    "sqlstate",
    "message_primary",
    "message_detail",
    "message_hint",
    "statement_position",
    "internal_position",
    "internal_query",
    "schema_name",
    "table_name",
    "column_name",
    "datatype_name",
    "constraint_name",
    "source_file",
    "source_line",
    "source_function",
)
"""The fields of an error or notice, all but CONTEXT."""


def launch(conn: Connection, job: str, queue_size: int = 0) -> int:
    """Launches a job through parameters; returns its pid."""
    row = conn.execute("SELECT pg_background_launch(%s, %s)", [job, queue_size]).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


def result(conn: Connection, pid: int, columns: str | None = None) -> list[Row]:
    """A job's rows; ``columns`` is the column definition list, if any."""
    definition = f" AS ({columns})" if columns else ""
    query = sql.SQL(f"SELECT * FROM pg_background_result({{}}){definition}")
    return conn.execute(query.format(pid)).fetchall()


def run(conn: Connection, job: str, columns: str | None = None) -> list[Row]:
    """Launches a job and returns its rows."""
    return result(conn, launch(conn, job), columns)


def value(conn: Connection, job: str) -> Any:
    """The one value that a job returns without a column definition list."""
    [[found]] = run(conn, job)
    return found


def failure(conn: Connection, query: Query, *args: Any) -> psycopg.Error:
    """The error of a statement. Outside a transaction block the session goes on."""
    idle = conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    try:
        conn.execute(query, *args)
    except psycopg.Error as error:
        status = conn.info.transaction_status
        if idle and conn.autocommit:
            assert status == psycopg.pq.TransactionStatus.IDLE
            assert conn.execute("SELECT 1").fetchone() == (1,)
        else:
            assert status == psycopg.pq.TransactionStatus.INERROR
        return error
    raise AssertionError("there was no error")


def job_failure(conn: Connection, job: str) -> psycopg.Error:
    """The error of a job, from its result."""
    return failure(conn, "SELECT * FROM pg_background_result(%s)", [launch(conn, job)])


def message(error: psycopg.Error) -> tuple[str | None, str | None]:
    """SQLSTATE and message."""
    return error.sqlstate, error.diag.message_primary


def fields(diagnostic: Diagnostic) -> Fields:
    """All fields but CONTEXT."""
    return {name: getattr(diagnostic, name) for name in DIAGNOSTICS}


@contextmanager
def notices(conn: Connection) -> Iterator[list[Fields]]:
    """Collects the fields of the notices that come, CONTEXT included."""
    collected: list[Fields] = []

    def collect(diagnostic: Diagnostic) -> None:
        collected.append({**fields(diagnostic), "context": diagnostic.context})

    conn.add_notice_handler(collect)
    try:
        yield collected
    finally:
        conn.remove_notice_handler(collect)


def wait_until(look: Callable[[], T], timeout: float = TIMEOUT) -> T:
    """Calls `look` again and again until it returns something; returns that."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return found


def cancel_sleep(observer: Connection, pid: int) -> None:
    """Calls pg_cancel_backend() for a job as soon as it sleeps. The server ignores that until
    it has begun with the job's text, a moment after the pid is known."""
    sleeps = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND query LIKE '%%pg_sleep%%'"
    wait_until(lambda: observer.execute(sleeps, [pid]).fetchone())
    observer.execute("SELECT pg_cancel_backend(%s)", [pid])


def spares_of(observer: Connection, conn: Connection) -> set[int]:
    """The pids of the spares for the jobs of a session, and of others of its role in its database.
    The role or the database must be the test's own, because other proxies have spares too.
    """
    query = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background spare'"
        " AND usename = %s AND datname = %s"
    )
    return {pid for (pid,) in observer.execute(query, [conn.info.user, conn.info.dbname])}


def has_ended(observer: Connection, pid: int) -> bool:
    """Whether a backend is gone."""
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    return observer.execute(query, [pid]).fetchone() is None


def wait_until_ended(observer: Connection, pid: int) -> None:
    """Waits until a backend is gone."""
    wait_until(lambda: has_ended(observer, pid))
