"""A connection pooler between the proxy and the server: each transaction, or each session, may be
on a server connection that others have had before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import StartProxy
from tests.support.background import (
    failure,
    job_failure,
    launch,
    message,
    result,
    run,
    value,
    wait_until,
)
from tests.support.executors import create_executor, executor_as_before
from tests.support.in_database import with_extension
from tests.support.pgbouncer import PgBouncer, pgbouncer
from tests.support.servers import Connection, Proxy, Server

ROLES = ("app", "limited", "mighty")


@pytest.fixture
def roles(server: Server) -> Iterator[None]:
    with executor_as_before(server):
        with server.connect() as conn:
            create_executor(conn)
            conn.execute(
                "CREATE ROLE limited; CREATE ROLE mighty;"
                " CREATE ROLE app LOGIN IN ROLE limited, mighty, pgbackground_role;"
                " GRANT pgbackground_role TO limited, mighty"
            )
        yield
        server.wait_for_no_clients()
        with server.connect() as conn:
            conn.execute("DROP ROLE app; DROP ROLE limited; DROP ROLE mighty")


@pytest.fixture(params=("session", "transaction"))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bouncer(server: Server, roles: None, mode: str, tmp_path: Path) -> Iterator[PgBouncer]:
    with pgbouncer(server, tmp_path, mode, ROLES) as bouncer:
        yield bouncer


@pytest.fixture
def pooled(bouncer: PgBouncer, start_proxy: StartProxy) -> Iterator[Proxy]:
    """A proxy whose server is PgBouncer."""
    proxy = start_proxy(upstream=f"host=127.0.0.1 port={bouncer.port} sslmode=disable")
    yield proxy
    proxy.stop()


def _connect(endpoint: Proxy | PgBouncer) -> Connection:
    """A session without prepared statements, which PgBouncer 1.18 does not know."""
    conn = endpoint.connect(user="app")
    conn.prepare_threshold = None
    return conn


def _sessions(pooled: Proxy, seed: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Launches one after the other in a session: what each asked for, and what it got."""
    choose = random.Random(seed)
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    with _connect(pooled) as conn:
        for number in range(10):
            role = choose.choice(("limited", "mighty", "none"))
            path, own = f"pg_catalog, s{number}", f"{seed}.{number}"
            with conn.transaction():
                conn.execute(f"SET LOCAL ROLE {role}".encode())
                conn.execute(f"SET LOCAL search_path = {path}".encode())
                conn.execute(f"SET LOCAL my.own = '{own}'".encode())
                [[*got]] = run(
                    conn,
                    "SELECT current_user::text, current_setting('search_path'),"
                    " current_setting('my.own', true)",
                    "a text, b text, c text",
                )
            seen.append((("app" if role == "none" else role, path, own), tuple(got)))
    return seen


def test_every_job_has_the_role_and_settings_of_its_session(pooled: Proxy) -> None:
    with ThreadPoolExecutor(6) as pool:
        for seen in pool.map(lambda seed: _sessions(pooled, seed), range(6)):
            assert [got for _, got in seen] == [wanted for wanted, _ in seen]


def test_nothing_starts_at_commit(pooled: Proxy) -> None:
    """What a pooler lets others have is not listened on."""
    with _connect(pooled) as conn, conn.transaction():
        error = failure(conn, "SELECT pg_background_launch_at_commit('SELECT 1')")
        assert message(error) == (
            "0A000",
            "background workers cannot start at commit behind a connection pooler",
        )
        assert error.diag.message_hint == "Have the proxy connect to the server itself."
        conn.execute("ROLLBACK; BEGIN")


def test_nothing_of_a_job_stays_with_the_server_connection(
    pooled: Proxy, bouncer: PgBouncer
) -> None:
    """Others of the pool would be the job's role otherwise."""
    with (
        _connect(pooled) as conn,
        _connect(bouncer) as other,
    ):
        for _ in range(10):
            with conn.transaction():
                conn.execute("SET LOCAL ROLE mighty; SET LOCAL my.own = 'x'")
                result(conn, launch(conn, "SELECT 1"))
                # While the session has its own server connection, this gets the job's, if any.
                look = "SELECT current_user, COALESCE(current_setting('my.own', true), '')"
                assert other.execute(look).fetchone() == ("app", "")


def test_a_result_is_printed_with_the_sessions_settings(pooled: Proxy) -> None:
    query = "SELECT date '2024-01-02', interval '-1 day'"
    with _connect(pooled) as conn, conn.transaction():
        expected = conn.execute(query.encode()).fetchall()
        for change in ("SET datestyle = 'sql, dmy'", "SET LOCAL intervalstyle = sql_standard"):
            assert result(conn, launch(conn, f"{change}; {query}")) == expected


@pytest.mark.parametrize(
    ("setting", "shown", "wanted"),
    [
        ("default_transaction_isolation = 'serializable'", "transaction_isolation", "serializable"),
        ("default_transaction_read_only = on", "transaction_read_only", "on"),
        ("default_transaction_deferrable = on", "transaction_deferrable", "on"),
        ("statement_timeout = '77s'", "statement_timeout", "77s"),
        ("TimeZone = 'Asia/Tokyo'", "TimeZone", "Asia/Tokyo"),
        ("client_encoding = 'LATIN1'", "client_encoding", "LATIN1"),
    ],
)
def test_what_holds_for_a_transaction_holds_for_the_jobs(
    pooled: Proxy, setting: str, shown: str, wanted: str
) -> None:
    with _connect(pooled) as conn, conn.transaction():
        conn.execute(f"SET LOCAL {setting}".encode())
        assert value(conn, f"SHOW {shown}") == wanted


def test_rows_tags_and_errors_are_those_of_any_job(pooled: Proxy) -> None:
    with _connect(pooled) as conn, conn.transaction():
        conn.execute("SET LOCAL client_min_messages = error")
        assert run(conn, "SELECT 1; SELECT g FROM generate_series(1, 3) g") == [(1,), (2,), (3,)]
        assert run(conn, "SELECT") == [()]
        assert run(conn, "") == []
    with _connect(pooled) as conn:
        row = conn.execute(
            "SELECT state, row_count, command_tag, sqlstate"
            " FROM pg_background_run_v2('CREATE TEMP TABLE t AS SELECT 1')"
        ).fetchone()
        assert row is not None
        assert row[0] == "stopped"
        assert job_failure(conn, "SELECT 1/0").sqlstate == "22012"
        assert conn.execute(
            "SELECT state, sqlstate FROM pg_background_run_v2('SELECT 1; SELECT 1/0')"
        ).fetchone() == ("error", "22012")


def test_a_job_commits_as_a_whole_or_not_at_all(pooled: Proxy, bouncer: PgBouncer) -> None:
    with bouncer.connect() as admin:
        admin.execute(
            "CREATE TABLE kept (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);"
            " GRANT ALL ON kept TO PUBLIC"
        )
        try:
            with _connect(pooled) as conn:
                run(conn, "INSERT INTO kept VALUES (1); INSERT INTO kept VALUES (2)")
                for job, sqlstate in (
                    ("INSERT INTO kept VALUES (3); SELECT 1/0", "22012"),
                    ("INSERT INTO kept VALUES (1)", "23505"),
                ):
                    assert job_failure(conn, job).sqlstate == sqlstate
            assert admin.execute("SELECT n FROM kept ORDER BY n").fetchall() == [(1,), (2,)]
        finally:
            admin.execute("DROP TABLE kept")


@pytest.mark.parametrize(
    "job",
    [
        "VACUUM pg_class",
        "CREATE DATABASE no",
        "DO $$ BEGIN COMMIT; END $$",
        "DISCARD ALL",
    ],
)
def test_what_refuses_transaction_blocks_says_why(pooled: Proxy, job: str) -> None:
    with pooled.connect() as conn:
        error = job_failure(conn, job)
        assert error.sqlstate in ("25001", "2D000"), message(error)
        assert "connection pooler" in (error.diag.message_hint or "")


def test_a_cancelled_job_ends(pooled: Proxy) -> None:
    with _connect(pooled) as conn:
        row = conn.execute(
            "SELECT state, timed_out FROM pg_background_run_v2('SELECT pg_sleep(60)', 0, 100)"
        ).fetchone()
        assert row == ("canceled", True)


def test_a_cancelled_job_that_catches_it_commits_nothing(pooled: Proxy, server: Server) -> None:
    job = (
        "INSERT INTO caught VALUES (1); DO $$ BEGIN PERFORM pg_sleep(60);"
        " EXCEPTION WHEN query_canceled THEN NULL; END $$"
    )
    with server.connect() as observer, _connect(pooled) as conn:
        observer.execute("CREATE TABLE caught (n int); GRANT ALL ON caught TO PUBLIC")
        try:
            run = "SELECT pid, state, sqlstate FROM pg_background_run_v2(%s, 0, 300)"
            row = conn.execute(run, [job]).fetchone()
            assert row is not None
            assert row[1:] == ("canceled", "57014")
            locks = "SELECT FROM pg_locks WHERE relation = 'caught'::regclass AND pid = %s"
            wait_until(lambda: not observer.execute(locks, row[:1]).fetchall())
            assert observer.execute("SELECT n FROM caught").fetchall() == []
        finally:
            observer.execute("DROP TABLE caught")


@pytest.mark.parametrize("mode", ["statement"], indirect=False)
def test_statement_pooling_is_refused(pooled: Proxy) -> None:
    with _connect(pooled) as conn:
        error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
        assert "statement pooling" in (error.diag.message_detail or "")


def test_calls_from_inside_the_database_are_refused_with_the_reason(
    pooled: Proxy, server: Server, start_proxy: StartProxy, db: str
) -> None:
    """At once; in a session and in a job. Other errors of the function keep their words."""
    refused = (
        "55000",
        "calls from inside the database are not possible behind a connection pooler",
    )
    call = "DO $$ BEGIN PERFORM pg_background_launch('SELECT 1'); END $$"
    extension = with_extension(server, start_proxy(), db)
    next(extension)
    try:
        with pooled.connect(dbname=db) as conn, server.connect(dbname=db) as direct:
            conn.prepare_threshold = None
            for error in (failure(conn, call), job_failure(conn, call)):
                assert (error.sqlstate, error.diag.message_primary) == refused
                assert "connection pooler" in str(error.diag.message_detail)
                assert "itself" in str(error.diag.message_hint)
            [outcome] = conn.execute(
                "SELECT state, sqlstate, error_message FROM pg_background_run_v2(%s)", [call]
            ).fetchall()
            assert outcome == ("error", *refused)
            # The call that the hint speaks of.
            assert run(conn, "SELECT 1") == [(1,)]
            error = failure(direct, call)
            assert error.diag.message_primary == (
                "this session does not go through pg-background-proxy"
            )
    finally:
        next(extension, None)
