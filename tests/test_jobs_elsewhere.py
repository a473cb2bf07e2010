"""Calls of a session about the jobs of another process: another worker of the same proxy, and
another proxy in front of the same server. Both know the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.conftest import shared_proxy, upstream_of
from tests.support.api_clients import Gate
from tests.support.background import failure, message, wait_until
from tests.support.replicas import Replicas, options, replicas, secret_in
from tests.support.servers import Connection, Proxy, Server
from tests.test_workers import launch, one, sessions, state


@pytest.fixture(scope="module", params=("workers", "replicas"))
def pair(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy | Replicas]:
    """Two processes."""
    if request.param == "workers":
        with shared_proxy(upstream_of(server), "--workers", "2") as proxy:
            yield proxy
        return
    folder = tmp_path_factory.mktemp("replicas")
    with replicas(upstream_of(server), *options(secret_in(folder / "secret"))) as found:
        yield found


@pytest.fixture
def both(pair: Proxy | Replicas, scratch: str) -> Iterator[tuple[Connection, Connection]]:
    """A session in each of them."""
    opened = (
        sessions(pair, dbname=scratch) if isinstance(pair, Proxy) else pair.sessions(dbname=scratch)
    )
    with opened as found:
        yield found


def test_a_job_is_known_to_the_other_process_as_soon_as_it_is_launched(
    both: tuple[Connection, Connection],
) -> None:
    here, there = both
    for turn in range(50):
        assert state(there, launch(here, "SELECT 1", f"a{turn}")) in ("running", "stopped")
        here, there = there, here
    labels = {row[-1] for row in there.execute("SELECT * FROM pg_background_list_all()")}
    assert labels >= {f"a{turn}" for turn in range(50)}


def test_all_that_is_known_is_known_to_the_other_process(
    both: tuple[Connection, Connection], gate: Gate, background: Callable[..., Future[Any]]
) -> None:
    here, there = both
    reports = "SELECT pg_background_progress(40, 'zwei Fünftel')"
    sql = f'{reports}; {gate.sql}; CREATE TEMP TABLE t AS SELECT generate_series(1, 5) AS "ü"'
    handle = launch(here, sql, "lábel")
    call = "SELECT {}(%s::int4, %s::int8{})"
    wait_until(lambda: one(there, call.format("pg_background_get_progress", ""), handle)[0])
    for conn in both:
        assert one(conn, call.format("pg_background_wait_v2_timeout", ", 0"), handle) is False
        assert one(conn, call.format("pg_background_full_sql", ""), handle) == sql
        row = conn.execute(
            "SELECT * FROM pg_background_get_progress(%s::int4, %s::int8)", handle
        ).fetchone()
        assert row == (40, "zwei Fünftel")
        assert one(conn, call.format("pg_background_error_info", ""), handle) is None
    waiting = [
        background(one, there, call.format("pg_background_wait", f", {timeout}"), handle)
        for timeout in (20_000,)
    ]
    time.sleep(0.1)
    assert not waiting[0].done()
    gate.open()
    assert waiting[0].result(10) is True
    found = [
        [
            conn.execute(f"SELECT * FROM {name}(%s::int4, %s::int8)", handle).fetchall()
            for name in (
                "pg_background_outcome",
                "pg_background_result_info",
                "pg_background_get_progress",
            )
        ]
        + [one(conn, call.format("pg_background_status_v2", ""), handle)]
        + [
            row
            for row in conn.execute("SELECT * FROM pg_background_list_all()")
            if (row[0], row[1]) == handle
        ]
        for conn in both
    ]
    assert found[0] == found[1]
    assert found[1][0][0][2:8] == ("stopped", False, True, False, 5, "SELECT")
    assert found[1][0][0][10] == "lábel"
    # Its rows are its own session's alone.
    error = failure(there, "SELECT * FROM pg_background_result(%s::int4, %s::int8)", handle)
    assert message(error) == ("42704", f"PID {handle[0]} is not attached to this session")
    error = failure(there, "SELECT pg_background_detach(%s::int4, %s::int8)", handle)
    assert message(error) == ("42704", f"PID {handle[0]} is not attached to this session")


def test_the_error_of_a_job_is_known_to_the_other_process(
    both: tuple[Connection, Connection],
) -> None:
    here, there = both
    here.execute("CREATE TABLE IF NOT EXISTS checked (n int CONSTRAINT positive CHECK (n > 0))")
    handle = launch(here, "INSERT INTO checked VALUES (-1)")
    assert one(there, "SELECT pg_background_wait(%s::int4, %s::int8, 20000)", handle) is True
    query = "SELECT * FROM pg_background_error_info(%s::int4, %s::int8)"
    [ours], [theirs] = (conn.execute(query, handle).fetchall() for conn in both)
    assert ours == theirs
    assert ours[0] == "23514"
    assert ours[-1] == "positive"


def test_a_long_sql_is_known_whole_to_the_other_process(
    both: tuple[Connection, Connection],
) -> None:
    here, there = both
    for size in (60_000, 70_000):
        handle = launch(here, f"SELECT '{'ä' * (size // 2)}'")
        query = "SELECT pg_background_full_sql(%s::int4, %s::int8)"
        assert one(there, query, handle) == one(here, query, handle)


def test_a_job_is_canceled_from_the_other_process(
    both: tuple[Connection, Connection], gate: Gate
) -> None:
    here, there = both
    for grace in (0, 20_000):
        handle = launch(here, f"{gate.sql}; SELECT 1")
        there.execute("SELECT pg_background_cancel(%s::int4, %s::int8, %s)", [*handle, grace])
        if not grace:
            assert one(there, "SELECT pg_background_wait(%s::int4, %s::int8)", handle) is True
        assert state(there, handle) == state(here, handle) == "canceled"
        query = "SELECT * FROM pg_background_result(%s::int4, %s::int8) AS (n int)"
        assert failure(here, query, handle).sqlstate == "57014"


def test_jobs_of_both_processes_are_waited_for_together(
    both: tuple[Connection, Connection], gate: Gate, background: Callable[..., Future[Any]]
) -> None:
    here, there = both
    slow = launch(here, gate.sql)
    slower = launch(there, gate.sql)
    fast = launch(there, "SELECT pg_sleep(0.3)")
    handles = ", ".join(f"ROW({pid}, {cookie})" for pid, cookie in (slow, fast, slower))
    array = f"ARRAY[{handles}]::pg_background_handle[]"
    for conn in both:
        assert tuple(conn.execute(f"SELECT (pg_background_wait_any({array})).*")) == (fast,)
        drained = conn.execute(f"SELECT state FROM pg_background_drain({array}, 200)").fetchall()
        assert [row[0] for row in drained] == ["running", "stopped", "running"]
    draining = background(
        lambda: here.execute(f"SELECT state FROM pg_background_drain({array})").fetchall()
    )
    time.sleep(0.1)
    assert not draining.done()
    gate.open()
    assert draining.result(20) == [("stopped",)] * 3


def test_a_wait_for_a_job_of_the_other_process_ends_as_any_wait(
    both: tuple[Connection, Connection], gate: Gate
) -> None:
    here, there = both
    handle = launch(here, gate.sql)
    there.execute("SET statement_timeout = '200ms'")
    error = failure(there, "SELECT pg_background_wait(%s::int4, %s::int8)", handle)
    assert message(error) == ("57014", "canceling statement due to statement timeout")
    there.execute("RESET statement_timeout")
    began = time.monotonic()
    query = "SELECT pg_background_wait(%s::int4, %s::int8, 300)"
    assert one(there, query, handle) is False
    assert 0.25 < time.monotonic() - began < 5


def test_a_wrong_cookie_is_wrong_in_all_processes(both: tuple[Connection, Connection]) -> None:
    here, there = both
    pid, cookie = launch(here, "SELECT 1")
    query = "SELECT pg_background_wait(%s::int4, %s::int8)"
    assert failure(here, query, [pid, cookie ^ 1]).sqlstate == "55000"
    assert failure(there, query, [pid, cookie ^ 1]).sqlstate == "42704"
    assert state(there, (pid, cookie ^ 1)) is None
