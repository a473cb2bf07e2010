"""What tests of calls from inside the database share: the extension, and ways to have the server
make a call, so that the proxy first sees it when the function asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tests.support.background import wait_until
from tests.support.executors import executor_as_before
from tests.support.servers import Connection, Proxy, Server

INSIDE: Final = """
CREATE FUNCTION inside(expression text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE value text; BEGIN EXECUTE 'SELECT ' || expression INTO value; RETURN value; END $$
"""


def with_extension(server: Server, proxy: Proxy, dbname: str) -> Iterator[None]:
    """The body of a fixture: a database has the extension, and the function `inside`."""
    with executor_as_before(server):
        with proxy.connect(dbname=dbname) as conn:
            conn.execute("CREATE EXTENSION pg_background")
            conn.execute(INSIDE)
        yield
        with proxy.connect(dbname=dbname) as conn:
            conn.execute("DROP EXTENSION pg_background CASCADE")


def one(conn: Connection, query: str, *args: Any) -> Any:
    """The one value that a query returns."""
    row = conn.execute(query.encode(), *args).fetchone()
    assert row is not None
    return row[0]


def inside(conn: Connection, expression: str) -> Any:
    """The text of an expression, evaluated in PL/pgSQL."""
    return one(conn, "SELECT inside(%s)", [expression])


def launch(conn: Connection, job: str) -> int:
    """The pid of a job that is launched in PL/pgSQL."""
    return int(inside(conn, f"pg_background_launch($job${job}$job$)"))


def handle(conn: Connection, job: str) -> tuple[int, int]:
    """Pid and cookie of such a job."""
    answer = inside(conn, f"pg_background_launch_v2($job${job}$job$)")
    pid, cookie = answer.strip("()").split(",")
    return int(pid), int(cookie)


def rows(conn: Connection, job: str, columns: str) -> list[tuple[Any, ...]]:
    """A job's rows, fetched in a join."""
    return conn.execute(
        f"SELECT r.* FROM (SELECT pg_background_launch($job${job}$job$) AS pid OFFSET 0) l,"
        f" LATERAL pg_background_result(l.pid) AS r({columns})".encode()
    ).fetchall()


def wait_until_nothing_is_left(observer: Connection) -> None:
    """Waits until the observer's database has no lock, no large object, and no backend except the
    observer, unused channels and spares."""
    here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
    locks = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = {here}"
    wait_until(lambda: one(observer, locks) == 0)
    assert one(observer, "SELECT count(*) FROM pg_largeobject_metadata") == 0
    others = (
        f"SELECT application_name FROM pg_stat_activity WHERE datid = {here}"
        " AND client_port IS NOT NULL AND pid <> pg_backend_pid() AND application_name NOT IN"
        " ('pg_background channel', 'pg_background spare')"
    )
    wait_until(lambda: not observer.execute(others).fetchall())
