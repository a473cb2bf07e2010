"""A session that waits in a direct call is seen to wait; what ends a statement ends the call."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, Final

import psycopg
import pytest
from psycopg import errors

from proxy.jobs.interrupts import VISIBLE_AFTER
from tests.support.api_clients import Gate
from tests.support.background import failure, wait_until
from tests.support.servers import Connection, Proxy

pytestmark = pytest.mark.every_server

WAYS: Final = (
    "SELECT * FROM pg_background_result({pid}) AS (n int)",
    "SELECT pg_background_result({pid})",
    "SELECT pg_background_wait({pid}, {cookie})",
    "SELECT pg_background_wait({pid}, {cookie}), /* 'ä' /* nested */ */ 'ä'",
    "SELECT * FROM pg_background_wait_any(ARRAY[ROW({pid}, {cookie})::record])",
    "SELECT pg_background_run('{job}')",
    "SELECT * FROM pg_background_run_query('{job}') AS (n int)",
)

QUERY: Final = "SELECT query FROM pg_stat_activity WHERE pid = %s"
WAITING: Final = (
    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active' AND wait_event = 'PgSleep'"
)
WAITS_OUTSIDE: Final = (
    "SELECT 1 FROM pg_stat_clear_snapshot(), pg_stat_activity"
    " WHERE pid = %s AND query_start > %s AND wait_event = 'ClientRead'"
)


class Waiting(threading.Thread):
    """A statement that a session executes meanwhile."""

    def __init__(self, conn: Connection, sql: str, *, prepare: bool = False) -> None:
        super().__init__(daemon=True)
        self.conn, self.sql, self.prepare = conn, sql, prepare
        self.rows: list[Any] | None = None
        self.error: psycopg.Error | None = None
        self.start()

    def run(self) -> None:
        try:
            self.rows = self.conn.execute(self.sql.encode(), prepare=self.prepare).fetchall()
        except psycopg.Error as error:
            self.error = error

    def ended(self) -> Waiting:
        """When it has ended."""
        self.join(20.0)
        if self.is_alive():
            # It holds a lock that the session's end would wait for.
            with socket.socket(fileno=os.dup(self.conn.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            self.join(20.0)
            pytest.fail("it goes on")
        return self


def begin(
    conn: Connection, gate: Gate, way: str, *, prepare: bool = False, before: str = ""
) -> Waiting:
    """Have a session wait for a job that waits at the gate. ``before``: it executes that first,
    after the launch."""
    job = gate.sql.replace("SELECT ", "SELECT 7 FROM ", 1)
    handle: Any = (None, None)
    if "{pid}" in way:
        handle = conn.execute("SELECT pid, cookie FROM pg_background_launch_v2(%s)", [job])
        handle = handle.fetchone()
    conn.execute(before.encode())
    sql = way.format(pid=handle[0], cookie=handle[1], job=job.replace("'", "''"))
    return Waiting(conn, sql, prepare=prepare)


def seen(observer: Connection, pid: int) -> str:
    """The query of a session that is seen to wait."""

    wait_until(lambda: observer.execute(WAITING, [pid]).fetchone())
    return str(observer.execute(QUERY, [pid]).fetchone())


def cancel(observer: Connection, pid: int, waiting: Waiting) -> None:
    """Have pg_cancel_backend() end a wait."""
    for _ in range(3):  # A proxy that gets no CPU may leave a gap, in which a cancel is lost.
        observer.execute("SELECT pg_cancel_backend(%s)", [pid])
        waiting.join(5.0)
        if not waiting.is_alive():
            break


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_block", [False, True])
def test_pg_cancel_backend_ends_a_wait(
    conn: Connection, observer: Connection, gate: Gate, way: str, in_block: bool
) -> None:
    if in_block:
        conn.execute("BEGIN")
    pid = conn.info.backend_pid
    waiting = begin(conn, gate, way)
    assert waiting.sql.split("/*")[0] in seen(observer, pid)
    cancel(observer, pid, waiting)
    assert isinstance(waiting.ended().error, errors.QueryCanceled)
    assert "due to user request" in str(waiting.error)
    if in_block:
        assert isinstance(failure(conn, "SELECT 1"), errors.InFailedSqlTransaction)
        conn.execute("ROLLBACK")
    assert conn.execute("SELECT 1").fetchone() == (1,)


def test_the_job_of_an_ended_wait_takes_long_to_cancel(
    conn: Connection, observer: Connection, gate: Gate
) -> None:
    """The server reads nothing but Sync by then, so the session cannot be seen to wait for that."""
    conn.execute("BEGIN")
    waiting = begin(conn, gate, "SELECT pg_background_run('{job}')")
    seen(observer, conn.info.backend_pid)
    observer.execute("ALTER SYSTEM SET pre_auth_delay = 1")
    try:
        observer.execute("SELECT pg_reload_conf()")
        wait_until(lambda: observer.execute("SHOW pre_auth_delay").fetchone() == ("1s",))
        cancel(observer, conn.info.backend_pid, waiting)
        assert isinstance(waiting.ended().error, errors.QueryCanceled)
    finally:
        observer.execute("ALTER SYSTEM RESET pre_auth_delay")
        observer.execute("SELECT pg_reload_conf()")
    conn.execute("ROLLBACK")
    assert conn.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("way", WAYS[:3])
def test_what_is_waited_for_comes(
    conn: Connection, observer: Connection, gate: Gate, way: str, in_block: bool, prepare: bool
) -> None:
    if in_block:
        conn.execute("BEGIN")
    waiting = begin(conn, gate, way, prepare=prepare)
    seen(observer, conn.info.backend_pid)
    gate.open()
    assert waiting.ended().error is None
    assert waiting.rows in ([(7,)], [(True,)], [("7",)])
    assert conn.execute("SELECT 1").fetchone() == (1,)
    if in_block:
        assert conn.execute("COMMIT").statusmessage == "COMMIT"


@pytest.mark.parametrize("in_block", [False, True])
def test_the_client_cancels_what_is_seen_to_wait(
    conn: Connection, observer: Connection, gate: Gate, in_block: bool
) -> None:
    if in_block:
        conn.execute("BEGIN")
    waiting = begin(conn, gate, WAYS[0])
    seen(observer, conn.info.backend_pid)
    conn.cancel_safe()
    assert isinstance(waiting.ended().error, errors.QueryCanceled)
    conn.execute("ROLLBACK")
    assert conn.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("in_block", [False, True])
def test_pg_terminate_backend_ends_a_wait(
    proxy: Proxy, scratch: str, observer: Connection, gate: Gate, in_block: bool
) -> None:
    with proxy.connect(dbname=scratch) as conn:
        if in_block:
            conn.execute("BEGIN")
        pid = conn.info.backend_pid
        waiting = begin(conn, gate, WAYS[0])
        seen(observer, pid)
        observer.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert isinstance(waiting.ended().error, errors.AdminShutdown)
        assert conn.closed


@pytest.mark.parametrize("timeout", ["statement_timeout", "idle_in_transaction_session_timeout"])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]])
def test_timeouts(
    conn: Connection, observer: Connection, gate: Gate, timeout: str, way: str
) -> None:
    with conn.transaction():
        waiting = begin(conn, gate, way, before=f"SET LOCAL {timeout} = '300ms'")
        if timeout == "statement_timeout":
            assert "statement timeout" in str(waiting.ended().error)
            raise psycopg.Rollback
        seen(observer, conn.info.backend_pid)
        gate.open()
        assert waiting.ended().error is None


CONCURRENTLY: Final = "CREATE INDEX CONCURRENTLY ON waited_for (i); "


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("for_what", ["result", "room"])
def test_a_job_does_not_wait_for_who_waits_for_it(
    conn: Connection, observer: Connection, gate: Gate, for_what: str, in_block: bool
) -> None:
    """CREATE INDEX CONCURRENTLY waits for older snapshots, so its session is not seen to wait."""
    observer.execute("DROP TABLE IF EXISTS waited_for; CREATE TABLE waited_for (i int)")
    blocker = "BEGIN; LOCK TABLE waited_for IN ACCESS EXCLUSIVE MODE"
    observer.execute(blocker)
    row = conn.execute("SELECT pg_background_launch(%s)", [CONCURRENTLY]).fetchone()
    assert row is not None
    conn.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '10s'")
    if in_block:
        conn.execute("BEGIN")
    since = observer.execute("SELECT clock_timestamp()").fetchone()
    assert since is not None
    sql = {
        "result": f"SELECT * FROM pg_background_result({row[0]}) AS (t text)",
        "room": "SELECT pg_background_launch('SELECT 1')",
    }
    waiting = Waiting(conn, sql[for_what])
    # CREATE INDEX CONCURRENTLY would wait for a transaction whose statement it finds running.
    wait_until(lambda: observer.execute(WAITS_OUTSIDE, [conn.info.backend_pid, *since]).fetchone())
    time.sleep(3 * VISIBLE_AFTER)  # by then others are seen to wait
    observer.execute("COMMIT")
    [[value]] = waiting.ended().rows or [[None]]
    assert value == "CREATE INDEX" if for_what == "result" else value > 0
    conn.execute("ROLLBACK")
    observer.execute("DROP TABLE waited_for")
