"""What a database has of its own under our names is what these names mean, as without the proxy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from protocol.messages import Bind, Execute, Parse, Sync
from tests.support.background import failure, run
from tests.support.servers import Connection, Proxy, Server, database
from tests.support.wire import Wire, error_of

pytestmark = pytest.mark.every_server

OWN: Final = """
CREATE SCHEMA app; CREATE SCHEMA "App x";
CREATE FUNCTION app.pg_background_launch(t text) RETURNS text
  LANGUAGE sql AS $$ SELECT 'mine ' || t $$;
CREATE FUNCTION "App x".pg_background_launch(t text, VARIADIC more int[]) RETURNS text
  LANGUAGE sql AS $$ SELECT 'varied ' || t $$;
CREATE FUNCTION app.pg_background_result(i int) RETURNS TABLE (a int, b int)
  LANGUAGE sql AS $$ SELECT i, 2 UNION ALL SELECT 3, 4 $$;
CREATE FUNCTION app.pg_background_stats_v2() RETURNS int LANGUAGE sql AS 'SELECT 77';
CREATE FUNCTION app.pg_background_wait(pid int, cookie bigint DEFAULT 9, other int DEFAULT 0)
  RETURNS bigint LANGUAGE sql AS 'SELECT $1 + $2';
CREATE TABLE app.pg_background_list (i int); INSERT INTO app.pg_background_list VALUES (5);
CREATE VIEW "App x".pg_background_activity AS SELECT 6 AS six;
"""

MEANT: Final = (
    "SELECT app.pg_background_launch('x')",
    "SELECT app . pg_background_launch ( 'x' ) AS label",
    "SELECT APP.PG_BACKGROUND_LAUNCH(t => 'x'), 1",
    'SELECT "app"."pg_background_launch"(t := \'x\')',
    "SELECT app.pg_background_launch(app.pg_background_launch('x'))",
    "SELECT app.pg_background_launch('x') FROM generate_series(1, 3) ORDER BY 1",
    "SELECT * FROM app.pg_background_launch('x')",
    "SELECT x FROM app.pg_background_launch('x') AS x",
    "SELECT app.pg_background_launch('x') || ''",
    "WITH a AS (SELECT 1 AS i) SELECT i, app.pg_background_launch('x') FROM a",
    "SELECT \"App x\".pg_background_launch('x', 1, 2, 3)",
    "SELECT \"App x\".pg_background_launch('x', 1)",
    "SELECT * FROM app.pg_background_result(1)",
    "SELECT a, b FROM app.pg_background_result(1) AS r",
    "SELECT app.pg_background_result(1)",
    "SELECT (app.pg_background_result(1)).*",
    "SELECT * FROM (SELECT app.pg_background_result(1)) AS s(r)",
    "SELECT i, r.* FROM generate_series(1, 2) AS i, app.pg_background_result(i) AS r",
    "SELECT app.pg_background_stats_v2()",
    "SELECT app.pg_background_wait(1, 2)",
    "SELECT app.pg_background_wait(1)",
    "SELECT app.pg_background_wait(1, cookie => 3)",
    "SELECT * FROM app.pg_background_list",
    "TABLE app.pg_background_list",
    "SELECT i FROM app.pg_background_list AS l",
    'SELECT * FROM "App x".pg_background_activity',
)

UNQUALIFIED: Final = (
    "SELECT pg_background_launch('x')",
    "SELECT pg_background_launch('x') AS a, pg_background_launch('y') AS b",
    "SELECT * FROM pg_background_launch('x')",
    "SELECT pg_background_stats_v2()",
    "SELECT * FROM pg_background_result(1)",
    "SELECT pg_background_wait(1, 2)",
    "SELECT * FROM pg_background_list",
    "TABLE pg_background_list",
)


@pytest.fixture(scope="module", params=["without the extension", "with it in a schema"])
def own(request: pytest.FixtureRequest, server: Server, proxy: Proxy) -> Iterator[str]:
    """A database with objects of its own under our names."""
    with database(server, f"names_{server.version}") as name:
        with proxy.connect(dbname=name) as conn:
            conn.execute(OWN)
            if request.param.startswith("with it"):
                conn.execute("CREATE SCHEMA ext; CREATE EXTENSION pg_background SCHEMA ext")
        yield name


def answer(conn: Connection, query: str, *, prepare: bool = False) -> Any:
    """The columns' names and types, and the rows; or the error's SQLSTATE and message."""
    try:
        cursor = conn.execute(query.encode(), prepare=prepare)
    except psycopg.Error as error:
        return error.sqlstate, error.diag.message_primary
    assert cursor.description is not None
    return [(c.name, c.type_code) for c in cursor.description], cursor.fetchall()


@pytest.mark.parametrize("prepare", [False, True], ids=["query", "prepared"])
def test_a_written_schema_says_whose_it_is(
    server: Server, proxy: Proxy, own: str, prepare: bool
) -> None:
    with server.connect(dbname=own) as direct, proxy.connect(dbname=own) as conn:
        for query in MEANT:
            expected = answer(direct, query)
            assert isinstance(expected[0], list), expected
            for _ in range(2):
                assert answer(conn, query, prepare=prepare) == expected, query


@pytest.mark.parametrize("prepare", [False, True], ids=["query", "prepared"])
def test_the_search_path_says_whose_it_is(
    server: Server, proxy: Proxy, own: str, prepare: bool
) -> None:
    with server.connect(dbname=own) as direct, proxy.connect(dbname=own) as conn:
        for each in (direct, conn):
            each.execute("SET search_path = app, public")
        for query in UNQUALIFIED:
            assert answer(conn, query, prepare=prepare) == answer(direct, query), query


def test_what_is_not_found_is_ours(server: Server, proxy: Proxy, db: str) -> None:
    with proxy.connect(dbname=db) as conn:
        conn.execute(OWN)
        assert run(conn, "SELECT 7", "n int") == [(7,)]
        assert conn.execute("SELECT * FROM pg_background_list").fetchall() == []
        # Nothing in app takes two arguments, and nothing in public has the name.
        conn.execute("SET search_path = app, public")
        assert conn.execute("SELECT pg_background_launch('SELECT 1', 0)").fetchone() is not None
        conn.execute('DROP SCHEMA app, "App x" CASCADE')
        assert run(conn, "SELECT 8", "n int") == [(8,)]


def test_an_extension_in_the_path_is_ours_beside_an_overload(proxy: Proxy, db: str) -> None:
    with proxy.connect(dbname=db) as conn:
        conn.execute("CREATE EXTENSION pg_background")
        conn.execute(
            "CREATE FUNCTION pg_background_launch(i int) RETURNS int LANGUAGE sql AS 'SELECT -i'"
        )
        assert run(conn, "SELECT 7", "n int") == [(7,)]
        assert conn.execute("SELECT pg_background_launch(4)").fetchone() == (-4,)
        # One that comes first in the path hides ours.
        conn.execute(OWN)
        conn.execute("SET search_path = app, public")
        assert conn.execute("SELECT pg_background_launch('x'::text)").fetchone() == ("mine x",)


def test_temporary_objects(server: Server, proxy: Proxy, db: str) -> None:
    setup = (
        "CREATE TEMP TABLE pg_background_list (i int)",
        "INSERT INTO pg_background_list VALUES (5)",
        "CREATE FUNCTION pg_temp.pg_background_launch(t text) RETURNS text"
        " LANGUAGE sql AS $$ SELECT 'mine ' || t $$",
    )
    with server.connect(dbname=db) as direct, proxy.connect(dbname=db) as conn:
        for each, command in itertools.product((direct, conn), setup):
            each.execute(command.encode())
        for query in (
            "SELECT * FROM pg_background_list",
            "SELECT * FROM pg_temp.pg_background_list",
            "SELECT pg_temp.pg_background_launch('x')",
        ):
            assert answer(conn, query) == answer(direct, query), query
        # Functions are not looked for among the temporary objects.
        assert run(conn, "SELECT 7", "n int") == [(7,)]


def test_a_string_that_makes_and_calls_it(proxy: Proxy, db: str) -> None:
    with proxy.connect(dbname=db) as conn:
        cursor = conn.execute(f"{OWN}; SELECT app.pg_background_launch('x')".encode())
        while cursor.nextset():
            pass
        assert cursor.fetchall() == [("mine x",)]


def test_another_session_makes_it(server: Server, proxy: Proxy, db: str) -> None:
    """Nobody has told the session: its next call fails in the open, then it knows."""
    query = "SELECT app.pg_background_launch('SELECT 1')"
    with server.connect(dbname=db) as other, proxy.connect(dbname=db) as conn:
        assert run(conn, "SELECT 7", "n int") == [(7,)]
        other.execute(OWN)
        error = failure(conn, query)
        assert error.sqlstate == "0A000"
        assert "has a function pg_background_launch of its own" in str(error)
        assert conn.execute(query.encode()).fetchone() == ("mine SELECT 1",)
        assert conn.execute("SELECT * FROM app.pg_background_list").fetchall() == [(5,)]
        other.execute("DROP SCHEMA app CASCADE")
        assert run(conn, "SELECT 8", "n int") == [(8,)]


def test_it_is_made_after_the_statement_was_prepared(server: Server, proxy: Proxy, db: str) -> None:
    with (
        server.connect(dbname=db) as other,
        Wire((proxy.host, proxy.port), database=db) as wire,
    ):
        wire.send(
            Parse(b"s", b"SELECT app.pg_background_launch($1)", ()).serialize() + Sync().serialize()
        )
        wire.until_ready()
        other.execute(OWN)
        wire.send(
            Bind(b"", b"s", (), (b"SELECT 1",), ()).serialize()
            + Execute(b"", 0).serialize()
            + Sync().serialize()
        )
        assert error_of(wire.until_ready()).sqlstate == "0A000"


def test_what_another_role_lays_in_the_path_does_not_run(
    server: Server, proxy: Proxy, db: str
) -> None:
    with server.connect(dbname=db) as admin, proxy.connect(dbname=db) as conn:
        admin.execute("CREATE ROLE layer; GRANT CREATE ON SCHEMA public TO layer")
        try:
            admin.execute(
                "SET ROLE layer; CREATE FUNCTION public.pg_background_launch(t text) RETURNS text"
                " LANGUAGE sql AS $$ SELECT 'caught ' || current_user $$;"
                " CREATE TABLE public.pg_background_list (i int); RESET ROLE"
            )
            for query in ("SELECT pg_background_launch('SELECT 1')", "TABLE pg_background_list"):
                error = failure(conn, query)
                assert error.sqlstate == "0A000"
                assert "of a role that this session need not trust" in str(error)
            # Who writes it means it.
            query = "SELECT public.pg_background_launch('SELECT 1') LIKE 'caught%'"
            assert conn.execute(query.encode()).fetchone() == (True,)
            assert conn.execute("TABLE public.pg_background_list").fetchall() == []
            # With the extension there, its own is called.
            admin.execute("DROP TABLE public.pg_background_list")
            conn.execute("CREATE SCHEMA ext; CREATE EXTENSION pg_background SCHEMA ext")
            conn.execute("SET search_path = public, ext")
            assert run(conn, "SELECT 7", "n int") == [(7,)]
        finally:
            admin.execute("DROP OWNED BY layer; DROP ROLE layer")
