"""Spares and idle channels in a database do not prevent dropping it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import shared_proxy, upstream_of
from tests.support.background import failure, job_failure, run, wait_until
from tests.support.clients import succeed, tool
from tests.support.executors import executor_as_before
from tests.support.in_database import INSIDE, inside
from tests.support.servers import Connection, Proxy, Server

OPTIONS = ("--spare-lifetime", "60s", "--spares", "2")
_numbers = itertools.count(1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((workers, name), marks=() if usual else pytest.mark.slow)
        for workers, name, usual in (
            ("1", "plain", True),
            ("1", 'Odd "name"', False),
            ("1", "with-dash", False),
            ("2", "plain", False),
            ("2", 'Odd "name"', True),
            ("2", "with-dash", False),
        )
    ],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """How many workers, and a name."""
    workers, name = request.param
    return workers, name


@pytest.fixture(scope="module")
def proxy(case: tuple[str, str], server: Server) -> Iterator[Proxy]:
    """As one process, and as two: what waits may be another's than the command's."""
    with shared_proxy(upstream_of(server), *OPTIONS, "--workers", case[0]) as proxy:
        yield proxy


@pytest.fixture
def name(case: tuple[str, str], server: Server, proxy: Proxy) -> Iterator[str]:
    """A database in which spares wait, and a channel."""
    name = f"{case[1]} {next(_numbers)}".replace("plain ", "plain_")
    with executor_as_before(server), server.connect() as admin:
        admin.execute(f"CREATE DATABASE {_quoted(name)} TEMPLATE template0".encode())
        with proxy.connect(dbname=name) as conn:
            run(conn, "SELECT 1")
            conn.execute("CREATE EXTENSION pg_background")
            conn.execute(INSIDE)
            inside(conn, "pg_background_launch('SELECT 1')")
        wait_until(lambda: {"pg_background spare", "pg_background channel"} <= _inside(admin, name))
        yield name
        for left in admin.execute("SELECT datname FROM pg_database WHERE datname LIKE '% moved'"):
            admin.execute(f"DROP DATABASE {_quoted(left[0])} (FORCE)".encode())
        admin.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} (FORCE)".encode())


def _quoted(name: str) -> str:
    return psycopg.sql.Identifier(name).as_string(None)


def _inside(admin: Connection, name: str) -> set[str]:
    rows = admin.execute("SELECT application_name FROM pg_stat_activity WHERE datname = %s", [name])
    return {row[0] for row in rows}


COMMANDS = (
    "DROP DATABASE {name}",
    " drop /* and be */ database if exists {name}",
    "-- now\n/* */DROP DATABASE {name}",
    "ALTER DATABASE {name} RENAME TO {moved}",
    "CREATE DATABASE {moved} TEMPLATE {name}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_about_it_works_at_once(proxy: Proxy, name: str, command: str) -> None:
    with proxy.connect() as conn:
        moved = _quoted(f"{name} moved")
        conn.execute(command.format(name=_quoted(name), moved=moved).encode())


def test_a_prepared_one_too(proxy: Proxy, name: str) -> None:
    with proxy.connect() as conn:
        conn.execute(f"DROP DATABASE {_quoted(name)}".encode(), prepare=True)


def test_a_job_too(proxy: Proxy, name: str) -> None:
    with proxy.connect() as conn:
        run(conn, f"DROP DATABASE {_quoted(name)}")


def test_dropdb_too(server: Server, proxy: Proxy, name: str) -> None:
    succeed(proxy, tool(server, "dropdb"), name, dbname="postgres")


def test_those_of_other_databases_stay(server: Server, proxy: Proxy, db: str) -> None:
    with server.connect() as admin, proxy.connect(dbname=db) as conn:
        run(conn, "SELECT 1")
        wait_until(lambda: "pg_background spare" in _inside(admin, db))
        with proxy.connect() as other:
            assert failure(other, "DROP DATABASE not_there").sqlstate == "3D000"
            assert job_failure(other, "DROP DATABASE not_there").sqlstate == "3D000"
        assert "pg_background spare" in _inside(admin, db)
