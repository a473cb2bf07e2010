"""Launches that wait for room: for one of the session's jobs to end, or for the server.

Each way to call waits alike: in the select list, in FROM, in PL/pgSQL.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Client, Gate
from tests.support.background import failure, message, result, wait_until, wait_until_ended
from tests.support.in_database import one, with_extension
from tests.support.servers import Connection, Proxy, Server
from tests.support.statement import WAITING, Statement

pytestmark = pytest.mark.every_server

# A launch in each way; each returns the pid.
WAYS: Final = {
    "select": "SELECT pg_background_launch({job})",
    "from": "SELECT pid FROM pg_background_launch_v2({job})",
    "submit": "SELECT (pg_background_submit({job})).pid",
    "inside": "SELECT inside('pg_background_launch(' || quote_literal({job}) || ')')::int",
}

TOO_MANY: Final = ("53400", "too many background workers")


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension."""
    yield from with_extension(server, proxy, scratch)


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    """A launch in one of the ways."""
    return WAYS[request.param]


def launch_sql(way: str, job: str = "SELECT 1") -> str:
    """A statement that launches."""
    return way.format(job=f"$job${job}$job$")


def fill(conn: Connection, gate: Gate, most: int = 2) -> list[int]:
    """Jobs that wait at the gate, as many as the session may have."""
    conn.execute(f"SET pg_background.max_workers = {most}".encode())
    pids = [one(conn, launch_sql(WAYS["select"], gate.sql)) for _ in range(most)]
    conn.execute("SET pg_background.launch_timeout = '1min'")
    return pids


# --- for one of the session's jobs to end --------------------------------------------------------


def test_a_launch_waits_until_a_job_has_ended(
    conn: Connection, observer: Connection, gate: Gate, way: str
) -> None:
    fill(conn, gate)
    waiting = Statement(conn, launch_sql(way, "SELECT 7"))
    waiting.wait_until_it_waits(observer)
    gate.open()
    pid = waiting.value
    if way != WAYS["submit"]:
        assert result(conn, pid, "n int") == [(7,)]


def test_each_client_waits(client: Client, gate: Gate, observer: Connection) -> None:
    client.rows("SET pg_background.max_workers = 1")
    client.rows("SET pg_background.launch_timeout = '1min'")
    first = client.launch(gate.sql)
    gate.wait_for(first)
    [[primary]] = client.rows("SELECT pg_backend_pid()")

    def open_when_it_waits() -> None:
        wait_until(lambda: observer.execute(WAITING, [int(primary)]).fetchone())
        gate.open()

    opening = threading.Thread(target=open_when_it_waits, daemon=True)
    opening.start()
    assert client.launch("SELECT 1", "second").pid > 0
    opening.join(20)
    client.rows("SET pg_background.launch_timeout = '100ms'")
    other = client.launch("SELECT pg_sleep(60)")
    assert client.error("SELECT pg_background_launch('SELECT 1')")[:2] == TOO_MANY
    client.call("cancel", other.sql)


def test_without_a_timeout_it_fails_at_once(conn: Connection, gate: Gate, way: str) -> None:
    fill(conn, gate)
    conn.execute("RESET pg_background.launch_timeout")
    error = failure(conn, launch_sql(way).encode())
    assert message(error) == TOO_MANY
    assert "pg_background.launch_timeout" in (error.diag.message_hint or "")
    gate.open()


def test_when_the_time_is_over_it_fails(conn: Connection, gate: Gate, way: str) -> None:
    fill(conn, gate)
    conn.execute("SET pg_background.launch_timeout = '200ms'")
    error = failure(conn, launch_sql(way).encode())
    assert message(error) == TOO_MANY
    assert error.diag.message_detail == (
        "This session runs 2 background workers, and pg_background.max_workers is 2."
    )
    gate.open()


def test_statement_timeout_ends_the_wait(conn: Connection, gate: Gate, way: str) -> None:
    fill(conn, gate)
    conn.execute("SET statement_timeout = '200ms'")
    error = failure(conn, launch_sql(way).encode())
    assert message(error) == ("57014", "canceling statement due to statement timeout")
    gate.open()


@pytest.mark.parametrize("by", ["request", "function"])
def test_a_cancel_ends_the_wait(
    conn: Connection, observer: Connection, gate: Gate, way: str, by: str
) -> None:
    fill(conn, gate)
    waiting = Statement(conn, launch_sql(way))
    waiting.wait_until_it_waits(observer)
    if by == "request":
        conn.cancel_safe(timeout=10)
    else:

        def canceled() -> bool:
            # One that comes between two sleeps is lost (docs/limits.md).
            observer.execute("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid])
            return waiting.is_over

        wait_until(canceled)
    assert message(waiting.error) == ("57014", "canceling statement due to user request")
    assert one(conn, "SELECT count(*) FROM pg_background_list") == 2
    gate.open()


def test_who_has_left_launches_nothing(
    proxy: Proxy, scratch: str, observer: Connection, gate: Gate, way: str
) -> None:
    with proxy.connect(dbname=scratch) as conn:
        pids = fill(conn, gate)
        waiting = Statement(conn, launch_sql(way, "CREATE TABLE launched ()"))
        waiting.wait_until_it_waits(observer)
        primary = conn.info.backend_pid
        conn.pgconn.finish()
    wait_until_ended(observer, primary)
    gate.open()
    for pid in pids:
        wait_until_ended(observer, pid)
    with proxy.connect(dbname=scratch) as other:
        jobs = other.execute("SELECT sql_preview FROM pg_background_list_all()").fetchall()
        assert not [sql for (sql,) in jobs if "TABLE launched" in sql]
    assert one(observer, "SELECT to_regclass('launched')") is None


def test_detaching_a_job_makes_room(conn: Connection, gate: Gate) -> None:
    [pid] = fill(conn, gate, 1)
    conn.execute(f"SELECT pg_background_detach({pid})".encode())
    assert one(conn, "SELECT pg_background_launch('SELECT 1')") > 0
    gate.open()


def test_other_sessions_do_not_wait_for_it(
    proxy: Proxy, scratch: str, conn: Connection, observer: Connection, gate: Gate, way: str
) -> None:
    fill(conn, gate)
    waiting = Statement(conn, launch_sql(way))
    waiting.wait_until_it_waits(observer)
    with proxy.connect(dbname=scratch) as other:
        for sql in WAYS.values():
            assert one(other, launch_sql(sql)) > 0
    assert not waiting.is_over
    gate.open()
    assert waiting.value > 0


# --- for the server ------------------------------------------------------------------------------


@pytest.fixture
def limited(server: Server, start_proxy: StartProxy, scratch: str) -> Iterator[tuple[str, Proxy]]:
    """A role that may have a few connections, and a proxy without spares."""
    role = "limited"
    with server.connect(dbname=scratch) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 4".encode())
        admin.execute(f"GRANT pgbackground_role TO {role}".encode())
    yield role, start_proxy("--spares", "0")
    with server.connect(dbname=scratch) as admin:
        query = "SELECT 1 FROM pg_stat_activity WHERE usename = %s"
        wait_until(lambda: not admin.execute(query, [role]).fetchone())
        admin.execute(f"DROP OWNED BY {role}".encode())
        admin.execute(f"DROP ROLE {role}".encode())


def test_launches_wait_for_the_server_in_order(
    limited: tuple[str, Proxy], scratch: str, observer: Connection, gate: Gate
) -> None:
    role, proxy = limited
    sessions = [proxy.connect(dbname=scratch, user=role) for _ in range(3)]
    first, second, third = sessions
    busy = one(first, launch_sql(WAYS["select"], gate.sql))
    error = failure(second, launch_sql(WAYS["select"]).encode())
    assert message(error) == ("53300", "could not start a background worker")
    waiting: list[Statement] = []
    for number, session in enumerate((second, third)):
        session.execute("SET pg_background.launch_timeout = '1min'")
        job = f"SELECT pg_advisory_xact_lock_shared({9_000_000 + number})"
        observer.execute("SELECT pg_advisory_lock(%s)", [9_000_000 + number])
        waiting.append(Statement(session, launch_sql(WAYS["select"], job)))
        waiting[-1].wait_until_it_waits(observer)
    # Who does not wait does not overtake those who do.
    error = failure(first, launch_sql(WAYS["select"]).encode())
    assert error.sqlstate == "53300"
    gate.open()
    assert waiting[0].value > 0
    assert not waiting[1].is_over
    wait_until_ended(observer, busy)
    observer.execute("SELECT pg_advisory_unlock(%s)", [9_000_000])
    assert waiting[1].value > 0
    observer.execute("SELECT pg_advisory_unlock(%s)", [9_000_001])
    for session in sessions:
        session.close()


def test_when_the_time_is_over_the_servers_error_comes(
    limited: tuple[str, Proxy], scratch: str, gate: Gate
) -> None:
    role, proxy = limited
    with proxy.connect(dbname=scratch, user=role) as conn:
        for _ in range(3):
            one(conn, launch_sql(WAYS["select"], gate.sql))
        conn.execute("SET pg_background.launch_timeout = '300ms'")
        error = failure(conn, launch_sql(WAYS["select"]).encode())
        assert message(error) == ("53300", "could not start a background worker")
        assert "limited" in (error.diag.message_detail or "")
        # Others need not wait with it.
        with proxy.connect(dbname=scratch) as other:
            assert one(other, launch_sql(WAYS["select"])) > 0
        gate.open()


def test_a_wait_ends_as_soon_as_a_slot_of_the_server_is_free(
    limited: tuple[str, Proxy], scratch: str, server: Server, observer: Connection
) -> None:
    """Also one that no job of the proxy's had."""
    role, proxy = limited
    foreign = [server.connect(dbname=scratch, user=role) for _ in range(3)]
    with proxy.connect(dbname=scratch, user=role) as conn:
        conn.execute("SET pg_background.launch_timeout = '1min'")
        waiting = Statement(conn, launch_sql(WAYS["select"], "SELECT 3"))
        waiting.wait_until_it_waits(observer)
        foreign.pop().close()
        assert result(conn, waiting.value, "n int") == [(3,)]
    for session in foreign:
        session.close()
