"""Spares: side backends that are logged in before they are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from proxy.backends.spares import _LASTS
from tests.conftest import StartProxy
from tests.support.background import (
    failure,
    launch,
    message,
    result,
    run,
    spares_of,
    value,
    wait_until,
)
from tests.support.executors import executors
from tests.support.servers import Connection, Server

# Without reuse: to the server, what is used again is a spare, too.
LASTING = ("--spare-lifetime", "60s", "--reuse-lifetime", "0")
JOBS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background'"


@pytest.fixture
def there_would_be_some(
    start_proxy: StartProxy, observer: Connection, scratch: str
) -> Callable[[], None]:
    """Waits for the spares of another proxy, which begins now: one that began before would have
    them, too.
    """

    def wait() -> None:
        with start_proxy(*LASTING).connect(dbname=scratch) as conn:
            run(conn, "SELECT 1")
            wait_until(lambda: len(spares_of(observer, conn)) == 2)

    return wait


def test_none_is_opened_for_who_never_launches(
    start_proxy: StartProxy, observer: Connection, db: str, there_would_be_some: Callable[[], None]
) -> None:
    with start_proxy(*LASTING).connect(dbname=db) as conn:
        conn.execute("SELECT 1")
        there_would_be_some()
        assert not spares_of(observer, conn)


def test_the_next_launch_takes_one_and_it_is_replaced(
    start_proxy: StartProxy, observer: Connection, db: str
) -> None:
    with start_proxy(*LASTING, "--spares", "3").connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares_of(observer, conn)) == 3)
        before = spares_of(observer, conn)
        pid = launch(conn, "SELECT pg_sleep(60)")
        assert pid in before
        wait_until(lambda: len(spares_of(observer, conn)) == 3)
        assert pid not in spares_of(observer, conn)
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])


def test_a_job_in_a_spare_is_the_sessions_own(
    start_proxy: StartProxy, observer: Connection, db: str
) -> None:
    with start_proxy(*LASTING).connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares_of(observer, conn)) == 2)
        conn.execute("SET search_path = pg_catalog; SET my.own = 'x'")
        job = "SELECT concat_ws(' ', current_user, current_setting('search_path'), "
        job += "current_setting('my.own'), current_setting('application_name'), pg_backend_pid())"
        before = spares_of(observer, conn)
        *words, pid = str(value(conn, job)).split()
        assert words == ["postgres", "pg_catalog", "x", "pg_background"]
        assert int(pid) in before


@pytest.fixture
def own_role(server: Server, scratch: str) -> Iterator[str]:
    """A role that alice may become, and that may launch and write to `kept`."""
    with server.connect(dbname=scratch) as admin:
        admin.execute("CREATE ROLE becomes; GRANT becomes TO alice")
        admin.execute("CREATE TABLE kept (n int); GRANT ALL ON kept TO PUBLIC")
        with executors(admin, "becomes", "alice"):
            yield "becomes"
        admin.execute("DROP TABLE kept; DROP ROLE becomes")


@pytest.mark.parametrize("before", ["", "SELECT set_config('DateStyle', 'German', false); "])
def test_no_job_runs_in_one_that_could_not_take_over(
    server: Server,
    start_proxy: StartProxy,
    scratch: str,
    own_role: str,
    before: str,
) -> None:
    """Whether its text goes along with the setup, or needs to know what that has set."""
    proxy = start_proxy(*LASTING)
    job = before + "INSERT INTO kept VALUES (1) RETURNING n"
    with (
        server.connect(dbname=scratch) as admin,
        proxy.connect(user="alice", dbname=scratch) as conn,
    ):
        conn.execute(f"SET ROLE {own_role}")
        assert run(conn, job) == [(1,)]
        wait_until(lambda: len(spares_of(admin, conn)) == 2)
        admin.execute(f"REVOKE {own_role} FROM alice")
        try:
            refused = failure(conn, "SELECT pg_background_launch(%s)", [job])
            assert message(refused) == ("42501", f'permission denied to set role "{own_role}"')
        finally:
            admin.execute(f"GRANT {own_role} TO alice")
        assert run(conn, job) == [(1,)]
        wait_until(lambda: not admin.execute(JOBS).fetchall())
        assert admin.execute("SELECT count(*) FROM kept").fetchone() == (2,)
        [row] = conn.execute("SELECT workers_launched, workers_failed FROM pg_background_stats()")
        assert row == (2, 0)
    proxy.stop()


@pytest.mark.parametrize("job", ["VACUUM", "CREATE DATABASE made_in_a_spare", "SELECT 1; SELECT 2"])
def test_what_refuses_a_transaction_block_runs_in_one(
    start_proxy: StartProxy, observer: Connection, db: str, job: str
) -> None:
    with start_proxy(*LASTING).connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares_of(observer, conn)) == 2)
        before = spares_of(observer, conn)
        pid = launch(conn, job)
        assert pid in before
        expected = [(2,)] if "SELECT" in job else [(job.partition(" made")[0],)]
        assert result(conn, pid, None if "SELECT" in job else "result text") == expected
        conn.execute("DROP DATABASE IF EXISTS made_in_a_spare")


def test_one_that_nobody_needs_is_closed(
    start_proxy: StartProxy, observer: Connection, db: str
) -> None:
    with start_proxy("--spare-lifetime", "1s").connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: spares_of(observer, conn))
        wait_until(lambda: not spares_of(observer, conn))


def test_none_at_all_if_told_so(
    start_proxy: StartProxy, observer: Connection, db: str, there_would_be_some: Callable[[], None]
) -> None:
    with start_proxy("--spares", "0", *LASTING).connect(dbname=db) as conn:
        for _ in range(3):
            run(conn, "SELECT 1")
        there_would_be_some()
        assert not spares_of(observer, conn)


def test_one_that_was_killed_is_no_loss(
    start_proxy: StartProxy, observer: Connection, db: str
) -> None:
    with start_proxy(*LASTING).connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares_of(observer, conn)) == 2)
        for pid in spares_of(observer, conn):
            observer.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert run(conn, "SELECT 2") == [(2,)]


def test_none_for_a_role_with_a_connection_limit(server: Server, start_proxy: StartProxy) -> None:
    with server.connect() as admin:
        admin.execute("CREATE ROLE limited LOGIN SUPERUSER CONNECTION LIMIT 20")
        try:
            with start_proxy(*LASTING).connect(user="limited") as conn:
                run(conn, "SELECT 1")
                run(conn, "SELECT 1")
                wait_until(lambda: len(server.clients()) == 2)  # the session, and this one
                assert not spares_of(admin, conn)
        finally:
            admin.execute("DROP ROLE limited")


def test_each_role_and_database_has_its_own(
    server: Server, start_proxy: StartProxy, scratch: str, db: str
) -> None:
    proxy = start_proxy(*LASTING, "--spares", "1")
    with server.connect() as admin:
        admin.execute("CREATE ROLE launcher LOGIN SUPERUSER")
    try:
        with (
            server.connect() as admin,
            proxy.connect(dbname=scratch) as one,
            proxy.connect(user="launcher", dbname=db) as other,
        ):
            run(one, "SELECT 1")
            wait_until(lambda: len(spares_of(admin, one)) == 1)
            before = spares_of(admin, one)
            job = "SELECT concat_ws(' ', session_user, current_database())"
            assert value(other, job) == f"launcher {db}"
            wait_until(lambda: len(spares_of(admin, other)) == 1)
            assert spares_of(admin, one) == before
        proxy.stop()
    finally:
        assert server.wait_for_no_clients() == []
        with server.connect() as admin:
            admin.execute("DROP ROLE launcher")


def test_the_last_free_connection_slots_are_left_alone(
    server: Server, start_proxy: StartProxy, observer: Connection, db: str
) -> None:
    conn: Connection = start_proxy(*LASTING, "--spares", "1").connect(dbname=db)
    others: list[Connection] = []
    with conn:
        slots = int(value(conn, "SHOW max_connections"))
        wait_until(lambda: spares_of(observer, conn))
        try:
            while len(others) < slots - slots // 10:
                others.append(server.connect())
            time.sleep(_LASTS)  # for so long the proxy believes that there is room
            run(conn, "SELECT 1")
            # One is opened to see whether there is room, and closed at once.
            wait_until(lambda: not spares_of(observer, conn))
        except psycopg.OperationalError as error:
            pytest.fail(f"no slot for a client: {message(error)}")
        finally:
            for other in others:
                other.close()
