"""An application that was written for the C extension (migration.sql) loads through the proxy as it
is, and does what it did; and a dump of it restores elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.background import failure, message
from tests.support.clients import Endpoint, succeed, tool
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server

SCRIPT = Path(__file__).with_name("migration.sql")
DATABASE = "migrated"


def load(port: int, file: Path, dbname: str = DATABASE) -> None:
    done = psql(port, "-q", "-v", "ON_ERROR_STOP=1", "-f", str(file), dbname=dbname)
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr


@pytest.fixture(scope="module")
def migrated(server: Server, proxy: Proxy) -> Iterator[str]:
    """A database with the application."""
    with database(server, DATABASE) as name:
        load(proxy.port, SCRIPT)
        yield name
    with server.connect() as conn:
        conn.execute("DROP ROLE app_user")


@pytest.fixture
def app(proxy: Proxy, migrated: str) -> Iterator[Connection]:
    """A session of the application."""
    with proxy.connect(dbname=migrated) as conn:
        conn.execute("TRUNCATE app.audit_log")
        yield conn


def column(conn: Connection, query: str, *args: Any) -> list[Any]:
    return [row[0] for row in conn.execute(query.encode(), *args)]


def events(conn: Connection) -> list[str]:
    return column(conn, "SELECT event FROM app.audit_log ORDER BY at")


def use(conn: Connection) -> None:
    """What all of it does."""
    assert column(conn, "SELECT app.autonomous('VACUUM app.accounts')") == ["VACUUM"]
    assert column(conn, "SELECT app.fan_out(4)") == [80200]
    assert column(conn, "SELECT n FROM app.now_there") == [5]
    assert column(conn, "SELECT launched FROM app.counts") == [True]


def test_audit_rows_outlive_a_rollback(app: Connection) -> None:
    with app.transaction(force_rollback=True):
        app.execute("SELECT app.log_event('first')")
        app.execute("SELECT app.log_audit('it''s second')")
        app.execute("UPDATE app.accounts SET balance = balance + 1 WHERE id = 1")
    assert events(app) == ["first", "it's second", "UPDATE 1: 100 -> 101"]
    assert column(app, "SELECT balance::int FROM app.accounts WHERE id = 1") == [100]


def test_trigger_and_exception_handler(app: Connection) -> None:
    assert column(app, "SELECT app.transfer(2, 3, 1000)") == [False]
    assert events(app) == ["refused: 1000 from 2"] or len(events(app)) == 2
    assert column(app, "SELECT app.transfer(2, 3, 10)") == [True]
    assert events(app)[-2:] == ["UPDATE 2: 100 -> 90", "UPDATE 3: 100 -> 110"]
    assert column(app, "SELECT app.transfer(3, 2, 10)") == [True]


def test_errors_of_jobs_are_caught(app: Connection) -> None:
    assert column(app, "SELECT app.try('SELECT ''x''')") == ["x"]
    assert column(app, "SELECT app.try('SELECT 1/0')") == ["22012 division by zero"]
    error = failure(app, "SELECT app.try('SELECT nope')")
    assert message(error) == ("42703", 'column "nope" does not exist')
    app.execute(
        "CREATE OR REPLACE FUNCTION app.unknown() RETURNS text LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM * FROM pg_background_result(999999) AS (n int);"
        " EXCEPTION WHEN undefined_object THEN RETURN SQLERRM; END$$"
    )
    [said] = column(app, "SELECT app.unknown()")
    assert said == "PID 999999 is not attached to this session"


def test_work_in_parallel(app: Connection) -> None:
    use(app)
    app.execute("TRUNCATE app.parts")
    app.execute("CALL app.fan_out_and_commit(4)")
    assert column(app, "SELECT total FROM app.parts ORDER BY n") == [1, 3, 6, 10]
    rows = app.execute("SELECT * FROM app.maintain('a%')").fetchall()
    assert rows == [("accounts", True), ("audit_log", True)]


def test_handles_are_values(app: Connection) -> None:
    app.execute(
        "INSERT INTO app.handles SELECT 'one', pg_background_launch_v2('SELECT 1', 0, 'app-one')"
    )
    app.execute(
        "INSERT INTO app.handles VALUES ('two', pg_background_submit_v2('CREATE TABLE t()'))"
    )
    assert column(app, "SELECT label FROM app.jobs") == ["app-one"]
    assert column(app, "SELECT pid FROM app.busy") == column(
        app, "SELECT (h).pid FROM app.handles WHERE name = 'one'"
    )
    query = "SELECT * FROM app.finished((SELECT array_agg(h ORDER BY name) FROM app.handles))"
    assert column(app, query) == ["stopped SELECT", "stopped CREATE TABLE"]
    app.execute("DROP TABLE t; TRUNCATE app.handles")


def test_role_of_the_application(proxy: Proxy, app: Connection) -> None:
    app.execute("ALTER ROLE app_user LOGIN")
    with proxy.connect(dbname=app.info.dbname, user="app_user") as conn:
        conn.execute("SELECT app.log_event('by whom')")
        assert column(conn, "SELECT who FROM app.audit_log") == ["app_user"]
    app.execute("SET ROLE app_user")
    app.execute("SELECT app.log_event('by whom')")
    assert column(app, "SELECT who FROM app.audit_log") == ["app_user", "app_user"]
    app.execute("SET ROLE alice")
    error = failure(app, "SELECT pg_background_launch('')")
    assert message(error) == ("42501", "permission denied for function pg_background_launch")
    query = "DO $$ BEGIN PERFORM pg_background_launch(''); END $$"
    assert message(failure(app, query)) == message(error)


# --- dumps -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(server: Server) -> Iterator[Server]:
    """Another server, which knows nothing of all this."""
    other = Server(server.bin)
    try:
        yield other
    finally:
        other.close()


OBJECTS = (
    "SELECT p.oid::regprocedure::text, p.prosrc, p.proacl::text, p.proisstrict,"
    " pg_get_function_arguments(p.oid), obj_description(p.oid) FROM pg_proc p"
    " WHERE p.pronamespace = 'public'::regnamespace ORDER BY 1"
)


@pytest.mark.parametrize(
    ("format", "through"),
    [
        ("plain", "direct"),
        pytest.param("plain", "proxy", marks=pytest.mark.slow),
        pytest.param("custom", "direct", marks=pytest.mark.slow),
        ("custom", "proxy"),
        pytest.param("schema-only", "direct", marks=pytest.mark.slow),
        ("schema-only", "proxy"),
    ],
)
def test_dump_restores_elsewhere(
    proxy: Proxy,
    server: Server,
    elsewhere: Server,
    migrated: str,
    start_proxy: StartProxy,
    tmp_path: Path,
    through: str,
    format: str,
) -> None:
    """Nothing but what pg_dump never has is made there first: the database, and the
    application's own role."""
    source: Endpoint = server
    target: Endpoint = elsewhere
    other = start_proxy(upstream=upstream_of(elsewhere))
    if through == "proxy":
        source, target = proxy, other
    dump = tmp_path / "dump"
    options = {"plain": [], "custom": ["-Fc"], "schema-only": ["--schema-only"]}[format]
    done = succeed(source, tool(server, "pg_dump"), *options, "-f", dump, dbname=migrated)
    assert not done.err
    with elsewhere.connect() as conn:
        conn.execute("DROP ROLE IF EXISTS app_user, pgbackground_role")
        conn.execute("CREATE ROLE app_user")
    with database(elsewhere, "restored") as name:
        if format == "custom":
            restore = tool(server, "pg_restore")
            succeed(target, restore, "--exit-on-error", "-d", name, dump, dbname=name)
        else:
            load(target.port, dump, name)
        with server.connect(dbname=migrated) as before, elsewhere.connect(dbname=name) as after:
            assert after.execute(OBJECTS).fetchall() == before.execute(OBJECTS).fetchall()
            error = failure(after, "SELECT pg_background_launch('SELECT 1')")
            assert "proxy" in (error.diag.message_hint or "")
        with other.connect(dbname=name) as conn:
            [version] = column(
                conn, "SELECT extversion FROM pg_extension WHERE extname = 'pg_background'"
            )
            assert version == "1.10"
            if format == "schema-only":
                conn.execute("INSERT INTO app.accounts SELECT i, 100 FROM generate_series(1, 5) i")
            use(conn)
            conn.execute("DROP EXTENSION pg_background CASCADE")


def test_dump_without_privileges(
    proxy: Proxy, server: Server, migrated: str, tmp_path: Path
) -> None:
    """It grants nothing, so EXECUTE is PUBLIC's again as far as the server is concerned."""
    succeed(server, tool(server, "pg_dump"), "-x", "-f", tmp_path / "dump", dbname=migrated)
    with database(server, "restored_x") as name:
        load(server.port, tmp_path / "dump", name)
        with proxy.connect(dbname=name, user="alice") as carol:
            for call in (
                "SELECT pg_background_launch('SELECT 1')",
                "DO $$ BEGIN PERFORM pg_background_launch('SELECT 1'); END $$",
            ):
                assert message(failure(carol, call)) == (
                    "42501",
                    "permission denied for function pg_background_launch",
                )
        with proxy.connect(dbname=name) as conn:
            assert column(conn, "SELECT pg_background_launch('SELECT 1') IS NOT NULL") == [True]


def test_dump_is_the_same_through_the_proxy(proxy: Proxy, server: Server, migrated: str) -> None:
    def dump(endpoint: Endpoint) -> list[str]:
        done = succeed(endpoint, tool(server, "pg_dump"), dbname=migrated)
        # The key of \restrict is made up for each dump.
        return [line for line in done.out.splitlines() if "restrict " not in line]

    assert dump(server) == dump(proxy)
