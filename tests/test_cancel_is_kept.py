"""A job that is cancelled does nothing more, and commits nothing, whatever its code does about it.

Code can catch a cancel request (query_canceled), as reports of users' handlers show, so a request
is not what ends a job.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import upstream_of
from tests.support.api_clients import Client, Gate, Handle, open_client
from tests.support.background import failure, message, wait_until, wait_until_ended
from tests.support.in_database import with_extension
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Monitor
from tests.test_workers import sessions

pytestmark = pytest.mark.every_server

CATCHES = (
    "DO $$ BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END $$;"
    " INSERT INTO kept VALUES (2)"
)
CATCHES_ALL_ELSE = (
    "DO $$ BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN OTHERS OR query_canceled THEN"
    " RAISE WARNING 'slow'; RAISE division_by_zero; END $$"
)
LOOPS = (
    "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(60); EXIT;"
    " EXCEPTION WHEN query_canceled THEN INSERT INTO kept VALUES (2); END; END LOOP; END $$"
)
CALCULATES = (
    "DO $$ DECLARE n bigint := 0; BEGIN LOOP BEGIN LOOP n := n + 1; END LOOP;"
    " EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$"
)
CODE = (CATCHES, LOOPS, CALCULATES, CATCHES_ALL_ELSE)

CALLS = (
    *("cancel_v2({h})", "cancel({h})", "cancel_v2({h}, 5000)", "cancel_v2_grace({h}, 5000)"),
    *("cancel_by_label('kept%')", "cancel_by_label_v2('kept', 5000)"),
    *("cancel_all()", "cancel_all_v2()"),
)

CANCELED = ("canceled", "57014", "canceling statement due to user request")


@pytest.fixture(scope="module", autouse=True)
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE TABLE kept (n int)")
    yield from with_extension(server, proxy, scratch)


def launched(client: Client, observer: Connection, code: str) -> Handle:
    """A job that has written something and is in the middle of the code."""
    handle = client.launch(f"INSERT INTO kept VALUES (1); {code}", "kept")
    query = "SELECT FROM pg_stat_activity WHERE pid = %s AND backend_xid IS NOT NULL"
    if "pg_sleep" in code:
        query += " AND wait_event = 'PgSleep'"
    wait_until(lambda: observer.execute(query, [handle.pid]).fetchall())
    return handle


def check(client: Client, observer: Connection, handle: Handle) -> None:
    """It has ended as a cancelled job does, and left nothing."""
    assert client.call("wait", handle.sql, 20000) == "t"
    columns = "state, sqlstate, error_message"
    [row] = client.texts(f"SELECT {columns} FROM pg_background_outcome({handle.sql})")
    assert row == CANCELED
    refused = client.error(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)")
    assert refused[:2] == CANCELED[1:]
    check_nothing_commits(observer, handle.pid)


def check_nothing_commits(observer: Connection, pid: int) -> None:
    wait_until_ended(observer, pid)
    assert observer.execute("SELECT n FROM kept").fetchall() == []


@pytest.mark.parametrize(
    ("call", "code"), [(call, CODE[n % len(CODE)]) for n, call in enumerate(CALLS)]
)
def test_each_function_that_cancels(
    client: Client, observer: Connection, call: str, code: str
) -> None:
    handle = launched(client, observer, code)
    client.rows(f"SELECT pg_background_{call.format(h=handle.sql)}")
    check(client, observer, handle)


@pytest.mark.parametrize("call", ["{}", "inside('{}')"], ids=["direct", "inside"])
def test_by_psql(proxy: Proxy, scratch: str, observer: Connection, call: str) -> None:
    client = open_client("psql", proxy, dbname=scratch)
    handle = launched(client, observer, CATCHES)
    client.rows("SELECT " + call.format(f"pg_background_cancel({handle.sql}, 5000)"))
    check(client, observer, handle)
    client.close()


@pytest.mark.parametrize("code", CODE)
def test_run_that_takes_too_long(conn: Connection, observer: Connection, code: str) -> None:
    job = f"INSERT INTO kept VALUES (1); {code}"
    columns = "pid, state, sqlstate, error_message, timed_out, has_error"
    row = conn.execute(f"SELECT {columns} FROM pg_background_run(%s, 0, 300)", [job]).fetchone()
    assert row is not None
    assert row[1:] == (*CANCELED, True, True)
    check_nothing_commits(observer, row[0])


@pytest.mark.parametrize("code", [CATCHES, LOOPS])
def test_run_query_that_takes_too_long(conn: Connection, observer: Connection, code: str) -> None:
    job = f"INSERT INTO kept VALUES (1); SELECT 'found'; {code}"
    error = failure(conn, "SELECT * FROM pg_background_run_query(%s, 0, 300)", [job])
    assert message(error) == CANCELED[1:]
    pid = int((error.diag.context or "").rpartition(" ")[2])
    check_nothing_commits(observer, pid)


def test_a_session_of_another_worker(server: Server, scratch: str, observer: Connection) -> None:
    with (
        Proxy(upstream_of(server), "--workers", "2") as pair,
        sessions(pair, dbname=scratch) as (here, there),
    ):
        row = here.execute("SELECT (pg_background_launch_v2(%s)).*", [LOOPS]).fetchone()
        assert row is not None
        handle = Handle(*row)
        query = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
        wait_until(lambda: observer.execute(query, [handle.pid]).fetchall())
        there.execute("SELECT pg_background_cancel(%s, %s, 5000)", handle)
        outcome = "SELECT state, sqlstate, error_message FROM pg_background_outcome(%s, %s)"
        for conn in (here, there):
            assert conn.execute(outcome, handle).fetchone() == CANCELED
        check_nothing_commits(observer, handle.pid)


@pytest.mark.parametrize("call", CALLS[::3])
def test_a_job_that_waits_for_its_reader(
    conn: Connection, observer: Connection, monitor: Monitor, call: str
) -> None:
    """It would run to its end if its rows were read and dropped."""
    job = "INSERT INTO kept VALUES (1); SELECT repeat('x', 1000) FROM generate_series(1, 15000)"
    row = conn.execute("SELECT (pg_background_launch_v2(%s, 0, 'kept')).*", [job]).fetchone()
    assert row is not None
    handle = Handle(*row)
    monitor.wait_until_full(handle.pid)
    conn.execute(f"SELECT pg_background_{call.format(h=handle.sql)}".encode())
    assert conn.execute("SELECT pg_background_wait(%s, %s, 20000)", handle).fetchone() == (True,)
    outcome = "SELECT state, sqlstate, error_message FROM pg_background_outcome(%s, %s)"
    assert conn.execute(outcome, handle).fetchone() == CANCELED
    check_nothing_commits(observer, handle.pid)


def test_without_a_login_a_cancel_request_must_do(
    server: Server, proxy: Proxy, scratch: str, observer: Connection, gate: Gate
) -> None:
    with server.connect() as conn:
        conn.execute("CREATE ROLE two LOGIN CONNECTION LIMIT 2")
        conn.execute("GRANT pgbackground_role TO two")
    try:
        with proxy.connect(dbname=scratch, user="two") as conn:
            row = conn.execute("SELECT (pg_background_launch_v2(%s)).*", [gate.sql]).fetchone()
            assert row is not None
            handle = Handle(*row)
            gate.wait_for(handle)
            conn.execute("SELECT pg_background_cancel(%s, %s, 20000)", handle)
            outcome = "SELECT state, sqlstate, error_message FROM pg_background_outcome(%s, %s)"
            assert conn.execute(outcome, handle).fetchone() == CANCELED
            proxy.wait_for_log("cannot terminate the backend of a canceled job")
            wait_until_ended(observer, handle.pid)
    finally:
        with server.connect() as conn:
            conn.execute("DROP ROLE two")
