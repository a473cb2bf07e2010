"""An outcome that stays: what `pg_background_history` says of jobs, and when it cannot know."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.api_clients import Gate, Handle
from tests.support.background import failure, wait_until
from tests.support.in_database import one, with_extension
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

Row = tuple[Any, ...]


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    yield from with_extension(server, proxy, scratch)


@pytest.fixture
def writer(recording: Proxy, scratch: str) -> Iterator[Connection]:
    """A session whose jobs have a history."""
    with recording.connect(dbname=scratch) as conn:
        yield conn


def submit(conn: Connection, job: str, label: str | None = None) -> Handle:
    [[pid, cookie]] = conn.execute(
        "SELECT * FROM pg_background_submit(%s, 0, %s)", [job, label]
    ).fetchall()
    return Handle(pid, cookie)


def history(conn: Connection, handle: Handle, columns: str = "state") -> list[Row]:
    return conn.execute(
        f"SELECT {columns} FROM pg_background_history WHERE pid = %s AND cookie = %s".encode(),
        [*handle],
    ).fetchall()


def wait_for(conn: Connection, handle: Handle, state: str) -> None:
    wait_until(lambda: history(conn, handle) == [(state,)])


def test_what_a_row_says(writer: Connection, observer: Connection, scratch: str) -> None:
    job = "SELECT pg_background_progress(40, 'half'); SELECT n FROM generate_series(1, 7) n"
    before = one(observer, "SELECT clock_timestamp()")
    handle = submit(writer, job, "counting")
    wait_for(observer, handle, "stopped")
    columns = (
        "label, role, database, sql, attempts, row_count, command_tag, sqlstate, message,"
        " detail, progress_pct, progress_msg"
    )
    assert history(observer, handle, columns) == [
        *[("counting", "postgres", scratch, job, 1, 7, "SELECT", None, None, None, 40, "half")]
    ]
    [(queued, started, finished, proxy)] = history(
        observer, handle, "queued_at, started_at, finished_at, proxy"
    )
    assert queued <= started <= finished
    assert abs((started - before).total_seconds()) < 60
    assert "/" in proxy


def test_a_failed_job(writer: Connection, observer: Connection) -> None:
    job = "DO $$BEGIN RAISE 'no luck' USING DETAIL = 'today', ERRCODE = 'AB123'; END$$"
    handle = submit(writer, job)
    wait_for(observer, handle, "error")
    columns = "label, sqlstate, message, detail, row_count"
    assert history(observer, handle, columns) == [(None, "AB123", "no luck", "today", None)]


def test_what_a_job_leaves_in_its_session_does_not_matter(
    writer: Connection, observer: Connection
) -> None:
    for job in (
        "SET statement_timeout = 1; SET default_transaction_read_only = on; SET search_path = ''",
        "SET client_encoding = LATIN1; SELECT 'x'::bytea; SET DateStyle = 'German'",
        "SET ROLE pg_monitor; CREATE TEMP TABLE pg_background_history (x int)",
        "SELECT pg_terminate_backend(pg_backend_pid())",
    ):
        handle = submit(writer, job)
        wait_until(lambda h=handle: history(observer, h) not in ([], [("running",)]))  # type: ignore[misc]
        assert history(observer, handle, "role") == [("postgres",)]
    assert history(observer, handle, "state, sqlstate") == [("error", "08006")]


def test_a_job_that_runs_and_is_canceled(
    writer: Connection, observer: Connection, gate: Gate
) -> None:
    handle = submit(writer, gate.sql)
    wait_for(observer, handle, "running")
    assert history(observer, handle, "finished_at, sql") == [(None, gate.sql)]
    writer.execute("SELECT pg_background_cancel(%s, %s)", handle)
    wait_for(observer, handle, "canceled")
    gate.open()
    assert history(observer, handle, "sqlstate") == [("57014",)]


def test_a_terminated_backend(writer: Connection, observer: Connection, gate: Gate) -> None:
    """The server says why: that is an error, and not a job of which nobody knows."""
    handle = submit(writer, gate.sql)
    gate.wait_for(handle)
    observer.execute("SELECT pg_terminate_backend(%s)", [handle.pid])
    wait_for(observer, handle, "error")
    gate.open()
    [(code, detail)] = history(observer, handle, "sqlstate, detail")
    assert code == "08006"
    assert "administrator" in detail


def test_a_job_of_a_proxy_that_is_gone(
    start_proxy: StartProxy, recording: Proxy, observer: Connection, scratch: str, gate: Gate
) -> None:
    """It is lost when its backend has ended, not before: until then it may go on."""
    proxy = start_proxy("--history", "all")
    with proxy.connect(dbname=scratch) as conn:
        handle = submit(conn, gate.sql, "orphan")
        done = submit(conn, "SELECT 1", "done")
        wait_for(observer, handle, "running")
        wait_for(observer, done, "stopped")
        proxy.kill()
    gate.wait_for(handle)
    assert history(observer, handle) == [("running",)]
    observer.execute("SELECT pg_terminate_backend(%s)", [handle.pid])
    wait_for(observer, handle, "lost")
    gate.open()
    # Another proxy, and none that remembers: the functions go by the history.
    with recording.connect(dbname=scratch) as conn:
        query = (
            "SELECT state, completed, has_error, sqlstate, label FROM pg_background_outcome(%s, %s)"
        )
        lost = ("lost", True, True, "08006", "orphan")
        assert conn.execute(query.encode(), handle).fetchall() == [lost]
        stopped = ("stopped", True, False, None, "done")
        assert conn.execute(query.encode(), done).fetchall() == [stopped]
        listed = conn.execute("SELECT * FROM pg_background_list_all()").fetchall()
        assert {(row[0], row[1], row[5], row[9]) for row in listed} >= {
            (*handle, "lost", "orphan"),
            (*done, "stopped", "done"),
        }
        status = one(conn, "SELECT pg_background_status_v2(%s, %s)", [*done])
        assert (status["state"], status["row_count"]) == ("stopped", 1)
        # From inside the database, too.
        state = f"(o).state FROM (SELECT pg_background_outcome({handle.sql}) AS o) s"
        assert one(conn, "SELECT inside(%s)", [state]) == "lost"


def test_no_job_is_called_lost_too_early(
    recording: Proxy, observer: Connection, scratch: str
) -> None:
    """When its backend has gone, and its end is not written yet."""
    jobs = 30
    with recording.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 40")
        for number in range(jobs):
            submit(conn, f"SELECT pg_sleep({0.15 + number / 200})", "early")
    seen: set[str] = set()
    query = "SELECT state FROM pg_background_history WHERE label = 'early'"

    def all_stopped() -> bool:
        states = [state for [state] in observer.execute(query)]
        seen.update(states)
        return states.count("stopped") == jobs

    wait_until(all_stopped)
    assert seen <= {"running", "stopped"}


def test_off_by_default(conn: Connection, observer: Connection) -> None:
    handle = submit(conn, "SELECT 1/0", "off")
    conn.execute("SELECT pg_background_wait(%s, %s)", handle)
    assert history(observer, handle) == []
    assert conn.execute("SELECT state FROM pg_background_outcome(1, 1)").fetchall() == [(None,)]


def test_errors_only(
    start_proxy: StartProxy, observer: Connection, scratch: str, gate: Gate
) -> None:
    """A job that has run for a moment has a row, so that it is seen if it is lost; it goes when
    the job has ended well."""
    proxy = start_proxy("--history", "errors")
    with proxy.connect(dbname=scratch) as conn:
        well = submit(conn, "SELECT 1", "well")
        slow = submit(conn, gate.sql)
        wait_for(observer, slow, "running")
        failed = submit(conn, "SELECT 1/0")
        wait_for(observer, failed, "error")
        gate.open()
        wait_until(lambda: history(observer, slow) == [])
        assert history(observer, well) == []
        assert conn.execute("SELECT state FROM pg_background_outcome(%s, %s)", slow).fetchall() == [
            ("stopped",)
        ]


def test_labeled_only(start_proxy: StartProxy, observer: Connection, scratch: str) -> None:
    proxy = start_proxy("--history", "labeled", "--history-sql", "off")
    with proxy.connect(dbname=scratch) as conn:
        without = submit(conn, "SELECT 1/0")
        labeled = submit(conn, "SELECT 'secret'", "named")
        wait_for(observer, labeled, "stopped")
        assert history(observer, without) == []
        [(sql,)] = history(observer, labeled, "sql")
        assert sql.startswith("sha256:")
        assert len(sql) == 71


def test_attempts(writer: Connection, observer: Connection) -> None:
    observer.execute("CREATE SEQUENCE tries")
    job = (
        "DO $$BEGIN IF nextval('tries') < 3 THEN RAISE SQLSTATE '40001'; END IF; END$$;"
        " SELECT pg_sleep(0.5)"
    )
    [handle] = writer.execute(
        "SELECT * FROM pg_background_submit(%s, 0, 'again', retries => 5)", [job]
    ).fetchall()
    handle = Handle(*handle)
    seen = set()
    until = time.monotonic() + 20
    while ("stopped",) not in seen and time.monotonic() < until:
        seen.update(history(observer, handle))
    assert ("stopped",) in seen
    assert ("lost",) not in seen
    assert history(observer, handle, "attempts, sqlstate") == [(3, None)]


def test_texts_in_other_encodings(recording: Proxy, scratch: str, observer: Connection) -> None:
    with recording.connect(dbname=scratch, client_encoding="LATIN1") as conn:
        handle = submit(conn, "DO $$BEGIN RAISE 'schöne Bescherung'; END$$", "größe")
        wait_for(observer, handle, "error")
        assert history(observer, handle, "label, message") == [("größe", "schöne Bescherung")]
    with recording.connect(dbname=scratch) as conn:
        for job in ("SELECT '" + "ü" * 9000 + "'", 'SELECT \'{"\\\\}\' AS "q""", $$,NULL$$', ""):
            handle = submit(conn, job, '"{},\\ NULL')
            wait_for(observer, handle, "stopped")
            [(sql, label)] = history(observer, handle, "sql, label")
            assert label == '"{},\\ NULL'
            assert sql == job or (sql.endswith("[...]") and job.startswith(sql[:-5]))


def test_long_texts_are_cut(writer: Connection, observer: Connection) -> None:
    job = "DO $$BEGIN RAISE '%', repeat('m', 100000) USING DETAIL = repeat('d', 100000); END$$"
    handle = submit(writer, job)
    wait_for(observer, handle, "error")
    [(message, detail)] = history(observer, handle, "length(message), length(detail)")
    assert message <= 4200
    assert detail <= 4200


def test_set_role(writer: Connection, observer: Connection) -> None:
    observer.execute("CREATE ROLE history_role; GRANT pgbackground_role TO history_role")
    try:
        writer.execute("SET ROLE history_role")
        handle = submit(writer, "RESET ROLE; SELECT 1")
        wait_for(observer, handle, "stopped")
        assert history(observer, handle, "role") == [("history_role",)]
        writer.execute("RESET ROLE")
        writer.execute("SET SESSION AUTHORIZATION history_role")
        handle = submit(writer, "SELECT 1")
        wait_for(observer, handle, "stopped")
        assert history(observer, handle, "role") == [("history_role",)]
    finally:
        writer.execute("RESET SESSION AUTHORIZATION")
        observer.execute("DROP OWNED BY history_role; DROP ROLE history_role")


def test_jobs_that_start_at_commit(writer: Connection, observer: Connection) -> None:
    """From the commit on; and nothing of those that were rolled back."""
    call = "SELECT cookie FROM pg_background_submit_at_commit(%s, 0, %s)"
    cookies = []
    for job, label, end in (
        ("SELECT 1", "committed", "COMMIT"),
        ("SELECT 1/0", "failed", "COMMIT"),
        ("SELECT 1", "forgotten", "ROLLBACK"),
    ):
        writer.execute("BEGIN")
        cookies += writer.execute(call, [job, label]).fetchall()
        writer.execute(end.encode())
    query = (
        "SELECT label, state FROM pg_background_history"
        " WHERE label IN ('committed', 'failed', 'forgotten') ORDER BY label"
    )
    wait_until(
        lambda: (
            observer.execute(query).fetchall() == [("committed", "stopped"), ("failed", "error")]
        )
    )
    outcome = "SELECT state FROM pg_background_outcome(NULL, %s)"
    assert writer.execute(outcome, cookies[1]).fetchall() == [("error",)]


def test_a_queued_job(writer: Connection, observer: Connection, gate: Gate) -> None:
    """It has a row when it has begun; the time that it waited is there."""
    writer.execute("SET pg_background.max_workers = 1; SET pg_background.queue = on")
    first = submit(writer, gate.sql)
    gate.wait_for(first)
    [(_, cookie)] = writer.execute(
        "SELECT * FROM pg_background_submit('SELECT pg_sleep(0.01)', 0, 'queued')"
    ).fetchall()
    query = (
        "SELECT state, pid > 0, queued_at < started_at FROM pg_background_history WHERE cookie = %s"
    )
    wait_for(observer, first, "running")
    assert observer.execute(query, [cookie]).fetchall() == []
    gate.open()
    wait_until(lambda: observer.execute(query, [cookie]).fetchall() == [("stopped", True, True)])


def test_a_queued_job_that_was_detached_has_its_whole_string(
    writer: Connection, observer: Connection, gate: Gate
) -> None:
    writer.execute("SET pg_background.max_workers = 1; SET pg_background.queue = on")
    submit(writer, gate.sql)
    string = "SELECT " + "1 + " * 500 + "1"
    cookie = submit(writer, string).cookie
    writer.execute("SELECT pg_background_detach(NULL, %s)", [cookie])
    gate.open()
    query = "SELECT sql FROM pg_background_history WHERE cookie = %s AND state = 'stopped'"
    assert wait_until(lambda: observer.execute(query, [cookie]).fetchall()) == [(string,)]


def test_many_jobs_at_once(writer: Connection, observer: Connection) -> None:
    writer.execute("SET pg_background.max_workers = 40")
    label = "many"
    handles = [submit(writer, "SELECT 1", label) for _ in range(120)]
    query = "SELECT count(*) FROM pg_background_history WHERE label = 'many' AND state = 'stopped'"
    wait_until(lambda: one(observer, query) == len(handles))


def test_a_database_that_is_read_only_by_default(
    recording: Proxy, observer: Connection, scratch: str
) -> None:
    observer.execute(f'ALTER DATABASE "{scratch}" SET default_transaction_read_only = on')
    try:
        with recording.connect(dbname=scratch) as conn:
            handle = submit(conn, "SELECT 1")
            wait_for(observer, handle, "stopped")
    finally:
        observer.execute(f'ALTER DATABASE "{scratch}" RESET default_transaction_read_only')


def test_without_the_extension(recording: Proxy, db: str, server: Server) -> None:
    """Nothing is written, and nothing fails."""
    with recording.connect(dbname=db) as conn:
        handle = submit(conn, "SELECT 1")
        assert conn.execute("SELECT pg_background_wait(%s, %s)", handle).fetchall() == [(True,)]
        assert conn.execute("SELECT state FROM pg_background_outcome(1, 1)").fetchall() == [(None,)]
        recording.wait_for_log("history: there is no table for the jobs")
        with server.connect(dbname=db) as other:
            assert failure(other, "TABLE pg_background_history").sqlstate == "42P01"


def test_expired_rows_go(start_proxy: StartProxy, observer: Connection, scratch: str) -> None:
    """When another row is written, whoever's that is."""
    with start_proxy("--history", "all", "--history-retention", "2s").connect(
        dbname=scratch
    ) as conn:
        first = submit(conn, "SELECT 1", "first")
        wait_for(observer, first, "stopped")
    with start_proxy("--history", "all").connect(dbname=scratch) as conn:

        def is_gone() -> bool:
            kept = submit(conn, "SELECT 1", "kept")
            wait_for(observer, kept, "stopped")
            return history(observer, first) == []

        wait_until(is_gone)
        kept = "SELECT count(*) FROM pg_background_history WHERE label = 'kept'"
        assert one(observer, kept) > 0


def test_the_end_of_the_proxy(
    start_proxy: StartProxy, observer: Connection, scratch: str, gate: Gate
) -> None:
    """What it ends itself is written before it goes."""
    proxy = start_proxy("--history", "all", "--shutdown-timeout", "0")
    with proxy.connect(dbname=scratch) as conn:
        handle = submit(conn, gate.sql)
        gate.wait_for(handle)
        assert proxy.stop() == 0
    [(state,)] = history(observer, handle)
    assert state in ("canceled", "lost")
    gate.open()


def test_processes_that_are_killed_at_any_moment(
    server: Server, observer: Connection, scratch: str
) -> None:
    """What the history says of a job is so: one that it calls stopped has committed, one that it
    calls an error or canceled has not, and none is said to run whose backend is gone."""
    observer.execute("CREATE TABLE IF NOT EXISTS done (label text)")
    chance = random.Random(15)
    launched: list[tuple[Handle, str]] = []
    killed = 0
    for number in range(6):
        with Proxy(upstream_of(server), "--history", "all") as proxy:
            conn = proxy.connect(dbname=scratch)
            until = time.monotonic() + chance.uniform(0.1, 0.9)
            while time.monotonic() < until:
                label = f"{number}.{len(launched)}"
                seconds = chance.choice((0, 0, 0.05, 0.2, 0.4))
                job = f"INSERT INTO done VALUES ('{label}'); SELECT pg_sleep({seconds})"
                if chance.random() < 0.2:
                    job += "; SELECT 1/0"
                try:
                    launched.append((submit(conn, job, label), label))
                    if chance.random() < 0.2:
                        pid = chance.choice(launched)[0].pid
                        observer.execute("SELECT pg_terminate_backend(%s)", [pid])
                        killed += 1
                except psycopg.Error:
                    if conn.closed:
                        conn = proxy.connect(dbname=scratch)
            proxy.kill()
            conn.close()
    pids = {handle.pid for handle, _ in launched}
    running = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg_background:%.%'"
    wait_until(lambda: not pids & {pid for [pid] in observer.execute(running.encode())})
    done = {label for [label] in observer.execute("SELECT label FROM done")}
    rows = {
        (pid, cookie): state
        for pid, cookie, state in observer.execute(
            "SELECT pid, cookie, state FROM pg_background_history"
        )
    }
    wrong = []
    for handle, label in launched:
        state = rows.get((handle.pid, handle.cookie))
        is_true = {
            "stopped": label in done,
            "error": label not in done,
            "canceled": label not in done,
            "running": False,
            "lost": True,
            None: True,  # its proxy was killed before it could say anything
        }[state]
        if not is_true:
            wrong.append((label, state))
    assert not wrong
    states = [rows.get((handle.pid, handle.cookie)) for handle, _ in launched]
    assert states.count("stopped") > 10
    assert states.count("lost") >= 1
    assert killed > 0
