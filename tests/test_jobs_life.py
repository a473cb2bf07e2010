"""The life of a job: it outlives its session, waits for its reader when its result is large, and
costs the proxy no more than its queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from psycopg import errors

from protocol.messages import Bind, Close, Execute, Parse, Sync
from tests.support.background import wait_until
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Footprint, Monitor, Wire, gate, launch, value

MEGABYTE: Final = 1024 * 1024
JOB_DONE: Final = "INSERT INTO done DEFAULT VALUES"
# 30 MB, more than all buffers between a job and its reader take.
BIG: Final = 30_000
BIG_RESULT: Final = f"SELECT repeat('x', 1000) FROM generate_series(1, {BIG})"


@pytest.fixture
def direct(server: Server, db: str) -> Iterator[Connection]:
    """A connection to the server; the database has a table `done`."""
    with server.connect(dbname=db) as direct:
        direct.execute("CREATE TABLE done ()")
        yield direct


@pytest.fixture
def conn(proxy: Proxy, db: str, direct: Connection) -> Iterator[Connection]:
    """A session through the proxy."""
    with proxy.connect(dbname=db) as conn:
        yield conn


def wait_until_done(direct: Connection, times: int = 1) -> None:
    """Until that many jobs have committed."""
    wait_until(lambda: value(direct, "SELECT count(*) FROM done") == times)


def test_jobs_pid_is_that_of_a_backend_of_the_same_role_and_database(
    server: Server, conn: Connection, direct: Connection, db: str, monitor: Monitor
) -> None:
    with gate(server, db) as closed:
        pid = launch(conn, closed.sql + "SELECT 1")
        monitor.wait_until_at_gate(pid)
        row = direct.execute(
            "SELECT datname, usename, application_name, query FROM pg_stat_activity WHERE pid = %s",
            [pid],
        ).fetchone()
        assert row == (db, "postgres", "pg_background", closed.sql + "SELECT 1")
        assert pid not in (conn.info.backend_pid, direct.info.backend_pid)


def test_jobs_outlive_their_session_and_commit(
    server: Server, conn: Connection, direct: Connection, db: str, monitor: Monitor
) -> None:
    with gate(server, db) as closed:
        jobs = [launch(conn, closed.sql + JOB_DONE) for _ in range(5)]
        for pid in jobs:
            monitor.wait_until_at_gate(pid)
        primary = conn.info.backend_pid
        conn.close()
        monitor.wait_until_gone(primary)
        assert value(direct, "SELECT count(*) FROM done") == 0
    wait_until_done(direct, 5)
    for pid in jobs:
        monitor.wait_until_gone(pid)


def test_jobs_outlive_their_session_whose_transaction_is_rolled_back(
    server: Server, conn: Connection, direct: Connection, db: str, monitor: Monitor
) -> None:
    with gate(server, db) as closed:
        conn.execute("BEGIN")
        conn.execute(JOB_DONE)
        launch(conn, closed.sql + JOB_DONE)
        conn.close()
    wait_until_done(direct)


def test_detached_job_never_waits_for_a_reader(
    conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    pid = launch(conn, f"{JOB_DONE}; {BIG_RESULT}")
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    wait_until_done(direct)
    monitor.wait_until_gone(pid)


def test_job_detached_when_it_waits_for_its_reader_runs_on(
    conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    pid = launch(conn, f"{JOB_DONE}; {BIG_RESULT}")
    monitor.wait_until_full(pid)
    assert value(direct, "SELECT count(*) FROM done") == 0
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    wait_until_done(direct)
    monitor.wait_until_gone(pid)


def test_end_of_the_session_drops_the_rows_and_lets_the_job_finish(
    conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    jobs = [launch(conn, f"{JOB_DONE}; {BIG_RESULT}") for _ in range(3)]
    for pid in jobs:
        monitor.wait_until_full(pid)
    conn.close()
    wait_until_done(direct, 3)
    for pid in jobs:
        monitor.wait_until_gone(pid)


def test_unfetched_results_wait_in_the_server_and_not_in_the_proxy(
    proxy: Proxy, conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    count = 25
    conn.execute("SET pg_background.max_workers = 100")
    for pid in [launch(conn, "SELECT 1") for _ in range(count)]:  # warm up
        conn.execute("SELECT pg_background_result(%s)", [pid])
    footprint = Footprint(proxy)
    before = footprint.rss
    jobs = [launch(conn, f"{JOB_DONE}; {BIG_RESULT}") for _ in range(count)]
    for pid in jobs:
        monitor.wait_until_full(pid)
    # 64 kB each, and what an interpreter needs for that: less than a single result.
    assert footprint.rss - before < 16 * MEGABYTE
    assert [monitor.state(pid) for pid in jobs] == [("active", "ClientWrite")] * count
    fetched = conn.execute(
        "SELECT * FROM pg_background_result(%s) AS (r text)", [jobs.pop()]
    ).fetchall()
    assert fetched == [("x" * 1000,)] * BIG
    conn.close()
    wait_until_done(direct, count)


@pytest.mark.parametrize("queue_size", [64, 1000, 4096, 1_000_000, 268_435_456])
@pytest.mark.parametrize("row_size", [1, 10_000, 1_000_000])
def test_result_is_whole_whatever_the_queue_size(
    conn: Connection, queue_size: int, row_size: int
) -> None:
    count = max(3, min(20_000, 2_000_000 // row_size))
    row = conn.execute(
        "SELECT pg_background_launch(%s, %s)",
        [f"SELECT i, repeat('x', {row_size}) FROM generate_series(1, {count}) i", queue_size],
    ).fetchone()
    assert row is not None
    rows = conn.execute(
        "SELECT * FROM pg_background_result(%s) AS (i int, r text)", [row[0]]
    ).fetchall()
    assert rows == [(i, "x" * row_size) for i in range(1, count + 1)]


def test_larger_queue_lets_a_job_finish_before_it_is_fetched(
    conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    row = conn.execute(
        "SELECT pg_background_launch(%s, %s)",
        [f"{JOB_DONE}; {BIG_RESULT}", 200 * MEGABYTE],
    ).fetchone()
    assert row is not None
    wait_until_done(direct)
    monitor.wait_until_gone(row[0])
    cursor = conn.execute("SELECT * FROM pg_background_result(%s) AS (r text)", [row[0]])
    assert len(cursor.fetchall()) == BIG


@pytest.mark.parametrize("ending", ["close", "rollback", "error", "terminate"])
def test_partly_fetched_result_does_not_hold_up_its_job(
    proxy: Proxy, db: str, direct: Connection, monitor: Monitor, ending: str
) -> None:
    with Wire((proxy.host, proxy.port), database=db) as wire:
        wire.query("BEGIN")
        pid = wire.launch(f"{JOB_DONE}; {BIG_RESULT}")
        wire.send(
            Parse(b"s", b"SELECT * FROM pg_background_result(%d) AS (r text)" % pid, ()).serialize()
            + Bind(b"p", b"s", (), (), ()).serialize()
            + Execute(b"p", 10).serialize()
            + Sync().serialize()
        )
        assert [kind for kind, _ in wire.until_ready()] == ["1", "2", *"D" * 10, "s", "Z"]
        monitor.wait_until_full(pid)
        match ending:
            case "close":
                wire.send(Close(b"P", b"p").serialize() + Sync().serialize())
                wire.until_ready()
            case "rollback":
                wire.query("ROLLBACK")
            case "error":
                wire.query("SELECT 1/0")
                wire.query("ROLLBACK")
            case "terminate":
                wire.close()
        wait_until_done(direct)
        monitor.wait_until_gone(pid)


def test_result_of_the_wrong_shape_does_not_hold_up_its_job(
    conn: Connection, direct: Connection, monitor: Monitor
) -> None:
    pid = launch(conn, f"{JOB_DONE}; {BIG_RESULT}")
    with pytest.raises(errors.DatatypeMismatch):
        conn.execute("SELECT * FROM pg_background_result(%s) AS (n int)", [pid])
    wait_until_done(direct)
    monitor.wait_until_gone(pid)
