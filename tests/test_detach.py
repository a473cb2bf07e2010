"""pg_background_detach: the session forgets a job, which runs on to its end."""

from __future__ import annotations

import pytest

from tests.support.background import failure, has_ended, launch, message, run, wait_until_ended
from tests.support.servers import Connection, Proxy, psql

LOCK = 4712


def test_detach_returns_void(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    cursor = conn.execute(f"SELECT pg_background_detach({pid})")
    assert cursor.description is not None
    [column] = cursor.description
    assert (column.name, column.type_code) == ("pg_background_detach", 2278)
    assert cursor.fetchall() == [("",)]
    pid = launch(conn, "SELECT 1")
    cursor = conn.execute("SELECT pg_background_detach(%s)", [pid], binary=True)
    assert cursor.pgresult is not None
    assert cursor.pgresult.get_value(0, 0) == b""


@pytest.mark.parametrize(
    "query",
    [
        "SELECT pg_background_detach({})",
        "SELECT pg_background_detach(pid => {}) AS x",
        "SELECT * FROM pg_background_detach({})",
        'SELECT public."pg_background_detach"({});',
        "SELECT pg_background_detach('{}'), 1",
    ],
)
def test_detached_job_runs_on_to_its_end(
    conn: Connection, observer: Connection, query: str
) -> None:
    for prepare in (None, True):
        observer.execute("DROP TABLE IF EXISTS done")
        observer.execute("CREATE TABLE done (n int)")
        observer.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        pid = launch(
            conn, f"SELECT pg_advisory_xact_lock({LOCK}); INSERT INTO done VALUES (1); SELECT 1"
        )
        conn.execute(query.format(pid), prepare=prepare)
        error = failure(conn, "SELECT pg_background_result(%s)", [pid])
        assert message(error) == ("42704", f"PID {pid} is not attached to this session")
        assert not has_ended(observer, pid)
        observer.execute("SELECT pg_advisory_unlock_all()")
        wait_until_ended(observer, pid)
        assert observer.execute("SELECT count(*) FROM done").fetchone() == (1,)


@pytest.mark.parametrize("prepare", [None, True])
def test_nested_detach_of_a_launch(
    conn: Connection, observer: Connection, prepare: bool | None
) -> None:
    observer.execute("DROP TABLE IF EXISTS nested")
    observer.execute("CREATE TABLE nested (n int)")
    query = (
        "SELECT pg_background_detach(pg_background_launch('INSERT INTO nested VALUES (1)')),"
        " pg_background_detach((pg_background_launch("
        "queue_size => 64, sql => format('INSERT INTO nested VALUES (%s)', n)))) AS b"
        " FROM generate_series(1, 2) n"
    )
    assert conn.execute(query, prepare=prepare).fetchall() == [("", "")] * 2
    observer.execute("SET statement_timeout = '20s'")
    observer.execute(
        "DO $$ BEGIN WHILE (SELECT count(*) FROM nested) < 4 LOOP COMMIT; END LOOP; END $$"
        if observer.info.server_version >= 110000
        else "SELECT pg_sleep(2)"
    )


def test_null_pid_detaches_nothing(conn: Connection) -> None:
    assert conn.execute("SELECT pg_background_detach(NULL)").fetchall() == [(None,)]
    query = "SELECT pg_background_detach(pg_background_launch(NULL))"
    assert conn.execute(query).fetchall() == [(None,)]


@pytest.mark.parametrize("pid", [999999, 0, -5])
def test_detach_of_an_unknown_pid(conn: Connection, pid: int) -> None:
    expected = ("42704", f"PID {pid} is not attached to this session")
    assert message(failure(conn, f"SELECT pg_background_detach({pid})")) == expected
    assert message(failure(conn, "SELECT pg_background_detach(%s)", [pid])) == expected


def test_detach_twice(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    assert failure(conn, "SELECT pg_background_detach(%s)", [pid]).sqlstate == "42704"


def test_failed_detach_aborts_the_transaction(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        failure(conn, "SELECT pg_background_detach(1)")
        assert failure(conn, "SELECT 1").sqlstate == "25P02"
        conn.rollback()
        assert run(conn, "SELECT 1") == [(1,)]


def test_detached_jobs_do_not_count_as_workers_of_the_session(
    conn: Connection, observer: Connection
) -> None:
    observer.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    conn.execute("SET pg_background.max_workers = 1")
    for _ in range(3):
        pid = launch(conn, f"SELECT pg_advisory_xact_lock_shared({LOCK})")
        conn.execute("SELECT pg_background_detach(%s)", [pid])
    assert run(conn, "SELECT 1") == [(1,)]
    observer.execute("SELECT pg_advisory_unlock_all()")


def test_error_of_a_detached_job_is_nobodys(conn: Connection, observer: Connection) -> None:
    with conn.transaction():
        pid = launch(conn, "SELECT 1/0")
        conn.execute("SELECT pg_background_detach(%s)", [pid])
        wait_until_ended(observer, pid)
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_psql_shows_a_void_result(proxy: Proxy, scratch: str) -> None:
    sql = "SELECT pg_background_detach(pg_background_launch('SELECT 1'))"
    done = psql(proxy.port, "-c", sql, "-P", "null=NULL", dbname=scratch)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == "pg_background_detach"
    assert lines[2:4] == ["", "(1 row)"]
