"""Backends whose jobs have ended, and which serve the next job of the same session."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest

from tests.conftest import StartProxy, shared_proxy, upstream_of
from tests.support.background import (
    cancel_sleep,
    failure,
    has_ended,
    launch,
    message,
    result,
    run,
    value,
    wait_until,
    wait_until_ended,
)
from tests.support.executors import executors
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

LONG: Final = ("--spare-lifetime", "60s", "--reuse-lifetime", "60s")

BACKUP: Final = (
    "DO $$BEGIN IF current_setting('server_version_num')::int >= 150000"
    " THEN PERFORM pg_backup_start('x', true);"
    " ELSE PERFORM pg_start_backup('x', true, false); END IF; END$$; SELECT 1"
)

LEFT: Final = {
    "role": ("SET ROLE alice", "SELECT current_user"),
    "session authorization": ("SET SESSION AUTHORIZATION alice", "SELECT session_user"),
    "setting": ("SET work_mem = '77MB'", "SELECT current_setting('work_mem')"),
    "style": ("SET DateStyle = 'SQL, DMY'", "SELECT date '2000-01-02'"),
    "encoding": ("SET client_encoding = 'LATIN1'", "SELECT current_setting('client_encoding')"),
    "search path": ("SET search_path = pg_catalog", "SELECT current_setting('search_path')"),
    "own setting": (
        "SELECT set_config('my.own', 'x', false)",
        "SELECT nullif(current_setting('my.own', true), '')",  # as after RESET in any session
    ),
    "time-out": ("SET statement_timeout = '1h'", "SELECT current_setting('statement_timeout')"),
    "application name": (
        "SET application_name = 'x'",
        "SELECT current_setting('application_name')",
    ),
    "prepared statement": (
        "PREPARE left_here AS SELECT 1",
        "SELECT count(*) FROM pg_prepared_statements",
    ),
    "cursor": ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors"),
    "LISTEN": ("LISTEN left_here", "SELECT count(*) FROM pg_listening_channels()"),
    "advisory lock": (
        "SELECT pg_advisory_lock(4711)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711",
    ),
    "sequence": (
        "CREATE SEQUENCE left_here; SELECT nextval('left_here')",
        "DROP SEQUENCE IF EXISTS left_here; DO $$BEGIN PERFORM lastval(); RAISE 'there is one';"
        " EXCEPTION WHEN object_not_in_prerequisite_state THEN END$$",
    ),
    "error": ("SELECT 1/0", "SELECT 1"),
}
"""What a job leaves in its session, and a job that would see it."""

KEPT_BY_THE_SESSION: Final = {
    "temporary table": (
        "CREATE TEMP TABLE left_here AS SELECT 1",
        "SET temp_buffers = '17MB'; SELECT current_setting('temp_buffers')",
    ),
    "temporary function": (
        "CREATE FUNCTION pg_temp.left_here() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "SELECT pg_my_temp_schema() <> 0",
    ),
    "temporary slot": (
        "SELECT pg_create_physical_replication_slot('left_here', false, true)",
        "SELECT count(*) FROM pg_replication_slots WHERE active_pid = pg_backend_pid()",
    ),
    "replication origin": (
        "SELECT pg_replication_origin_create('left_here');"
        " SELECT pg_replication_origin_session_setup('left_here')",
        "SELECT pg_replication_origin_session_is_setup()",
    ),
    "base backup": (BACKUP, BACKUP),
}
"""The same, where DISCARD ALL leaves it."""


@pytest.fixture(scope="module")
def proxy(server: Server) -> Iterator[Proxy]:
    """One that keeps backends for long."""
    with shared_proxy(upstream_of(server), *LONG) as proxy:
        yield proxy


@pytest.fixture
def conn(proxy: Proxy, scratch: str) -> Iterator[Connection]:
    """A session that has spares."""
    with proxy.connect(dbname=scratch) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        yield conn


def waiting(conn: Connection) -> set[int]:
    """The pids of the backends that wait for a job of this role in this database, whichever
    proxy's they are."""
    query = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'"
        " AND application_name = 'pg_background spare' AND query LIKE 'SELECT session_user%'"
        " AND usename = session_user"
    )
    found = {pid for (pid,) in conn.execute(query)}
    conn.execute("SELECT 1")  # meanwhile, the proxy hears it, too
    return found


def run_and_wait(conn: Connection, job: str) -> int:
    """Has a job run to its end, fetched or failed, until its backend may be used again."""
    pid = launch(conn, job)
    try:
        result(conn, pid)
    except psycopg.Error:
        assert "1/0" in job
    wait_until(lambda: pid in waiting(conn))
    return pid


def test_a_loop_has_one_backend(conn: Connection) -> None:
    first = run_and_wait(conn, "SELECT 1")
    for n in range(5):
        assert run_and_wait(conn, f"SELECT {n}") == first


def test_a_loop_that_does_not_wait_is_right_as_well(conn: Connection) -> None:
    for n in range(100):
        assert run(conn, f"SELECT {n}") == [(n,)]
        pid = launch(conn, "SELECT pg_backend_pid()")
        assert result(conn, pid) == [(pid,)]


@pytest.mark.parametrize("left", LEFT)
def test_nothing_of_the_last_job_is_left(conn: Connection, left: str) -> None:
    leave, look = LEFT[left]
    other = launch(conn, look)
    expected = result(conn, other)
    wait_until(lambda: other in waiting(conn))
    pid = run_and_wait(conn, leave)
    again = launch(conn, look)
    assert again == pid
    assert result(conn, again) == expected


@pytest.mark.parametrize("left", KEPT_BY_THE_SESSION)
def test_none_whose_session_keeps_something(conn: Connection, left: str) -> None:
    leave, look = KEPT_BY_THE_SESSION[left]
    try:
        expected = run(conn, look)
        pid = launch(conn, leave)
        result(conn, pid)
        assert run(conn, look) == expected
        wait_until_ended(conn, pid)
        assert run(conn, look) == expected
    finally:
        conn.execute(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin"
            " WHERE roname = 'left_here'"
        )


def test_none_where_logins_run_a_trigger(start_proxy: StartProxy, db: str) -> None:
    """What it has set in the session is lost with the rest."""
    proxy = start_proxy(*LONG)
    with proxy.connect(dbname=db) as conn:
        if conn.info.server_version < 170000:
            pytest.skip("this server has no event triggers on login")
        conn.execute(
            "CREATE FUNCTION at_login() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM set_config('my.tenant', 'x', false); END$$;"
            "CREATE EVENT TRIGGER at_login ON login EXECUTE FUNCTION at_login()"
        )
        for _ in range(4):
            pid = launch(conn, "SELECT current_setting('my.tenant')")
            assert result(conn, pid) == [("x",)]
            wait_until_ended(conn, pid)


def test_the_next_text_is_read_as_its_own_settings_say(conn: Connection) -> None:
    """The server does not report what is reset to what the last job had set."""
    conn.execute("SET standard_conforming_strings = off")
    pid = run_and_wait(conn, "SET standard_conforming_strings = on; SELECT 1")
    conn.execute("RESET standard_conforming_strings")
    again = launch(conn, r"SELECT 'a\'; COMMIT; SELECT 'b'")
    assert again == pid
    assert message(failure(conn, "SELECT * FROM pg_background_result(%s)", [again])) == (
        *("0A000", "transaction control statements are not allowed in pg_background"),
    )


def test_the_next_rows_are_read_as_its_own_settings_print_them(
    start_proxy: StartProxy, db: str
) -> None:
    proxy = start_proxy(*LONG)
    with proxy.connect(dbname=db) as admin:
        admin.execute(f"ALTER DATABASE {db} SET DateStyle = 'SQL, MDY'")
        admin.execute("CREATE EXTENSION pg_background")
    with proxy.connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        conn.execute("SET DateStyle = 'SQL, DMY'")
        pid = run_and_wait(conn, "SET DateStyle = 'SQL, MDY'; SELECT 1")
        conn.execute("RESET DateStyle")
        conn.execute(
            "CREATE FUNCTION found() RETURNS TABLE (pid int, day text) LANGUAGE plpgsql AS $$BEGIN"
            " pid := pg_background_launch('SELECT date ''2000-01-02''');"
            " SELECT d - date '2000-01-01' INTO day FROM pg_background_result(pid) AS (d date);"
            " RETURN NEXT; END$$"
        )
        assert conn.execute("SELECT * FROM found()").fetchall() == [(pid, "1")]


def _kept(conn: Connection, pids: set[int]) -> set[int]:
    return pids & waiting(conn)


def test_one_that_has_died_is_not_missed(proxy: Proxy, server: Server, db: str) -> None:
    """Others take its place among those that are kept."""
    with proxy.connect(dbname=db) as conn, server.connect() as admin:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        for _ in range(4):
            pids = {launch(conn, "SELECT 1") for _ in range(4)}
            for pid in pids:
                result(conn, pid)
            for pid in wait_until(functools.partial(_kept, conn, pids)):
                admin.execute("SELECT pg_terminate_backend(%s)", [pid])
                wait_until_ended(admin, pid)
        first = run_and_wait(conn, "SELECT 1")
        assert run_and_wait(conn, "SELECT 2") == first


def test_a_lock_and_a_table_are_gone_before_the_result_is_fetched(
    conn: Connection, server: Server, scratch: str
) -> None:
    launch(conn, "SELECT pg_advisory_lock(4712); CREATE TEMP TABLE left_here AS SELECT 1")
    with server.connect(dbname=scratch) as other:
        look = (
            "SELECT (SELECT count(*) FROM pg_class WHERE relname = 'left_here') +"
            " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4712)"
        )
        wait_until(lambda: other.execute("SELECT pg_try_advisory_lock(4712)").fetchone() == (True,))
        other.execute("SELECT pg_advisory_unlock(4712)")
        wait_until(lambda: other.execute(look).fetchone() == (0,))


def test_not_before_the_session_is_done_with_the_job(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    wait_until(lambda: pid in waiting(conn))
    second = launch(conn, "SELECT 2")
    assert second != pid
    assert result(conn, second) == [(2,)]
    assert result(conn, pid) == [(1,)]
    wait_until(lambda: {pid, second} <= waiting(conn))
    assert launch(conn, "SELECT 3") in (pid, second)


def test_detached_jobs(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    wait_until(lambda: pid in waiting(conn))
    assert value(conn, "SELECT pg_backend_pid()") == pid


def test_submitted_jobs(conn: Connection) -> None:
    query = "SELECT (pg_background_submit_v2('SELECT 1')).pid"
    [(pid,)] = conn.execute(query)
    wait_until(lambda: pid in waiting(conn))
    assert [(pid,)] == conn.execute(query).fetchall()


def test_the_last_job_is_still_known_by_its_handle(conn: Connection) -> None:
    query = "SELECT (h).pid, (h).cookie FROM (SELECT pg_background_submit_v2(%s) h) s"
    [first] = conn.execute(query, ["SELECT 1/0"])
    wait_until(lambda: first[0] in waiting(conn))
    [second] = conn.execute(query, ["SELECT 1"])
    assert second[0] == first[0]
    look = "SELECT state FROM pg_background_outcome_v2(%s, %s)"
    assert conn.execute(look, first).fetchone() == ("error",)
    wait_until(lambda: conn.execute(look, second).fetchone() == ("stopped",))
    assert conn.execute(look, first).fetchone() == ("error",)
    for pid, cookie in (first, second):
        conn.execute("SELECT pg_background_detach_v2(%s, %s)", [pid, cookie])


def test_from_inside_the_database(conn: Connection) -> None:
    conn.execute("CREATE EXTENSION pg_background")
    conn.execute(
        "CREATE FUNCTION pids(n int) RETURNS SETOF int LANGUAGE plpgsql AS $$"
        " DECLARE p int; BEGIN FOR i IN 1..n LOOP"
        " p := pg_background_launch('SELECT pg_backend_pid()');"
        " RETURN QUERY SELECT r.pid FROM pg_background_result(p) AS r(pid int)"
        " WHERE r.pid = p; PERFORM pg_sleep(0.2); END LOOP; END$$"
    )
    found = [pid for (pid,) in conn.execute("SELECT pids(6)")]
    assert len(found) == 6
    assert len(set(found)) < 6


def test_no_other_session_gets_it(proxy: Proxy, conn: Connection, scratch: str) -> None:
    pid = run_and_wait(conn, "SELECT 1")
    with proxy.connect(dbname=scratch) as other:
        found = {launch(other, "SELECT 1") for _ in range(4)}
    assert pid not in found
    assert launch(conn, "SELECT 1") == pid


def test_none_whose_job_was_canceled(conn: Connection) -> None:
    pid = launch(conn, "SELECT pg_sleep(60)")
    cancel_sleep(conn, pid)  # of this the proxy does not know
    assert message(failure(conn, "SELECT * FROM pg_background_result(%s)", [pid]))[0] == "57014"
    query = "SELECT (h).pid, (h).cookie FROM (SELECT pg_background_launch_v2(%s) h) s"
    [handle] = conn.execute(query, ["SELECT pg_sleep(60)"])
    conn.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    wait_until_ended(conn, handle[0])


def test_it_waits_for_a_moment_only(start_proxy: StartProxy, db: str) -> None:
    proxy = start_proxy("--spare-lifetime", "60s", "--reuse-lifetime", "2s")
    with proxy.connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        wait_until_ended(conn, run_and_wait(conn, "SELECT 1"))


def test_it_is_not_older_than_a_spare_may_be(start_proxy: StartProxy, db: str) -> None:
    """Or a changed password would never hold for a session that goes on launching."""
    proxy = start_proxy("--spare-lifetime", "2s", "--reuse-lifetime", "60s")
    jobs: Counter[int] = Counter()
    with proxy.connect(dbname=db) as conn:

        def one_is_gone_that_was_used_again() -> bool:
            pid = launch(conn, "SELECT 1")
            assert result(conn, pid) == [(1,)]
            jobs[pid] += 1
            return any(count > 1 and has_ended(conn, pid) for pid, count in jobs.items())

        wait_until(one_is_gone_that_was_used_again)


def test_it_ends_with_its_session(proxy: Proxy, server: Server, scratch: str) -> None:
    with proxy.connect(dbname=scratch) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        pid = run_and_wait(conn, "SELECT 1")
    with server.connect() as other:
        wait_until_ended(other, pid)


def test_it_ends_if_a_new_login_would_be_another(
    proxy: Proxy, server: Server, scratch: str
) -> None:
    with server.connect() as admin:
        admin.execute("CREATE ROLE passing LOGIN")
        try:
            with (
                executors(admin, "passing"),
                proxy.connect(dbname=scratch, user="passing") as conn,
            ):
                run(conn, "SELECT 1")
                wait_until(lambda: waiting(conn))
                pid = run_and_wait(conn, "SELECT 1")
                admin.execute("ALTER ROLE passing NOLOGIN")
                said = message(failure(conn, "SELECT pg_background_launch('SELECT 1')"))
                assert said[0] == "28000"
                wait_until_ended(admin, pid)
        finally:
            admin.execute("DROP ROLE passing")


def test_not_where_a_language_may_remember_something(conn: Connection) -> None:
    conn.execute("CREATE LANGUAGE mine HANDLER plpgsql_call_handler")
    try:
        pid = launch(conn, "SELECT 1")
        assert result(conn, pid) == [(1,)]
        wait_until_ended(conn, pid)
    finally:
        conn.execute("DROP LANGUAGE mine")


def test_it_can_be_turned_off(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy("--spare-lifetime", "60s", "--reuse-lifetime", "0")
    with proxy.connect(dbname=scratch) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: waiting(conn))
        for _ in range(3):
            pid = launch(conn, "SELECT 1")
            assert result(conn, pid) == [(1,)]
            wait_until_ended(conn, pid)


def test_it_gives_way_to_a_command_about_its_database(conn: Connection, scratch: str) -> None:
    pid = run_and_wait(conn, "SELECT 1")
    conn.execute(f"ALTER DATABASE {scratch} CONNECTION LIMIT -1")
    wait_until_ended(conn, pid)
