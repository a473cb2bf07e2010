"""Jobs that start when the transaction that launches them commits, and never if it rolls back."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.api_clients import Client
from tests.support.background import failure, message, wait_until
from tests.support.in_database import inside, one, with_extension
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

_numbers = itertools.count(1)

ALL = (
    "pg_background_list_all() AS l(pid int, cookie bigint, launched_at timestamptz, user_id oid,"
    " queue_size int, state text, sql_preview text, last_error text, consumed bool, label text)"
)
"""The jobs of all sessions."""


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension, and a table that jobs write to."""
    for _ in with_extension(server, proxy, scratch):
        with proxy.connect(dbname=scratch) as conn:
            conn.execute("CREATE TABLE ran (n int)")
        yield


def job(n: int) -> str:
    """One that leaves its number."""
    return f"INSERT INTO ran VALUES ({n})"


def direct(conn: Connection, sql: str) -> int:
    """Launches it by a call that the client sends; returns its cookie."""
    [(pid, cookie)] = conn.execute(
        "SELECT (h).pid, (h).cookie FROM (SELECT pg_background_submit_at_commit(%s) AS h) s", [sql]
    ).fetchall()
    assert pid is None
    return int(cookie)


def in_server(conn: Connection, sql: str) -> int:
    """The same by one that the server makes."""
    answer = inside(conn, f"pg_background_submit_at_commit($job${sql}$job$)")
    pid, cookie = answer.strip("()").split(",")
    assert pid == ""
    return int(cookie)


WAYS = [pytest.param(direct, id="direct"), pytest.param(in_server, id="inside")]


def ran(observer: Connection) -> list[int]:
    """What has run."""
    return [n for (n,) in observer.execute("SELECT n FROM ran ORDER BY n")]


def state(conn: Connection, cookie: int) -> str | None:
    """Of a job, by its cookie."""
    row = conn.execute("SELECT state FROM pg_background_outcome(NULL, %s)", [cookie]).fetchone()
    assert row is not None
    found: str | None = row[0]
    return found


def is_forgotten(conn: Connection, cookie: int) -> bool:
    """Whether there is no such job any more."""
    return state(conn, cookie) is None


def pending(conn: Connection) -> int:
    """How many of the session's jobs are not decided yet."""
    return int(one(conn, "SELECT count(*) FROM pg_background_list WHERE state = 'pending'"))


def wait(conn: Connection, cookie: int) -> bool:
    """Waits for its end."""
    return bool(one(conn, "SELECT pg_background_wait(NULL, %s, 20000)", [cookie]))


@pytest.fixture
def n() -> int:
    """The number of this test's first job."""
    return next(_numbers) * 100


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_job_starts_at_commit(
    conn: Connection, observer: Connection, n: int, launch: Any, level: str
) -> None:
    conn.execute(f"BEGIN ISOLATION LEVEL {level}")
    conn.execute("INSERT INTO ran VALUES (%s)", [n])
    cookie = launch(conn, f"INSERT INTO ran SELECT n + 1 FROM ran WHERE n = {n}")
    assert state(conn, cookie) == "pending"
    assert n not in ran(observer)
    conn.execute("COMMIT")
    assert wait(conn, cookie)
    assert {n, n + 1} <= set(ran(observer))
    assert state(conn, cookie) == "stopped"


@pytest.mark.parametrize("launch", WAYS)
def test_no_job_starts_after_a_rollback(
    conn: Connection, observer: Connection, n: int, launch: Any
) -> None:
    conn.execute("BEGIN")
    cookie = launch(conn, job(n))
    conn.execute("ROLLBACK")
    wait_until(lambda: is_forgotten(conn, cookie))
    assert n not in ran(observer)
    error = failure(conn, "SELECT pg_background_wait(NULL, %s)", [cookie])
    assert message(error) == ("42704", "no background worker has this cookie")


@pytest.mark.parametrize("launch", WAYS)
def test_a_savepoint_takes_its_jobs_with_it(
    conn: Connection, observer: Connection, n: int, launch: Any
) -> None:
    conn.execute("BEGIN")
    kept = [launch(conn, job(n))]
    conn.execute("SAVEPOINT a")
    lost = [launch(conn, job(n + 1))]
    conn.execute("SAVEPOINT b")
    lost.append(launch(conn, job(n + 2)))
    conn.execute("RELEASE b; ROLLBACK TO a; SAVEPOINT c")
    kept.append(launch(conn, job(n + 3)))
    conn.execute("RELEASE c; COMMIT")
    for cookie in kept:
        assert wait(conn, cookie)
    wait_until(lambda: all(is_forgotten(conn, cookie) for cookie in lost))
    assert [m for m in ran(observer) if n <= m < n + 100] == [n, n + 3]


def test_a_block_with_exception_takes_its_jobs_with_it(
    conn: Connection, observer: Connection, n: int
) -> None:
    conn.execute(
        f"DO $$ BEGIN PERFORM pg_background_submit_at_commit('{job(n)}');"
        f" BEGIN PERFORM pg_background_submit_at_commit('{job(n + 1)}'); RAISE division_by_zero;"
        f" EXCEPTION WHEN division_by_zero THEN NULL; END;"
        f" BEGIN PERFORM pg_background_submit_at_commit('{job(n + 2)}');"
        f" EXCEPTION WHEN division_by_zero THEN NULL; END; END $$"
    )
    wait_until(lambda: {n, n + 2} <= set(ran(observer)))
    wait_until(lambda: not pending(conn))
    assert n + 1 not in ran(observer)


def test_an_error_that_a_savepoint_undoes_is_no_rollback(
    conn: Connection, observer: Connection, n: int
) -> None:
    """All up to the error comes in one batch, so the server has last said that it was idle."""
    with conn.pipeline() as pipeline:
        conn.execute("BEGIN")
        call = f"pg_background_submit_at_commit('{job(n)}')"
        launched = conn.execute("SELECT inside(%s)", [call])
        conn.execute("SAVEPOINT a")
        conn.execute("SELECT 1/0")
        with pytest.raises(psycopg.errors.DivisionByZero):
            pipeline.sync()
    row = launched.fetchone()
    assert row is not None
    observer.execute("SELECT pg_sleep(0.3)")  # long enough for a wrong judgment
    conn.execute("ROLLBACK TO a")
    conn.execute("COMMIT")
    assert wait(conn, int(row[0].strip("()").split(",")[1]))
    assert n in ran(observer)


@pytest.mark.parametrize("deferred", ["NOT DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"])
def test_triggers_launch(conn: Connection, observer: Connection, n: int, deferred: str) -> None:
    conn.execute(
        f"CREATE TABLE t{n} (n int);"
        f" CREATE FUNCTION f{n}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM"
        " pg_background_submit_at_commit(format("
        f"'INSERT INTO ran SELECT n FROM t{n} WHERE n = %s', NEW.n)); RETURN NULL; END $$;"
        f" CREATE CONSTRAINT TRIGGER t AFTER INSERT ON t{n} {deferred} FOR EACH ROW"
        f" EXECUTE PROCEDURE f{n}()"
    )
    conn.execute(f"INSERT INTO t{n} VALUES ({n})")
    wait_until(lambda: n in ran(observer))
    conn.execute("BEGIN")
    conn.execute(f"INSERT INTO t{n} VALUES ({n + 1})")
    conn.execute("SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK")
    conn.execute(f"BEGIN; INSERT INTO t{n} VALUES ({n + 2}); COMMIT")
    wait_until(lambda: n + 2 in ran(observer))
    assert n + 1 not in ran(observer)


def test_a_materialized_view_is_fresh_after_each_change(conn: Connection, n: int) -> None:
    conn.execute(
        f"CREATE TABLE s{n} (n int); CREATE MATERIALIZED VIEW v{n} AS SELECT sum(n) FROM s{n};"
        f" CREATE FUNCTION r{n}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM"
        " pg_background_submit_at_commit("
        f"'SELECT pg_advisory_xact_lock({n}); REFRESH MATERIALIZED VIEW v{n}', 0, 'v{n}');"
        f" RETURN NULL; END $$; CREATE TRIGGER r AFTER INSERT ON s{n} FOR EACH STATEMENT"
        f" EXECUTE PROCEDURE r{n}()"
    )
    fresh = 0
    for number in range(1, 21):
        conn.execute(f"INSERT INTO s{n} VALUES (1)")
        ours = f"FROM pg_background_list WHERE label = 'v{n}'"
        conn.execute(f"SELECT pg_background_wait(pid, cookie) {ours}")
        fresh += one(conn, f"SELECT sum FROM v{n}") == number
    assert fresh == 20


def test_a_procedure_may_commit(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute(
        f"CREATE PROCEDURE p{n}() LANGUAGE plpgsql AS $$ DECLARE h pg_background_handle; BEGIN"
        f" h := pg_background_submit_at_commit('{job(n)}'); COMMIT;"
        " PERFORM pg_background_wait(h.pid, h.cookie);"
        f" IF NOT EXISTS (SELECT FROM ran WHERE n = {n}) THEN RAISE 'it has not run'; END IF;"
        f" PERFORM pg_background_submit_at_commit('{job(n + 1)}'); ROLLBACK;"
        f" PERFORM pg_background_submit_at_commit('{job(n + 2)}'); COMMIT;"
        f" h := pg_background_submit_at_commit('{job(n + 3)}');"
        " PERFORM pg_background_wait(h.pid, h.cookie); END $$"
    )
    error = failure(conn, f"CALL p{n}()")
    assert message(error) == ("55000", "the background worker starts when this transaction commits")
    wait_until(lambda: n + 2 in ran(observer))
    wait_until(lambda: not pending(conn))
    assert [m for m in ran(observer) if n <= m < n + 100] == [n, n + 2]


def test_a_procedure_waits_for_what_it_has_committed(
    conn: Connection, observer: Connection, n: int
) -> None:
    """Though the commit is not heard yet: the listener is stopped."""
    assert wait(conn, direct(conn, "SELECT 1"))
    conn.execute(
        f"CREATE PROCEDURE p{n}() LANGUAGE plpgsql AS $$ DECLARE h pg_background_handle; BEGIN"
        f" h := pg_background_submit_at_commit('{job(n)}'); COMMIT;"
        " PERFORM pg_background_wait(h.pid, h.cookie); END $$"
    )
    [listener] = listeners(observer)
    with ThreadPoolExecutor() as pool:
        os.kill(listener, signal.SIGSTOP)
        try:
            calling = pool.submit(conn.execute, f"CALL p{n}()".encode())
            query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
            query += " AND xact_start > query_start AND clock_timestamp() - xact_start > '0.3s'"
            pid = [conn.info.backend_pid]
            wait_until(lambda: observer.execute(query, pid).fetchone())
            assert not calling.done()
        finally:
            os.kill(listener, signal.SIGCONT)
        calling.result()
    assert n in ran(observer)


def test_a_pipeline_commits_and_rolls_back(conn: Connection, observer: Connection, n: int) -> None:
    call = "SELECT pg_background_submit_at_commit(%s)"
    with conn.pipeline():
        for number, end in enumerate(("COMMIT", "ROLLBACK", "COMMIT")):
            conn.execute("BEGIN")
            conn.execute(call, [job(n + number)])
            conn.execute(end)
        conn.execute(call, [job(n + 3)])
    wait_until(lambda: {n, n + 2, n + 3} <= set(ran(observer)))
    wait_until(lambda: not pending(conn))
    assert n + 1 not in ran(observer)


def test_an_error_later_in_the_batch_takes_the_job_with_it(
    conn: Connection, observer: Connection, n: int
) -> None:
    error = failure(conn, f"SELECT pg_background_submit_at_commit('{job(n)}'); SELECT 1/0")
    assert error.sqlstate == "22012"
    alone = one(conn, f"SELECT pg_background_submit_at_commit('{job(n + 1)}')")
    assert alone.startswith("(,")
    wait_until(lambda: n + 1 in ran(observer))
    wait_until(lambda: not pending(conn))
    assert n not in ran(observer)


def test_each_client_can(client: Client, observer: Connection, n: int) -> None:
    client.rows("BEGIN")
    client.rows(f"SELECT pg_background_submit_at_commit('{job(n)}', NULL, 'at commit')")
    call = f"pg_background_launch_at_commit('SELECT {n}')"
    [[pid, cookie]] = client.texts(f"SELECT (h).pid, (h).cookie FROM (SELECT {call} AS h) s")
    assert pid in (None, "")
    assert n not in ran(observer)
    client.rows("COMMIT")
    assert client.texts(f"SELECT * FROM pg_background_result(NULL, {cookie}) AS (n int)") == [
        (str(n),)
    ]
    wait_until(lambda: n in ran(observer))


def test_a_read_only_transaction_may_launch(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute("BEGIN READ ONLY")
    cookie = direct(conn, f"SELECT {n}")
    conn.execute("COMMIT")
    assert wait(conn, cookie)
    assert state(conn, cookie) == "stopped"


@pytest.mark.parametrize(("setting", "name"), [("off", "submit_at_commit"), ("on", "submit_v2")])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT {}",
        "SELECT {} AS h, 1",
        "SELECT * FROM {}",
        "SELECT pid, cookie FROM {}",
        "SELECT l.* FROM generate_series(1, 1) i, LATERAL {} l",
        "WITH l AS (SELECT {} AS h) SELECT (h).cookie FROM l",
        "INSERT INTO handles SELECT ({}).cookie",
        "PREPARE p AS SELECT {}; EXECUTE p; DEALLOCATE p",
        "DECLARE c CURSOR FOR SELECT {}; FETCH c; CLOSE c",
    ],
)
def test_shapes_of_calls(
    conn: Connection, observer: Connection, n: int, statement: str, setting: str, name: str
) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS handles (cookie bigint)")
    conn.execute(f"SET pg_background.launch_at_commit = {setting}")
    for number, end in ((n, "ROLLBACK"), (n + 1, "COMMIT")):
        conn.execute("BEGIN")
        conn.execute(statement.format(f"pg_background_{name}('{job(number)}')").encode())
        assert pending(conn)
        conn.execute(end)
    wait_until(lambda: n + 1 in ran(observer))
    wait_until(lambda: not pending(conn))
    assert n not in ran(observer)


# What the functions do with such a handle


def test_a_pending_job_is_listed_without_a_pid(
    proxy: Proxy, scratch: str, conn: Connection, n: int
) -> None:
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    row = (None, cookie, "pending", job(n))
    query = "SELECT pid, cookie, state, sql_preview FROM {} WHERE cookie = %s"
    assert conn.execute(query.format("pg_background_list"), [cookie]).fetchall() == [row]
    with proxy.connect(dbname=scratch) as other:
        assert other.execute(query.format(ALL), [cookie]).fetchall() == [row]
        assert one(other, "SELECT pg_background_full_sql(NULL, %s)", [cookie]) == job(n)
        conn.execute("COMMIT")
        assert wait(other, cookie)
        [(pid, same)] = other.execute(
            "SELECT pid, cookie FROM pg_background_outcome(NULL, %s)", [cookie]
        ).fetchall()
        assert pid > 0
        assert same == cookie
        assert one(other, "SELECT state FROM pg_background_outcome(%s, %s)", [pid, cookie])
        wrong = "SELECT state FROM pg_background_outcome(%s, %s)"
        assert one(other, wrong, [pid + 1, cookie]) is None


@pytest.mark.parametrize(
    "call",
    [
        "pg_background_wait(NULL, {})",
        "pg_background_wait_v2(NULL, {})",
        "pg_background_result(NULL, {})",
        "pg_background_wait_any(ARRAY[ROW(NULL, {})::pg_background_handle])",
        "pg_background_drain(ARRAY[ROW(NULL, {})::pg_background_handle])",
    ],
)
def test_a_transaction_does_not_wait_for_itself(conn: Connection, n: int, call: str) -> None:
    conn.execute("BEGIN")
    [(cookie,)] = conn.execute(
        "SELECT (h).cookie FROM (SELECT pg_background_launch_at_commit(%s) AS h) s", [job(n)]
    ).fetchall()
    assert one(conn, "SELECT pg_background_wait_v2_timeout(NULL, %s, 0)", [cookie]) is False
    error = failure(conn, "SELECT " + call.format(cookie))
    assert message(error) == ("55000", "the background worker starts when this transaction commits")
    conn.execute("ROLLBACK")


def test_the_rows_of_a_submitted_job_are_not_waited_for(conn: Connection, n: int) -> None:
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    error = failure(conn, "SELECT pg_background_result(NULL, %s)", [cookie])
    assert message(error) == (
        "0A000",
        "results are disabled for this cookie (submitted via submit_v2)",
    )
    conn.execute("ROLLBACK")


def test_rows_are_there_once_by_the_cookie(conn: Connection, n: int) -> None:
    conn.execute("BEGIN")
    call = "SELECT (h).cookie FROM (SELECT pg_background_launch_at_commit(%s) AS h) s"
    cookie = one(conn, call, [f"SELECT {n}"])
    conn.execute("COMMIT")
    query = f"SELECT * FROM pg_background_result(NULL, {cookie}) AS (n int)"
    assert conn.execute(query.encode()).fetchall() == [(n,)]
    assert failure(conn, query.encode()).sqlstate == "42704"


def test_another_session_waits_until_it_has_run(
    proxy: Proxy, scratch: str, conn: Connection, n: int
) -> None:
    with proxy.connect(dbname=scratch) as other:
        conn.execute("BEGIN")
        kept = direct(conn, job(n))
        conn.execute("SAVEPOINT a")
        lost = direct(conn, job(n + 1))
        waits = "SELECT pg_background_wait(NULL, %s), (pg_background_drain(ARRAY[ROW(NULL, %s)"
        waits += "::pg_background_handle])).sqlstate"
        with other.pipeline():
            row = other.execute(waits, [kept, lost])
            conn.execute("ROLLBACK TO a")
            conn.execute("COMMIT")
            assert row.fetchone() == (True, "40000")


def test_a_pending_job_can_be_canceled(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    conn.execute("SELECT pg_background_cancel(NULL, %s)", [cookie])
    conn.execute("COMMIT")
    assert wait(conn, cookie)
    query = "SELECT pid, state, sqlstate FROM pg_background_outcome(NULL, %s)"
    assert conn.execute(query, [cookie]).fetchone() == (None, "canceled", "57014")
    assert n not in ran(observer)


def test_a_detached_job_starts_all_the_same(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    conn.execute("SELECT pg_background_detach(NULL, %s)", [cookie])
    conn.execute("COMMIT")
    wait_until(lambda: n in ran(observer))


def test_a_job_that_is_detached_as_it_is_prepared_runs_all_the_same(
    conn: Connection, observer: Connection, n: int
) -> None:
    cookie = direct(conn, "SELECT 1;" * 50_000 + job(n))
    wait_until(lambda: state(conn, cookie) == "running")
    conn.execute("SELECT pg_background_detach(NULL, %s)", [cookie])
    wait_until(lambda: n in ran(observer))


def test_pending_jobs_wait_for_room_when_they_may_start(
    conn: Connection, observer: Connection, n: int
) -> None:
    conn.execute("SET pg_background.max_workers = 1")
    conn.execute("BEGIN")
    cookies = [direct(conn, job(n + number)) for number in range(5)]
    conn.execute("COMMIT")
    for cookie in cookies:
        assert wait(conn, cookie)
    assert [m for m in ran(observer) if n <= m < n + 100] == list(range(n, n + 5))


@pytest.mark.parametrize(
    "call",
    ["wait(1, NULL)", "outcome(1, NULL)", "result(1, NULL)", "cancel(NULL, NULL)", "detach(NULL)"],
)
def test_without_a_cookie_a_function_does_nothing(conn: Connection, call: str) -> None:
    found = conn.execute(f"SELECT pg_background_{call}").fetchall()
    assert found in ([], [(None,)])
    assert inside(conn, f"(SELECT pg_background_{call})") in (None, "")


def test_no_more_run_at_a_time_than_the_session_may_have(
    proxy: Proxy, scratch: str, observer: Connection, n: int
) -> None:
    """Though it is done with them, and gone."""
    with proxy.connect(dbname=scratch) as client:
        client.execute("SET pg_background.max_workers = 2")
        client.execute("BEGIN")
        sql = f"INSERT INTO ran SELECT {n} + count(*) FROM pg_stat_activity WHERE state = 'active'"
        sql += f" AND query LIKE 'INSERT%few{n}%'; SELECT pg_sleep(0.4)"
        for _ in range(6):
            client.execute("SELECT pg_background_submit_at_commit(%s, 0, %s)", [sql, f"few{n}"])
        client.execute("SELECT pg_background_detach_all()")
        client.execute("COMMIT")
    wait_until(lambda: len([m for m in ran(observer) if n <= m < n + 100]) == 6)
    assert {m - n for m in ran(observer) if n <= m < n + 100} <= {1, 2}


# The setting


def test_the_setting_makes_plain_launches_wait(
    conn: Connection, observer: Connection, n: int
) -> None:
    conn.execute("SET pg_background.launch_at_commit = yes")
    assert one(conn, "SHOW pg_background.launch_at_commit") == "on"
    conn.execute("BEGIN")
    assert one(conn, "SELECT pg_background_launch(%s)", [job(n)]) is None
    assert inside(conn, f"pg_background_launch('{job(n + 1)}')") is None
    for number, name in enumerate(("launch", "launch_v2", "submit", "submit_v2"), 2):
        call = f"SELECT (h).pid FROM (SELECT pg_background_{name}(%s, NULL, 'x') AS h) s"
        assert one(conn, call, [job(n + number)]) is None
    conn.execute("SELECT pg_background_detach(pg_background_launch(%s))", [job(n + 6)])
    assert not [m for m in ran(observer) if n <= m < n + 100]
    conn.execute("COMMIT")
    wait_until(lambda: set(range(n, n + 7)) <= set(ran(observer)))


def test_with_the_setting_a_call_alone_starts_its_job_at_once(conn: Connection, n: int) -> None:
    conn.execute("SET pg_background.launch_at_commit = on")
    pid = one(conn, "SELECT pg_background_launch(%s)", [f"SELECT {n}"])
    assert conn.execute(f"SELECT * FROM pg_background_result({pid}) AS (n int)").fetchall() == [
        (n,)
    ]
    [(state,)] = conn.execute("SELECT state FROM pg_background_run('SELECT 1')").fetchall()
    assert state == "stopped"


def test_a_function_may_have_the_setting(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute(
        f"CREATE FUNCTION f{n}(n int) RETURNS int LANGUAGE plpgsql"
        " SET pg_background.launch_at_commit = on AS $$ BEGIN RETURN"
        " pg_background_launch(format('INSERT INTO ran VALUES (%s)', n)); END $$"
    )
    conn.execute("BEGIN")
    assert one(conn, f"SELECT f{n}({n})") is None
    conn.execute("ROLLBACK; BEGIN")
    assert one(conn, f"SELECT f{n}({n + 1})") is None
    conn.execute("COMMIT")
    wait_until(lambda: n + 1 in ran(observer))
    assert n not in ran(observer)


@pytest.mark.parametrize(("setting", "name"), [("off", "submit_at_commit"), ("on", "submit")])
def test_rows_of_a_statement_launch_as_one_transaction(
    conn: Connection, observer: Connection, n: int, setting: str, name: str
) -> None:
    conn.execute(f"SET pg_background.launch_at_commit = {setting}")
    call = f"SELECT pg_background_{name}(format('INSERT INTO ran VALUES (%s)', i))"
    call += f" FROM generate_series({n}, {n + 4}) i"
    conn.execute("BEGIN")
    assert len(conn.execute(call.encode()).fetchall()) == 5
    conn.execute("ROLLBACK; BEGIN")
    conn.execute(call.encode())
    conn.execute("COMMIT")
    wait_until(lambda: [m for m in ran(observer) if n <= m < n + 5] == list(range(n, n + 5)))


# Who launches


def test_a_job_launches_at_its_own_commit(conn: Connection, observer: Connection, n: int) -> None:
    launch = "SELECT pg_background_submit_at_commit('INSERT INTO ran VALUES ({})')"
    kept = f"INSERT INTO ran VALUES ({n}); {launch.format(n + 1)}"
    lost = f"{launch.format(n + 2)}; SELECT 1/0"
    for sql, expected in ((kept, "stopped"), (lost, "error")):
        row = conn.execute("SELECT state FROM pg_background_run(%s)", [sql]).fetchone()
        assert row == (expected,)
    wait_until(lambda: n + 1 in ran(observer))
    wait_until(lambda: not one(conn, f"SELECT count(*) FROM {ALL} WHERE state = 'pending'"))
    assert n + 2 not in ran(observer)


def test_a_definers_job_is_the_definers(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, n: int
) -> None:
    """It logs in as the owner, and the proxy listens as that."""
    conn.execute(
        f"CREATE FUNCTION d{n}() RETURNS void SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN PERFORM"
        f" pg_background_submit_at_commit($j$INSERT INTO ran SELECT {n} WHERE current_user ="
        f" 'postgres'$j$); END $$; GRANT EXECUTE ON FUNCTION d{n} TO alice"
    )
    with proxy.connect(dbname=scratch, user="alice") as alice:
        alice.execute("BEGIN")
        alice.execute(f"SELECT d{n}()")
        assert not listeners(observer, "alice")
        alice.execute("COMMIT")
    wait_until(lambda: n in ran(observer))


def test_a_submitted_job_with_retries_waits_too(
    conn: Connection, observer: Connection, n: int
) -> None:
    observer.execute(f"CREATE SEQUENCE q{n}")
    conn.execute("SET pg_background.launch_at_commit = on")
    conn.execute("BEGIN")
    sql = f"SELECT 1; DO $$ BEGIN IF nextval('q{n}') < 2 THEN RAISE SQLSTATE '40001'; END IF;"
    sql += f" INSERT INTO ran VALUES ({n}); END $$"
    call = "SELECT (h).pid FROM (SELECT pg_background_submit(%s, 0, 'x', 3) AS h) s"
    assert one(conn, call, [sql]) is None
    assert one(observer, f"SELECT is_called FROM q{n}") is False
    conn.execute("COMMIT")
    wait_until(lambda: n in ran(observer))


# What goes wrong


def hang_up(client: Connection) -> None:
    """Leave without a word: the connection is reset."""
    with (
        socket.socket(fileno=os.dup(client.fileno())) as sock,
        Path(os.devnull).open("wb") as null,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.dup2(null.fileno(), client.fileno())
    client.close()


def test_a_client_that_is_gone_before_commit_launches_nothing(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, n: int
) -> None:
    cookies = []
    for launch in (direct, in_server):
        client = proxy.connect(dbname=scratch)
        client.execute("BEGIN")
        cookies.append(launch(client, job(n)))
        hang_up(client)
    for cookie in cookies:
        wait_until(functools.partial(is_forgotten, conn, cookie))
    assert n not in ran(observer)


def test_a_commit_counts_that_its_client_does_not_see(
    proxy: Proxy, scratch: str, observer: Connection, n: int
) -> None:
    """The server commits for a second, and its client is gone."""
    with contextlib.closing(proxy.connect(dbname=scratch)) as client:
        client.execute(
            f"CREATE TABLE t{n} (n int); CREATE FUNCTION f{n}() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$; CREATE CONSTRAINT TRIGGER t"
            f" AFTER INSERT ON t{n} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
            f" EXECUTE PROCEDURE f{n}()"
        )
        client.execute("BEGIN")
        direct(client, f"INSERT INTO ran SELECT n FROM t{n}")
        client.execute(f"INSERT INTO t{n} VALUES ({n})")
        pid = one(client, "SELECT pg_backend_pid()")
        client.pgconn.send_query(b"COMMIT")
        client.pgconn.flush()
        wait_until(
            lambda: observer.execute(
                "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND query = 'COMMIT'", [pid]
            ).fetchone()
        )
        hang_up(client)
    wait_until(lambda: n in ran(observer))


def test_a_backend_that_is_killed_launches_nothing(
    conn: Connection, proxy: Proxy, scratch: str, observer: Connection, n: int
) -> None:
    with contextlib.closing(proxy.connect(dbname=scratch)) as client:
        client.execute("BEGIN")
        cookie = direct(client, job(n))
        observer.execute("SELECT pg_terminate_backend(%s)", [client.info.backend_pid])
        wait_until(lambda: is_forgotten(conn, cookie))
    assert n not in ran(observer)


@contextlib.contextmanager
def launching_role(conn: Connection, name: str) -> Iterator[str]:
    """A role that may launch, for a while."""
    conn.execute(f"CREATE ROLE {name} LOGIN")
    conn.execute(f"SELECT grant_pg_background_privileges('{name}')")
    try:
        yield name
    finally:
        conn.execute(f"SELECT revoke_pg_background_privileges('{name}')")
        conn.execute(f"DROP ROLE {name}")


def test_what_cannot_be_started_is_the_error_of_the_job(
    proxy: Proxy, scratch: str, conn: Connection, n: int
) -> None:
    with (
        launching_role(conn, "comes_and_goes") as name,
        proxy.connect(dbname=scratch, user=name) as client,
    ):
        client.execute("BEGIN")
        cookie = direct(client, "SELECT 1")
        conn.execute(f"ALTER ROLE {name} NOLOGIN")
        client.execute("COMMIT")
        assert wait(client, cookie)
        query = "SELECT pid, state, sqlstate FROM pg_background_outcome(NULL, %s)"
        assert client.execute(query, [cookie]).fetchone() == (None, "error", "28000")


def test_a_transaction_with_such_jobs_cannot_be_prepared(
    conn: Connection, observer: Connection, n: int
) -> None:
    if one(conn, "SHOW max_prepared_transactions") == "0":
        pytest.skip("the server has no prepared transactions")
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    with pytest.raises(psycopg.errors.FeatureNotSupported) as refused:
        conn.execute("PREPARE TRANSACTION 'x'")
    assert "at commit" in (refused.value.diag.message_hint or "")
    wait_until(lambda: is_forgotten(conn, cookie))
    assert n not in ran(observer)


def listeners(observer: Connection, user: str = "postgres") -> list[int]:
    """The pids of the connections that listen for a role's commits in this database."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background listener'"
    query += " AND datname = current_database() AND usename = %s"
    return [pid for (pid,) in observer.execute(query, [user])]


def test_a_lost_listener_is_replaced(conn: Connection, observer: Connection, n: int) -> None:
    conn.execute("BEGIN")
    cookie = direct(conn, job(n))
    [before] = listeners(observer)
    observer.execute("SELECT pg_terminate_backend(%s)", [before])
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s) AND pid <> %s"
    query += " AND state = 'idle' AND query LIKE 'LISTEN%%'"
    wait_until(lambda: observer.execute(query, [listeners(observer), before]).fetchone())
    conn.execute("COMMIT")
    assert wait(conn, cookie)
    assert n in ran(observer)


def test_a_commit_that_nobody_has_heard_is_an_error(
    conn: Connection, start_proxy: StartProxy, scratch: str, observer: Connection, n: int
) -> None:
    proxy = start_proxy()
    with (
        launching_role(conn, "unheard") as name,
        proxy.connect(dbname=scratch, user=name) as client,
    ):
        client.execute("BEGIN")
        cookie = direct(client, "SELECT 1")
        observer.execute(f"ALTER ROLE {name} CONNECTION LIMIT 1")
        [listener] = listeners(observer, name)
        observer.execute("SELECT pg_terminate_backend(%s)", [listener])
        wait_until(lambda: "the connection was lost that listens for commits" in proxy.log)
        client.execute("COMMIT")
        wait_until(lambda: "cannot listen for commits" in proxy.log)
        observer.execute(f"ALTER ROLE {name} CONNECTION LIMIT -1")
        assert wait(client, cookie)
        query = "SELECT pid, state, sqlstate FROM pg_background_outcome(NULL, %s)"
        assert client.execute(query, [cookie]).fetchone() == (None, "error", "08006")


def test_a_standby_refuses(server: Server, start_proxy: StartProxy) -> None:
    own = Server(server.bin)
    try:
        proxy = start_proxy(upstream=upstream_of(own))
        with proxy.connect() as conn:
            conn.execute("CREATE EXTENSION pg_background")
            conn.execute("ALTER SYSTEM SET restore_command = 'false'")
        own.stop()
        own.cluster.write("standby.signal", [])
        own.start()
        with proxy.connect() as conn:
            assert one(conn, "SELECT pg_is_in_recovery()")
            for statement in ("SELECT {}", "DO $$ BEGIN PERFORM {}; END $$"):
                call = statement.format("pg_background_launch_at_commit('SELECT 1')")
                assert message(failure(conn, call)) == (
                    "25006",
                    "background workers cannot start at commit during recovery",
                )
        proxy.stop()
    finally:
        own.close()


# Attacks


def test_words_of_others_start_nothing(
    conn: Connection, observer: Connection, server: Server, scratch: str, n: int
) -> None:
    """Whoever listens sees the word when it has done its work; said again, it does nothing."""
    with server.connect(dbname=scratch) as listening:
        conn.execute("BEGIN")
        first = direct(conn, job(n))
        [listener] = listeners(observer)
        [(query,)] = observer.execute(
            "SELECT query FROM pg_stat_activity WHERE pid = %s", [listener]
        ).fetchall()
        channel = re.search("pg_background_[0-9a-f]{32}", query)
        assert channel is not None
        listening.execute(f"LISTEN {channel[0]}")
        seen = one(
            observer, "SELECT query FROM pg_stat_activity WHERE pid = %s", [conn.info.backend_pid]
        )
        assert not re.search("[0-9a-f]{32}", seen)
        for guess in ("", "0" * 32, channel[0], str(first)):
            observer.execute("SELECT pg_notify(%s, %s)", [channel[0], guess])
        conn.execute("COMMIT")
        assert wait(conn, first)
        words = [note.payload for note in listening.notifies(timeout=5, stop_after=5)]
        assert len(words) == 5
        conn.execute("BEGIN")
        second = direct(conn, job(n + 1))
        for word in words:
            observer.execute("SELECT pg_notify(%s, %s)", [channel[0], word])
        observer.execute("SELECT pg_sleep(0.2)")  # enough to be heard
        assert state(conn, second) == "pending"
        conn.execute("ROLLBACK")
    assert [m for m in ran(observer) if n <= m < n + 100] == [n]


def test_pending_jobs_are_bounded(
    start_proxy: StartProxy, scratch: str, observer: Connection, n: int
) -> None:
    proxy = start_proxy("--max-pending-jobs", "3")
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 1000")
        for launch in (direct, in_server):
            conn.execute("BEGIN")
            cookies = [launch(conn, job(n)) for _ in range(3)]
            conn.execute("SELECT pg_background_detach(NULL, %s)", [cookies[0]])
            conn.execute("SAVEPOINT a")
            error = failure(conn, f"SELECT pg_background_submit_at_commit('{job(n)}')")
            assert message(error) == ("53400", "too many background workers wait for a commit")
            assert "max_pending_jobs" in (error.diag.message_detail or "")
            conn.execute(f"ROLLBACK TO a; SELECT pg_background_cancel(NULL, {cookies[1]})")
            launch(conn, job(n))
            conn.execute("ROLLBACK")
            wait_until(lambda: not pending(conn))
        for sql in ("SELECT 1 --" + "x" * 40_000_000, "SELECT 1"):
            conn.execute("BEGIN")
            direct(conn, sql)
            if len(sql) > 1000:
                error = failure(conn, "SELECT pg_background_submit_at_commit(%s)", [sql])
                assert error.sqlstate == "53400"
            conn.execute("ROLLBACK")
            wait_until(lambda: not pending(conn))
    assert n not in ran(observer)


def test_the_listener_goes_when_nobody_needs_it(
    server: Server, start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy("--spare-lifetime", "200ms")
    with proxy.connect(dbname=db) as conn, server.connect(dbname=db) as observer:
        conn.execute("BEGIN")
        cookie = direct(conn, "SELECT 1")
        observer.execute("SELECT pg_sleep(0.5)")
        assert len(listeners(observer)) == 1
        conn.execute("COMMIT")
        assert wait(conn, cookie)
        wait_until(lambda: not listeners(observer))
        direct(conn, "SELECT 1")


def test_a_listener_makes_room_for_its_job(
    start_proxy: StartProxy, conn: Connection, scratch: str
) -> None:
    """The role may have two connections: its session, and one for all the rest."""
    proxy = start_proxy("--spare-lifetime", "60s")
    with launching_role(conn, "limited") as name:
        conn.execute(f"ALTER ROLE {name} CONNECTION LIMIT 2")
        with proxy.connect(dbname=scratch, user=name) as client:
            for _ in range(3):
                cookie = direct(client, "SELECT 1")
                assert wait(client, cookie)
                assert state(client, cookie) == "stopped"


def test_a_listener_does_not_keep_a_database(
    start_proxy: StartProxy, conn: Connection, db: str
) -> None:
    proxy = start_proxy("--spare-lifetime", "60s")
    with proxy.connect(dbname=db) as other:
        cookie = direct(other, "SELECT 1")
        assert wait(other, cookie)
    with proxy.connect() as other:
        other.execute(f"CREATE DATABASE {db}_copy TEMPLATE {db}")
    conn.execute(f"DROP DATABASE {db}_copy")


def test_other_processes_know_pending_jobs(
    start_proxy: StartProxy, scratch: str, observer: Connection, n: int
) -> None:
    proxy = start_proxy("--workers", "2")
    with proxy.connect(dbname=scratch) as conn, contextlib.ExitStack() as stack:
        others = [stack.enter_context(proxy.connect(dbname=scratch)) for _ in range(6)]
        conn.execute("BEGIN")
        kept = in_server(conn, job(n))
        conn.execute("SAVEPOINT a")
        lost = direct(conn, job(n + 1))
        for other in others:
            assert state(other, kept) == "pending"
            assert state(other, lost) == "pending"
        conn.execute("ROLLBACK TO a; COMMIT")
        for other in others:
            assert wait(other, kept)
            query = "SELECT pid > 0, state FROM pg_background_outcome(NULL, %s)"
            assert other.execute(query, [kept]).fetchone() == (True, "stopped")
            wait_until(functools.partial(is_forgotten, other, lost))
    assert [m for m in ran(observer) if n <= m < n + 100] == [n]


def test_the_proxy_waits_for_what_is_pending(
    start_proxy: StartProxy, scratch: str, observer: Connection, n: int
) -> None:
    proxy = start_proxy()
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("BEGIN")
        direct(conn, f"SELECT pg_sleep(0.3); {job(n)}")
        with ThreadPoolExecutor() as pool:
            stopping = pool.submit(proxy.stop)
            proxy.wait_for_log("shutting down")
            conn.execute("COMMIT")
            conn.close()
            assert stopping.result() == 0
    assert n in ran(observer)
