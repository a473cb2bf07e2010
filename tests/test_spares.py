"""Spares: side backends that are logged in before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.conftest import StartProxy
from tests.support.background import failure, launch, message, result, run, value, wait_until
from tests.support.executors import executors
from tests.support.servers import Connection, Server

# Without reuse: to the server, what is used again is a spare, too.
LASTING = ("--spare-lifetime", "60s", "--reuse-lifetime", "0")
JOBS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background'"
SPARE = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background spare'"


@pytest.fixture
def spares(server: Server) -> Callable[[], set[int]]:
    """The pids of the spares that there are now, but for those of other tests' proxies."""

    def all_of_them() -> set[int]:
        with server.connect() as conn:
            return {pid for (pid,) in conn.execute(SPARE)}

    others = all_of_them()
    return lambda: all_of_them() - others


def test_none_is_opened_for_who_never_launches(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy(*LASTING).connect() as conn:
        conn.execute("SELECT 1")
        assert not spares()


def test_the_next_launch_takes_one_and_it_is_replaced(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy(*LASTING, "--spares", "3").connect() as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares()) == 3)
        before = spares()
        pid = launch(conn, "SELECT pg_sleep(60)")
        assert pid in before
        wait_until(lambda: len(spares()) == 3)
        assert pid not in spares()
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])


def test_a_job_in_a_spare_is_the_sessions_own(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy(*LASTING).connect() as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares()) == 2)
        conn.execute("SET search_path = pg_catalog; SET my.own = 'x'")
        job = "SELECT concat_ws(' ', current_user, current_setting('search_path'), "
        job += "current_setting('my.own'), current_setting('application_name'), pg_backend_pid())"
        before = spares()
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
    spares: Callable[[], set[int]],
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
        wait_until(lambda: len(spares()) == 2)
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
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]], job: str
) -> None:
    with start_proxy(*LASTING).connect() as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares()) == 2)
        before = spares()
        pid = launch(conn, job)
        assert pid in before
        expected = [(2,)] if "SELECT" in job else [(job.partition(" made")[0],)]
        assert result(conn, pid, None if "SELECT" in job else "result text") == expected
        conn.execute("DROP DATABASE IF EXISTS made_in_a_spare")


def test_one_that_nobody_needs_is_closed(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy("--spare-lifetime", "1s").connect() as conn:
        run(conn, "SELECT 1")
        wait_until(spares)
        wait_until(lambda: not spares())


def test_none_at_all_if_told_so(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy("--spares", "0", *LASTING).connect() as conn:
        for _ in range(3):
            run(conn, "SELECT 1")
        assert not spares()


def test_one_that_was_killed_is_no_loss(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with start_proxy(*LASTING).connect() as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: len(spares()) == 2)
        with server.connect() as admin:
            admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({SPARE}) s")
        assert run(conn, "SELECT 2") == [(2,)]


def test_none_for_a_role_with_a_connection_limit(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    with server.connect() as admin:
        admin.execute("CREATE ROLE limited LOGIN SUPERUSER CONNECTION LIMIT 20")
    try:
        with start_proxy(*LASTING).connect(user="limited") as conn:
            run(conn, "SELECT 1")
            run(conn, "SELECT 1")
            wait_until(lambda: len(server.clients()) == 1)
            assert not spares()
    finally:
        with server.connect() as admin:
            admin.execute("DROP ROLE limited")


def test_each_role_and_database_has_its_own(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]], db: str
) -> None:
    proxy = start_proxy(*LASTING, "--spares", "1")
    with server.connect() as admin:
        admin.execute("CREATE ROLE launcher LOGIN SUPERUSER")
    try:
        with proxy.connect() as one, proxy.connect(user="launcher", dbname=db) as other:
            run(one, "SELECT 1")
            wait_until(lambda: len(spares()) == 1)
            before = spares()
            job = "SELECT concat_ws(' ', session_user, current_database())"
            assert value(other, job) == f"launcher {db}"
            wait_until(lambda: len(spares()) == 2)
            assert before < spares()
        proxy.stop()
    finally:
        assert server.wait_for_no_clients() == []
        with server.connect() as admin:
            admin.execute("DROP ROLE launcher")


def test_the_last_free_connection_slots_are_left_alone(
    server: Server, start_proxy: StartProxy, spares: Callable[[], set[int]]
) -> None:
    conn: Connection = start_proxy(*LASTING, "--spares", "1").connect()
    others: list[Connection] = []
    with conn:
        slots = int(value(conn, "SHOW max_connections"))
        wait_until(spares)
        try:
            while len(others) < slots - slots // 10:
                others.append(server.connect())
        except psycopg.OperationalError as error:
            pytest.fail(f"no slot for a client: {message(error)}")
        finally:
            run(conn, "SELECT 1")
            # One is opened to see whether there is room, and closed at once.
            wait_until(lambda: not spares())
            for other in others:
                other.close()
