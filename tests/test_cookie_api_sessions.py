"""Jobs of other sessions: followed and stopped by their handle, also after their session."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Client, Gate, Handle, handles_sql, open_client
from tests.support.background import failure, message, wait_until, wait_until_ended
from tests.support.servers import Connection, Proxy


@pytest.fixture
def other(proxy: Proxy, scratch: str) -> Any:
    """A second session of the superuser."""
    client = open_client("text", proxy, dbname=scratch)
    yield client
    client.close()


def test_other_session_follows_a_job(client: Client, other: Client, gate: Gate) -> None:
    job = f"{gate.sql}; SELECT 7"
    handle = client.launch(job, "followed")
    assert other.call("wait_v2_timeout", handle.sql, 0) == "f"
    columns = "state, label, completed"
    sql = f"SELECT {columns} FROM pg_background_outcome({handle.sql})"
    assert other.texts(sql) == [("running", "followed", "f")]
    assert other.call("full_sql", handle.sql) == job
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    assert other.call("wait", handle.sql, 20000) == "t"
    opener.join()
    assert other.texts(sql) == [("stopped", "followed", "t")]
    assert other.call("result_info_v2", handle.sql) == "(1,SELECT,t,f)"
    # Its rows are still its own session's.
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "7"


def test_other_session_stops_a_job(
    client: Client, other: Client, observer: Connection, gate: Gate
) -> None:
    handle = client.launch(f"{gate.sql}; SELECT 1")
    gate.wait_for(handle)
    other.call("cancel", handle.sql, 20000)
    for session in (client, other):
        state = session.one(f"SELECT state FROM pg_background_outcome({handle.sql})")
        assert state == "canceled"
    error = client.error(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)")
    assert error.sqlstate == "57014"
    assert client.one("SELECT workers_canceled FROM pg_background_stats()") == "1"
    assert other.one("SELECT workers_canceled FROM pg_background_stats()") == "0"


def test_other_session_cannot_take_a_job_away(client: Client, other: Client, gate: Gate) -> None:
    handle = client.launch(f"{gate.sql}; SELECT 7")
    for call in (f"detach({handle.sql})", f"detach_v2({handle.sql})", f"detach({handle.pid})"):
        refused = other.error(f"SELECT pg_background_{call}")
        expected = ("42704", f"PID {handle.pid} is not attached to this session")
        assert (refused.sqlstate, refused.message) == expected
    for call in ("cancel_all()", "detach_all()", "purge()", "cancel_by_label('%')"):
        assert other.one(f"SELECT pg_background_{call}") == "0"
    gate.open()
    sql = f"SELECT state FROM pg_background_drain({handles_sql([handle])})"
    assert other.texts(sql) == [("stopped",)]
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "7"


def test_wait_any_over_jobs_of_two_sessions(client: Client, other: Client, gate: Gate) -> None:
    slow, fast = other.launch(gate.sql), client.launch("SELECT 1")
    array = handles_sql([slow, fast])
    assert other.call("wait_any", array) == f"({fast.pid},{fast.cookie})"


def test_list_all(client: Client, other: Client, gate: Gate) -> None:
    mine, theirs = client.launch(gate.sql, "mine"), other.launch(gate.sql, "theirs")
    ended = other.ended("SELECT 1", "ended")
    rows = client.texts("SELECT pid, cookie, label, state FROM pg_background_list_all()")
    # Other tests' labels may hold newlines, which psql does not tell from the end of a row.
    assert {row for row in rows if row[2:3] in (("mine",), ("theirs",), ("ended",))} >= {
        (str(mine.pid), str(mine.cookie), "mine", "running"),
        (str(theirs.pid), str(theirs.cookie), "theirs", "running"),
        (str(ended.pid), str(ended.cookie), "ended", "stopped"),
    }
    [own] = client.texts("SELECT label FROM pg_background_list()")
    assert own == ("mine",)


def test_list_all_is_of_the_current_role(
    proxy: Proxy, scratch: str, conn: Connection, gate: Gate
) -> None:
    conn.execute("CREATE ROLE lister LOGIN")
    conn.execute("SELECT grant_pg_background_privileges('lister')")
    try:
        with (
            proxy.connect(dbname=scratch, user="lister") as first,
            proxy.connect(dbname=scratch, user="lister") as second,
        ):
            hidden = conn.execute("SELECT (pg_background_launch_v2(%s)).*", [gate.sql]).fetchone()
            row = first.execute("SELECT (pg_background_launch_v2(%s)).*", [gate.sql]).fetchone()
            assert hidden is not None
            assert row is not None
            query = "SELECT pid, cookie FROM pg_background_list_all()"
            assert second.execute(query).fetchall() == [row]
            assert set(conn.execute(query).fetchall()) >= {row, hidden}
            error = failure(second, "SELECT pg_background_cancel(%s, %s)", hidden)
            assert message(error) == (
                "42501",
                f'permission denied for background worker with PID "{hidden[0]}"',
            )
            second.execute("SELECT pg_background_cancel(%s, %s, 20000)", row)
            sql = "SELECT state FROM pg_background_outcome(%s, %s)"
            assert second.execute(sql, row).fetchone() == ("canceled",)
            conn.execute("SELECT pg_background_cancel(%s, %s, 20000)", hidden)
    finally:
        query = "SELECT 1 FROM pg_stat_activity WHERE usename = 'lister'"
        wait_until(lambda: conn.execute(query).fetchone() is None)
        conn.execute("DROP OWNED BY lister; DROP ROLE lister")


@pytest.mark.parametrize("kind", ["psql", "text", "binary", "asyncpg"])
def test_job_is_known_after_its_session_ended(
    proxy: Proxy, scratch: str, observer: Connection, gate: Gate, other: Client, kind: str
) -> None:
    client = open_client(kind, proxy, dbname=scratch)
    running, ended = client.launch(gate.sql, "left"), client.ended("SELECT 1")
    client.close()
    sql = "SELECT state, label FROM pg_background_outcome({})"
    assert other.texts(sql.format(running.sql)) == [("running", "left")]
    assert other.texts(sql.format(ended.sql)) == [("stopped", None)]
    gate.open()
    assert other.call("wait", running.sql, 20000) == "t"
    wait_until_ended(observer, running.pid)
    assert other.texts(sql.format(running.sql)) == [("stopped", "left")]


def test_job_is_stopped_after_its_session_ended(
    proxy: Proxy, scratch: str, gate: Gate, other: Client
) -> None:
    client = open_client("text", proxy, dbname=scratch)
    handle = client.launch(gate.sql)
    gate.wait_for(handle)
    client.close()
    other.call("cancel", handle.sql, 20000)
    assert other.one(f"SELECT state FROM pg_background_outcome({handle.sql})") == "canceled"


def test_outcome_is_forgotten_after_the_retention(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy("--outcome-retention", "1s")
    with proxy.connect(dbname=scratch) as conn, proxy.connect(dbname=scratch) as other:
        row = conn.execute("SELECT (pg_background_launch_v2('SELECT 5')).*").fetchone()
        assert row is not None
        outcome = "SELECT state FROM pg_background_outcome(%s, %s)"
        assert conn.execute("SELECT pg_background_wait(%s, %s)", row).fetchone() == (True,)
        assert other.execute(outcome, row).fetchone() == ("stopped",)
        wait_until(lambda: other.execute(outcome, row).fetchone() == (None,))
        assert other.execute("SELECT * FROM pg_background_list_all()").fetchall() == []
        check_own_session_still_knows(conn, Handle(*row))


def test_no_retention(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy("--outcome-retention", "0")
    with proxy.connect(dbname=scratch) as conn, proxy.connect(dbname=scratch) as other:
        row = conn.execute("SELECT (pg_background_launch_v2('SELECT 5')).*").fetchone()
        assert row is not None
        assert conn.execute("SELECT pg_background_wait(%s, %s)", row).fetchone() == (True,)
        outcome = "SELECT state FROM pg_background_outcome(%s, %s)"
        assert other.execute(outcome, row).fetchone() == (None,)
        check_own_session_still_knows(conn, Handle(*row))


def check_own_session_still_knows(conn: Connection, handle: Handle) -> None:
    for call, expected in (
        ("wait({})", True),
        ("wait_v2_timeout({}, 0)", True),
        ("full_sql({})", "SELECT 5"),
        ("cancel({})", ""),
        ("error_info({})", None),
    ):
        sql = f"SELECT pg_background_{call.format(handle.sql)}"
        assert conn.execute(sql).fetchone() == (expected,)
    outcome = f"SELECT state FROM pg_background_outcome({handle.sql})"
    assert conn.execute(outcome).fetchone() == ("stopped",)
    query = f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)"
    assert conn.execute(query).fetchone() == (5,)


def test_label_and_error_in_the_encoding_of_the_asking_session(
    start_proxy: StartProxy, scratch: str
) -> None:
    proxy = start_proxy()  # no other test lists this job
    with proxy.connect(dbname=scratch) as first, proxy.connect(dbname=scratch) as second:
        first.execute("SET client_encoding = 'LATIN1'")
        row = first.execute(
            "SELECT (pg_background_launch_v2(%s, 0, %s)).*", ["SELECT 'ä'::int", "näht"]
        ).fetchone()
        assert row is not None
        assert first.execute("SELECT pg_background_wait(%s, %s)", row).fetchone() == (True,)
        sql = "SELECT label, error_message FROM pg_background_outcome(%s, %s)"
        expected = ("näht", 'invalid input syntax for type integer: "ä"')
        assert first.execute(sql, row).fetchone() == expected
        assert second.execute(sql, row).fetchone() == expected
        assert second.execute("SELECT pg_background_full_sql(%s, %s)", row).fetchone() == (
            "SELECT 'ä'::int",
        )
