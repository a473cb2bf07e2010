"""Waiting for a job, cancelling it, detaching it; one at a time and all at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import psycopg
import pytest

from tests.support.api_clients import Client, Gate, Handle, Refused, quoted
from tests.support.background import failure, message, wait_until, wait_until_ended
from tests.support.servers import Connection, Proxy, Server
from tests.support.wire import Footprint, Monitor

MISMATCH_HINT = "The pid was used again, or the handle is not the one that the launch returned."


def launch_v2(conn: Connection, sql: str, label: str | None = None) -> Handle:
    row = conn.execute("SELECT (pg_background_launch_v2(%s, NULL, %s)).*", [sql, label]).fetchone()
    assert row is not None
    return Handle(*row)


def scalar(conn: Connection, sql: str, *parameters: Any) -> Any:
    row = conn.execute(sql, parameters or None).fetchone()
    assert row is not None
    return row[0]


def state(client: Client, handle: Handle) -> str | None:
    return client.one(f"SELECT state FROM pg_background_outcome({handle.sql})")


@pytest.fixture
def table(observer: Connection) -> str:
    """An empty one."""
    observer.execute("DROP TABLE IF EXISTS ending")
    observer.execute("CREATE TABLE ending (n int)")
    return "ending"


def committed(observer: Connection) -> list[int]:
    return [n for [n] in observer.execute("SELECT n FROM ending ORDER BY n")]


# --- wait ---


@pytest.mark.parametrize(
    ("call", "value"),
    [
        ("wait_v2({})", ""),
        ("wait({})", "t"),
        ("wait({}, 0)", "t"),
        ("wait({}, -5)", "t"),
        ("wait({}, 20000)", "t"),
        ("wait({}, timeout_ms => 2147483647)", "t"),
        ("wait_v2_timeout({}, 20000)", "t"),
        ("wait_v2_timeout({}, 2147483647)", "t"),
    ],
)
def test_wait_comes_back_when_the_job_ends(
    proxy: Proxy, client: Client, gate: Gate, observer: Connection, call: str, value: str
) -> None:
    handle = client.launch(gate.sql)
    gate.wait_for(handle)
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    assert (client.one(f"SELECT pg_background_{call.format(handle.sql)}") or "") == value
    opener.join()
    assert state(client, handle) == "stopped"
    # Once more, of a job that has ended.
    assert (client.one(f"SELECT pg_background_{call.format(handle.sql)}") or "") == value


def test_wait_with_a_time_limit(client: Client, gate: Gate) -> None:
    handle = client.launch(gate.sql)
    for call in (
        f"wait({handle.sql}, 30)",
        f"wait({handle.sql}, timeout_ms => 1)",
        f"wait_v2_timeout({handle.sql}, 30)",
        f"wait_v2_timeout({handle.sql}, 0)",
        f"wait_v2_timeout({handle.sql}, -1)",
    ):
        assert client.one(f"SELECT pg_background_{call}") == "f"
    assert state(client, handle) == "running"


def test_wait_for_a_failed_job_is_no_error(client: Client) -> None:
    handle = client.launch("SELECT 1/0")
    assert client.call("wait", handle.sql) == "t"
    assert state(client, handle) == "error"


def test_wait_leaves_the_rows(client: Client) -> None:
    handle = client.ended("SELECT 5")
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "5"


def test_null_arguments_of_strict_functions(client: Client, gate: Gate) -> None:
    handle = client.launch(gate.sql)
    pid, _ = handle
    for call in (
        "wait_v2(NULL, NULL)",
        f"wait_v2({pid}, NULL)",
        f"wait({handle.sql}, NULL)",
        f"wait_v2_timeout({handle.sql}, NULL)",
        f"cancel_v2({pid}, NULL)",
        f"cancel({handle.sql}, NULL)",
        f"cancel_v2_grace({handle.sql}, NULL)",
        "detach_v2(NULL, NULL)",
        f"detach({pid}, NULL)",
        "cancel_by_label(NULL)",
        "cancel_by_label('%', NULL)",
        "wait_any(NULL)",
        "wait_any_v2(NULL, 5)",
    ):
        assert client.rows(f"SELECT pg_background_{call}") == [(None,)], call
    assert state(client, handle) == "running"


@pytest.mark.parametrize(
    "call",
    [
        "wait_v2({})",
        "wait({})",
        "wait_v2_timeout({}, 0)",
        "cancel_v2({})",
        "cancel({}, 10)",
        "cancel_v2_grace({}, 10)",
        "detach_v2({})",
        "detach({})",
        "get_progress_v2({})",
        "get_progress({})",
        "result_info_v2({})",
        "result_info({})",
        "error_info_v2({})",
        "error_info({})",
        "full_sql_v2({})",
        "full_sql({})",
    ],
)
def test_wrong_cookie_and_unknown_pid(client: Client, gate: Gate, call: str) -> None:
    handle = client.launch(gate.sql)
    wrong = f"SELECT pg_background_{call.format(f'{handle.pid}, 17')}"
    assert client.error(wrong) == Refused(
        "55000", f"cookie mismatch for PID {handle.pid}", MISMATCH_HINT
    )
    unknown = f"SELECT pg_background_{call.format('999999, 1')}"
    assert client.error(unknown) == Refused("42704", "PID 999999 is not attached to this session")
    assert state(client, handle) == "running"


WAITS = (
    "SELECT pg_background_wait_v2({})",
    "SELECT pg_background_wait({})",
    "SELECT pg_background_wait({}, 60000)",
    "SELECT pg_background_wait_v2_timeout({}, 60000)",
    "SELECT pg_background_wait_any(ARRAY[ROW({})])",
    "SELECT * FROM pg_background_drain(ARRAY[ROW({})])",
    "SELECT * FROM pg_background_result_v2({}) AS (n text)",
)


@pytest.mark.parametrize("wait", WAITS)
def test_cancel_request_ends_a_wait(conn: Connection, gate: Gate, wait: str) -> None:
    handle = launch_v2(conn, gate.sql)
    gate.wait_for(handle)
    canceller = threading.Timer(0.1, conn.cancel_safe)
    canceller.start()
    error = failure(conn, wait.format(handle.sql))
    canceller.join()
    assert message(error) == ("57014", "canceling statement due to user request")
    assert scalar(conn, f"SELECT state FROM pg_background_outcome({handle.sql})") == "running"


@pytest.mark.parametrize("wait", WAITS)
def test_statement_timeout_ends_a_wait(conn: Connection, gate: Gate, wait: str) -> None:
    handle = launch_v2(conn, gate.sql)
    gate.wait_for(handle)
    conn.execute("SET statement_timeout = 100")
    error = failure(conn, wait.format(handle.sql))
    assert message(error) == ("57014", "canceling statement due to statement timeout")
    conn.execute("RESET statement_timeout")
    assert scalar(conn, f"SELECT state FROM pg_background_outcome({handle.sql})") == "running"


def test_interrupted_wait_aborts_the_transaction(proxy: Proxy, scratch: str, gate: Gate) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        handle = launch_v2(conn, gate.sql)
        conn.execute("SET LOCAL statement_timeout = 100")
        assert failure(conn, f"SELECT pg_background_wait({handle.sql})").sqlstate == "57014"
        assert failure(conn, "SELECT 1").sqlstate == "25P02"
        conn.rollback()
        gate.open()
        assert scalar(conn, f"SELECT pg_background_wait({handle.sql})") is True


def test_waits_do_not_poll(proxy: Proxy, conn: Connection, gate: Gate, server: Server) -> None:
    """A second of waiting costs the proxy next to nothing."""
    handle = launch_v2(conn, gate.sql)
    gate.wait_for(handle)
    used = Footprint(proxy)._process.cpu_times
    before = used()
    assert scalar(conn, f"SELECT pg_background_wait({handle.sql}, 1000)") is False
    after = used()
    assert (after.user - before.user) + (after.system - before.system) < 0.1


# --- cancel ---


@pytest.mark.parametrize("call", ["cancel_v2({})", "cancel({})", "cancel_v2_grace({}, 0)"])
def test_cancelled_job_commits_nothing_and_stops(
    client: Client, observer: Connection, gate: Gate, table: str, call: str
) -> None:
    job = f"INSERT INTO {table} VALUES (1); {gate.sql}; INSERT INTO {table} VALUES (2); SELECT 3"
    handle = client.launch(job)
    gate.wait_for(handle)
    assert client.one(f"SELECT pg_background_{call.format(handle.sql)}") in (None, "")
    assert client.call("wait", handle.sql, 20000) == "t"
    gate.open()
    wait_until_ended(observer, handle.pid)
    assert committed(observer) == []
    columns = "state, completed, has_error, sqlstate, error_message"
    [row] = client.texts(f"SELECT {columns} FROM pg_background_outcome({handle.sql})")
    assert row == ("canceled", "t", "t", "57014", "canceling statement due to user request")
    refused = client.error(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)")
    assert refused.sqlstate == "57014"


@pytest.mark.parametrize(
    "call", ["cancel_v2({}, 20000)", "cancel({}, grace_ms => 20000)", "cancel_v2_grace({}, 20000)"]
)
def test_grace_waits_for_the_end(client: Client, gate: Gate, call: str) -> None:
    handle = client.launch(gate.sql)
    gate.wait_for(handle)
    client.rows(f"SELECT pg_background_{call.format(handle.sql)}")
    assert state(client, handle) == "canceled"


def test_grace_is_no_longer_than_said(conn: Connection, gate: Gate) -> None:
    handle = launch_v2(conn, gate.sql)
    gate.wait_for(handle)
    os.kill(handle.pid, signal.SIGSTOP)  # a backend hears of nothing while it is stopped
    try:
        start = time.monotonic()
        conn.execute("SELECT pg_background_cancel(%s, %s, 100)", handle)
        # It would wait for ever for the end.
        assert time.monotonic() - start >= 0.1
        assert scalar(conn, "SELECT state FROM pg_background_outcome(%s, %s)", *handle) == "running"
    finally:
        os.kill(handle.pid, signal.SIGCONT)
    assert scalar(conn, "SELECT pg_background_wait(%s, %s)", *handle) is True


def test_cancel_right_after_launch(client: Client, observer: Connection, table: str) -> None:
    handles = []
    for n in range(5):
        handle = client.launch(f"INSERT INTO {table} VALUES ({n}); SELECT pg_sleep(60)")
        client.rows(f"SELECT pg_background_cancel({handle.sql})")
        handles.append(handle)
    for handle in handles:
        assert client.call("wait", handle.sql, 20000) == "t"
        assert state(client, handle) == "canceled"
    assert committed(observer) == []


def test_cancel_in_the_round_trip_of_the_launch(
    conn: Connection, observer: Connection, table: str
) -> None:
    handles = []
    with conn.pipeline():
        cursors = [
            conn.execute(
                "SELECT (pg_background_launch_v2(%s)).*",
                [f"INSERT INTO {table} VALUES (1); SELECT pg_sleep(60)"],
            )
            for _ in range(5)
        ]
        cancel_all = conn.execute("SELECT pg_background_cancel_all()")
    assert cancel_all.fetchone() == (5,)
    for cursor in cursors:
        [row] = cursor.fetchall()
        handles.append(Handle(*row))
    for handle in handles:
        assert scalar(conn, "SELECT pg_background_wait(%s, %s, 20000)", *handle) is True
    assert committed(observer) == []


def test_cancel_of_a_job_that_nobody_reads(
    client: Client, observer: Connection, table: str, monitor: Monitor
) -> None:
    rows = "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)"
    job = f"INSERT INTO {table} VALUES (1); {rows}"
    handle = client.launch(job)
    monitor.wait_until_full(handle.pid)
    client.rows(f"SELECT pg_background_cancel({handle.sql}, 20000)")
    assert state(client, handle) == "canceled"
    wait_until_ended(observer, handle.pid)
    assert committed(observer) == []


def test_cancel_leaves_a_job_that_has_ended_as_it_is(client: Client) -> None:
    handle = client.ended("SELECT n FROM generate_series(1, 3) n")
    for name in ("cancel_v2", "cancel"):
        assert client.call(name, handle.sql) in (None, "")
    assert client.call("cancel_all") == "0"
    assert state(client, handle) == "stopped"
    rows = client.texts(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)")
    assert rows == [("1",), ("2",), ("3",)]


def test_cancel_leaves_the_state_of_a_job_that_ran_out_of_time(conn: Connection) -> None:
    conn.execute("SET pg_background.worker_timeout = '50ms'")
    handle = launch_v2(conn, "SELECT pg_sleep(60)")
    query = "SELECT state, sqlstate FROM pg_background_outcome(%s, %s)"
    assert scalar(conn, "SELECT pg_background_wait(%s, %s)", *handle) is True
    assert conn.execute(query, handle).fetchone() == ("error", "57014")
    conn.execute("SELECT pg_background_cancel(%s, %s)", handle)
    assert conn.execute(query, handle).fetchone() == ("error", "57014")
    row = conn.execute("SELECT workers_failed, workers_canceled FROM pg_background_stats()")
    assert row.fetchone() == (1, 0)


def test_cancel_of_a_job_that_catches_it_stops_the_next_statement(
    conn: Connection, observer: Connection, table: str, monitor: Monitor, gate: Gate
) -> None:
    """The job is told again and again until it has ended."""
    job = (
        "DO $$ BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END $$;"
        f" {gate.sql}; INSERT INTO {table} VALUES (1)"
    )
    handle = launch_v2(conn, job)
    wait_until(lambda: monitor.state(handle.pid) == ("active", "PgSleep"))
    conn.execute("SELECT pg_background_cancel(%s, %s, 20000)", handle)
    assert scalar(conn, "SELECT state FROM pg_background_outcome(%s, %s)", *handle) == "canceled"
    gate.open()
    assert committed(observer) == []


def test_rows_dropped_after_a_cancel_that_the_job_caught_are_not_passed_over(
    conn: Connection, monitor: Monitor
) -> None:
    job = (
        "DO $$ BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END $$;"
        " SELECT n FROM generate_series(1, 10) n"
    )
    handle = launch_v2(conn, job)
    wait_until(lambda: monitor.state(handle.pid) == ("active", "PgSleep"))
    conn.execute("SELECT pg_background_cancel(%s, %s, 20000)", handle)
    query = f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)"
    assert failure(conn, query).sqlstate == "57014"


# --- detach ---


@pytest.mark.parametrize("name", ["detach_v2", "detach"])
def test_detached_job_runs_on(
    client: Client, observer: Connection, gate: Gate, table: str, name: str
) -> None:
    handle = client.launch(f"{gate.sql}; INSERT INTO {table} VALUES (1); SELECT 1")
    assert client.call(name, handle.sql) in (None, "")
    refused = Refused("42704", f"PID {handle.pid} is not attached to this session")
    for call in (f"detach_v2({handle.sql})", f"detach({handle.pid})", f"detach({handle.sql})"):
        assert client.error(f"SELECT pg_background_{call}") == refused
    result = f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)"
    assert client.error(result) == refused
    assert client.rows("SELECT pid FROM pg_background_list") == []
    gate.open()
    wait_until_ended(observer, handle.pid)
    assert committed(observer) == [1]


def test_detached_job_is_still_known_by_its_handle(client: Client, gate: Gate) -> None:
    handle = client.launch(gate.sql)
    client.call("detach", handle.sql)
    assert state(client, handle) == "running"
    assert client.call("wait_v2_timeout", handle.sql, 0) == "f"
    client.call("cancel", handle.sql, 20000)
    assert state(client, handle) == "canceled"


# --- all at once ---


@pytest.mark.parametrize("name", ["cancel_all_v2", "cancel_all"])
def test_cancel_all(
    client: Client, observer: Connection, gate: Gate, table: str, name: str
) -> None:
    done = client.ended("SELECT 1")
    jobs = [client.launch(f"{gate.sql}; INSERT INTO {table} VALUES (1)") for _ in range(3)]
    assert client.call(name) == "3"
    for handle in jobs:
        assert client.call("wait", handle.sql, 20000) == "t"
        assert state(client, handle) == "canceled"
    assert state(client, done) == "stopped"
    assert client.call(name) == "0"
    gate.open()
    assert committed(observer) == []
    assert client.one("SELECT workers_canceled FROM pg_background_stats()") == "3"


@pytest.mark.parametrize("name", ["detach_all_v2", "detach_all"])
def test_detach_all(
    client: Client, observer: Connection, gate: Gate, table: str, name: str
) -> None:
    client.ended("SELECT 1")
    jobs = [client.launch(f"{gate.sql}; INSERT INTO {table} VALUES ({n})") for n in range(2)]
    assert client.call(name) == "3"
    assert client.call(name) == "0"
    assert client.rows("SELECT * FROM pg_background_list") == []
    gate.open()
    for handle in jobs:
        wait_until_ended(observer, handle.pid)
    assert committed(observer) == [0, 1]


@pytest.mark.parametrize("name", ["purge_v2", "purge"])
def test_purge_detaches_those_that_have_ended(client: Client, gate: Gate, name: str) -> None:
    ended = [client.ended("SELECT 1"), client.ended("SELECT 1/0")]
    running = client.launch(gate.sql)
    assert client.call(name) == "2"
    assert client.call(name) == "0"
    assert client.texts("SELECT pid FROM pg_background_list") == [(str(running.pid),)]
    for handle in ended:
        sql = f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)"
        refused = Refused("42704", f"PID {handle.pid} is not attached to this session")
        assert client.error(sql) == refused


@pytest.mark.parametrize("name", ["cancel_by_label_v2", "cancel_by_label"])
def test_cancel_by_label(client: Client, gate: Gate, name: str) -> None:
    labels = ["a-1", "a-2", "ab", "A-1", "a%1", "näht\nx", None]
    jobs = {label: client.launch(gate.sql, label) for label in labels}

    def canceled(pattern: str, *grace: int) -> set[str | None]:
        before = {label for label in labels if state(client, jobs[label]) == "running"}
        count = client.call(name, quoted(pattern), *(grace or (20000,)))
        gone = {label for label in before if state(client, jobs[label]) == "canceled"}
        assert count == str(len(gone))
        return gone

    assert canceled("nothing") == set()
    assert canceled("a\\%1") == {"a%1"}
    assert canceled("a__") == {"a-1", "a-2"}
    assert canceled("a-%") == set()
    assert canceled("n_ht%x") == {"näht\nx"}
    assert canceled("%") == {"ab", "A-1"}
    bad = Refused("22025", "LIKE pattern must not end with escape character")
    # The server's LIKE sees the end of the pattern only if text is left.
    client.launch(gate.sql, "zz")
    assert client.error(f"SELECT pg_background_{name}('z\\')") == bad
    client.call("cancel_all")


def test_cancel_by_label_does_not_wait_without_grace(
    client: Client, observer: Connection, gate: Gate
) -> None:
    handle = client.launch(gate.sql, "graceless")
    assert client.call("cancel_by_label", "'graceless'") == "1"
    assert client.call("wait", handle.sql, 20000) == "t"


# --- whose jobs ---


def test_role_touches_only_jobs_whose_role_it_has_the_rights_of(
    proxy: Proxy, scratch: str, conn: Connection, gate: Gate
) -> None:
    for role in ("toucher_a", "toucher_b"):
        conn.execute(f"CREATE ROLE {role}")
        assert scalar(conn, "SELECT grant_pg_background_privileges(%s)", role) is True
    try:
        mine = launch_v2(conn, gate.sql, "mine")
        conn.execute("SET ROLE toucher_a")
        theirs = launch_v2(conn, gate.sql, "theirs")
        conn.execute("SET ROLE toucher_b")
        for handle in (mine, theirs):
            expected = (
                "42501",
                f'permission denied for background worker with PID "{handle.pid}"',
            )
            for call in (
                "wait_v2({})",
                "wait({}, 1)",
                "wait_v2_timeout({}, 0)",
                "cancel({})",
                "cancel_v2_grace({}, 5)",
                "detach({})",
                "detach_v2({})",
                "get_progress({})",
                "result_info({})",
                "error_info({})",
                "full_sql({})",
                "result({})",
                "wait_any(ARRAY[ROW({})])",
            ):
                error = failure(conn, f"SELECT pg_background_{call.format(handle.sql)}")
                assert message(error) == expected, call
            outcome = "SELECT state, label FROM pg_background_outcome(%s, %s)"
            assert conn.execute(outcome, handle).fetchone() == (None, None)
            array = f"ARRAY[ROW({handle.sql})]"
            drained = conn.execute(f"SELECT state FROM pg_background_drain({array})")
            assert drained.fetchall() == [(None,)]
        for call in ("cancel_all()", "detach_all()", "purge()", "cancel_by_label('%')"):
            assert scalar(conn, f"SELECT pg_background_{call}") == 0
        for source in ("list()", "list_all()", "list", "activity"):
            assert conn.execute(f"SELECT pid FROM pg_background_{source}").fetchall() == []
        conn.execute("SET ROLE toucher_a")
        seen = conn.execute("SELECT pid, label FROM pg_background_list").fetchall()
        assert seen == [(theirs.pid, "theirs")]
        assert scalar(conn, "SELECT pg_background_wait_v2_timeout(%s, %s, 0)", *theirs) is False
        conn.execute("RESET ROLE")
        seen = conn.execute("SELECT pid FROM pg_background_list").fetchall()
        assert sorted(seen) == sorted([(mine.pid,), (theirs.pid,)])
        conn.execute("GRANT toucher_a TO toucher_b")
        conn.execute("SET ROLE toucher_b")
        assert scalar(conn, "SELECT pg_background_cancel_all()") == 1
        assert scalar(conn, "SELECT pg_background_wait(%s, %s)", *theirs) is True
        conn.execute("RESET ROLE")
        gate.open()
        assert scalar(conn, "SELECT pg_background_wait(%s, %s)", *mine) is True
    finally:
        conn.execute("RESET ROLE")
        for role in ("toucher_a", "toucher_b"):
            conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_role_without_a_grant_may_call_none_of_them(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(dbname=scratch, user="alice") as conn:
        for call in (
            "launch_v2('')",
            "submit('')",
            "wait(1, 1)",
            "cancel(1, 1)",
            "detach(1, 1)",
            "cancel_all()",
            "detach_all()",
            "purge()",
            "cancel_by_label('%')",
            "outcome(1, 1)",
            "stats()",
            "run('')",
            "wait_any(NULL)",
            "list()",
            "list_all()",
            "run_query('')",
            "drain(NULL)",
        ):
            name = call.partition("(")[0]
            error = failure(conn, f"SELECT * FROM pg_background_{call}")
            assert message(error) == (
                "42501",
                f"permission denied for function pg_background_{name}",
            )
        for view in ("list", "activity"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(f"SELECT * FROM pg_background_{view}")
