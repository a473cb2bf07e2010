"""pg_extension and pg_stat_activity through the proxy: they show the extension and the jobs, and
nothing else is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from proxy.extension import catalogs
from tests.conftest import StartProxy
from tests.support.api_clients import Gate
from tests.support.background import failure, launch, message, wait_until
from tests.support.servers import Connection, Proxy, psql

pytestmark = pytest.mark.every_server


@pytest.fixture
def installed(conn: Connection) -> Iterator[None]:
    """The extension is in the module's database."""
    conn.execute("CREATE EXTENSION pg_background VERSION '1.8'")
    yield
    conn.execute("DROP EXTENSION pg_background")


def rows(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    return conn.execute(query.encode()).fetchall()


# --- pg_extension ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "SELECT extname FROM pg_extension WHERE extname = 'pg_background'",
        "select e.extname from pg_catalog.pg_extension e where e.extname = 'pg_background'",
        'SELECT extname FROM "pg_catalog"."pg_extension" AS x WHERE extname LIKE \'pg\\_%\'',
        "SELECT pg_extension.extname FROM pg_namespace n, pg_extension"
        " WHERE n.oid = extnamespace AND n.nspname = 'public'",
        "SELECT e.extname FROM pg_namespace n JOIN pg_extension e ON n.oid = e.extnamespace,"
        " pg_class c WHERE n.nspname = 'public' AND c.relname = 'pg_class'",
        "WITH e AS (SELECT * FROM pg_extension) SELECT extname FROM e WHERE extversion = '1.8'",
        "(SELECT extname FROM pg_extension WHERE extversion = '1.8')",
        "SELECT n FROM (SELECT extname AS n FROM /* here */ pg_extension ORDER BY extversion DESC)"
        " s LIMIT 1",
        "SELECT name FROM (VALUES ('pg_background')) v(name) WHERE EXISTS"
        " (SELECT FROM pg_extension WHERE extname = v.name)",
    ],
)
def test_extension_is_listed(
    conn: Connection, observer: Connection, installed: None, query: str
) -> None:
    assert rows(conn, query) == [("pg_background",)]
    assert rows(observer, query) != [("pg_background",)]


def test_parameters_and_prepared_statements(conn: Connection, installed: None) -> None:
    query = "SELECT extversion FROM pg_extension WHERE extname = %s"
    for prepare in (False, True):
        for binary in (False, True):
            cursor = conn.execute(query, ["pg_background"], prepare=prepare, binary=binary)
            assert cursor.fetchall() == [("1.8",)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT tableoid::regclass::text, extname FROM pg_extension",
        "SELECT * FROM pg_extension FOR UPDATE",
        "SELECT pg_catalog.pg_extension.extname FROM pg_catalog.pg_extension",
        "SELECT 'pg_extension'::regclass::text, $$ FROM pg_extension $$",
        "SELECT 1 AS pg_extension, a.pg_extension FROM (SELECT 2 AS pg_extension) a",
        "WITH pg_extension AS (SELECT 1 AS n) SELECT * FROM pg_extension",
        "TABLE pg_extension",
        "SELECT count(*) FROM ONLY pg_extension",
        "SELECT extract(year FROM pg_extension) FROM (SELECT now() AS pg_extension) a",
        "SELECT 1 IS DISTINCT FROM pg_extension FROM (SELECT 2 AS pg_extension) a",
        "EXPLAIN (COSTS off) SELECT * FROM pg_extension",
        "WITH pg_extension(x) AS (VALUES (1)) SELECT x FROM pg_extension",
        "WITH pg_stat_activity(pid) AS (VALUES (1)) SELECT * FROM pg_stat_activity",
        "WITH pg_extension (x, y) AS MATERIALIZED (VALUES (1, 2)) SELECT * FROM pg_extension",
        "WITH RECURSIVE pg_extension(x) AS (VALUES (1) UNION SELECT x + 1 FROM pg_extension"
        " WHERE x < 3) SELECT count(*) FROM pg_extension",
        'WITH U&"pg\\005fextension" (x) AS (VALUES (1)) SELECT x FROM pg_extension',
    ],
)
def test_what_is_not_certain_is_as_direct(
    conn: Connection, observer: Connection, installed: None, query: str
) -> None:
    if "MATERIALIZED" in query and conn.info.server_version < 120000:
        pytest.skip("AS MATERIALIZED came with 12")
    assert rows(conn, query) == rows(observer, query)


def test_errors_point_into_the_clients_text(conn: Connection, observer: Connection) -> None:
    for query in (
        "SELECT 'ä', * FROM pg_catalog.pg_extension e, nowhere",
        "SELECT 1; SELECT nope FROM pg_extension; SELECT 2",
        "SELECT extname FROM pg_extension WHERE extname = 1",
        "SELECT extname FROM pg_extension GROUP BY extversion",
    ):
        found, direct = failure(conn, query.encode()), failure(observer, query.encode())
        assert message(found) == message(direct)
        assert found.diag.statement_position == direct.diag.statement_position


def test_columns_are_the_servers(conn: Connection, observer: Connection) -> None:
    for relation in ("pg_extension", "pg_stat_activity"):
        found = conn.execute(f"SELECT * FROM {relation}".encode()).description
        direct = observer.execute(f"SELECT * FROM {relation}".encode()).description
        assert found is not None
        assert direct is not None
        assert [(c.name, c.type_code) for c in found] == [(c.name, c.type_code) for c in direct]


def test_list_of_extensions_in_psql(proxy: Proxy, scratch: str, installed: None) -> None:
    for command in (r"\dx", r"\dx pg_*", r"\dx pg_background"):
        done = psql(proxy.port, "-At", "-c", command, dbname=scratch)
        cells = [line.split("|") for line in done.stdout.splitlines()]
        [line] = [line for line in cells if line[0] == "pg_background"]
        assert line[1] == "1.8"
        assert line[-2:] == ["public", "Run SQL queries in the background"]
        assert ("plpgsql" in done.stdout) is (command == r"\dx")


def test_objects_of_the_extension_in_psql(
    proxy: Proxy, scratch: str, conn: Connection, installed: None
) -> None:
    conn.execute("CREATE FUNCTION pg_background_mine() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    done = psql(proxy.port, "-At", "-c", r"\dx+ pg_background", dbname=scratch)
    conn.execute("DROP FUNCTION pg_background_mine()")
    assert done.returncode == 0, done.stderr
    for name in (
        "function pg_background_launch(text,integer)",
        "function pg_background_drain_v2(pg_background_handle[],integer)",
        "function grant_pg_background_privileges(text,boolean)",
        "type pg_background_handle",
        "view pg_background_list",
        "view pg_background_activity",
    ):
        assert name in done.stdout.splitlines()
    assert "mine" not in done.stdout


def test_comment_on_the_extension(proxy: Proxy, scratch: str, conn: Connection) -> None:
    conn.execute("CREATE EXTENSION pg_background")
    for text, shown in (("'it''s'", "it's"), (r"E'tab\there'", "tab\there"), ("NULL", "")):
        conn.execute(f"COMMENT ON EXTENSION pg_background IS {text}".encode())
        done = psql(proxy.port, "-At", "-F", "|", "-c", r"\dx pg_background", dbname=scratch)
        assert done.stdout.rstrip("\n").split("|")[-1] == shown
    conn.execute("DROP EXTENSION pg_background")


def test_nothing_is_listed_without_it(conn: Connection, observer: Connection) -> None:
    query = "SELECT * FROM pg_extension ORDER BY extname"
    assert rows(conn, query) == rows(observer, query)


# --- pg_stat_activity ------------------------------------------------------------------------


def test_jobs_are_background_backends(conn: Connection, observer: Connection, gate: Gate) -> None:
    pid = launch(conn, gate.sql)
    query = f"SELECT backend_type FROM pg_stat_activity WHERE pid = {pid}"
    assert rows(conn, query) == [("pg_background",)]
    assert rows(observer, query) == [("client backend",)]
    query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_background'"
    assert (pid,) in rows(conn, query)
    own = "SELECT backend_type FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    assert rows(conn, own) == [("client backend",)]
    [[labelled]] = rows(conn, f"SELECT (pg_background_launch_v2('{gate.sql}', 0, 'mine')).pid")
    assert rows(
        conn, f"SELECT a.backend_type FROM pg_stat_activity a WHERE a.pid = {labelled}"
    ) == [("pg_background",)]
    gate.open()


def test_definitions_are_the_clients_own(
    conn: Connection, observer: Connection, installed: None
) -> None:
    """What is stored has nothing of ours in it."""
    query = "SELECT a.backend_type, e.extname FROM pg_stat_activity a, pg_extension e"
    for link in (conn, observer):
        link.execute(f"CREATE VIEW seen AS {query}".encode())
        link.execute(f"CREATE MATERIALIZED VIEW kept AS {query}".encode())
        link.execute(
            f"CREATE FUNCTION looks() RETURNS SETOF record LANGUAGE sql AS $$ {query} $$".encode()
        )
        stored = rows(
            link,
            "SELECT pg_get_viewdef('seen'), pg_get_viewdef('kept'),"
            " pg_get_functiondef('looks'::regproc)",
        )
        if link is conn:
            through = stored
        link.execute("DROP VIEW seen; DROP MATERIALIZED VIEW kept; DROP FUNCTION looks()")
    assert through == stored


BACKEND_TYPE = "SELECT backend_type FROM pg_stat_activity WHERE pid = {}"


def test_backend_type_goes_by_pid(conn: Connection, gate: Gate) -> None:
    pid = launch(conn, f"SET application_name = 'nightly'; {gate.sql}")
    wait_until(
        lambda: (
            rows(conn, f"SELECT application_name FROM pg_stat_activity WHERE pid = {pid}")
            == [("nightly",)]
        )
    )
    conn.execute("SET application_name = 'pg_background'")
    own = BACKEND_TYPE.format("pg_backend_pid()")
    for ask in (rows, lambda conn, query: conn.execute(query, prepare=False).fetchall()):
        assert ask(conn, BACKEND_TYPE.format(pid)) == [("pg_background",)]
        assert ask(conn, own) == [("client backend",)]
    conn.execute("RESET application_name")
    gate.open()


def test_prepared_query_finds_later_jobs(conn: Connection, gate: Gate) -> None:
    query = BACKEND_TYPE.format("%s")
    [[own]] = rows(conn, "SELECT pg_backend_pid()")
    assert conn.execute(query, [own], prepare=True).fetchall() == [("client backend",)]
    pid = launch(conn, gate.sql)
    assert conn.execute(query, [pid], prepare=True).fetchall() == [("pg_background",)]
    gate.open()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM pg_stat_activity WHERE query = %(text)s",
        "SELECT count(*) FROM pg_stat_activity WHERE query = %(text)s"
        " AND backend_type = 'client backend' /* {} */",
        "SELECT count(*) FROM (SELECT * FROM pg_stat_activity) a WHERE query = %(text)s /* {} */",
        "SELECT count(*) FROM pg_stat_activity a WHERE (to_json(a) ->> 'query') = %(text)s",
    ],
)
@pytest.mark.parametrize("filler", ["", "x" * 2000, "ä" * 2000, "x" + "€" * 400])
def test_query_of_ones_own_is_ones_own(
    conn: Connection, observer: Connection, gate: Gate, query: str, filler: str
) -> None:
    launch(conn, gate.sql)
    query = query.replace("{}", filler)
    for link in (conn, observer):
        query += "\n"  # not what the other one has asked
        text = query.replace("%(text)s", "$1")
        shown = link.execute(
            "SELECT left(%(text)s, n) FROM generate_series(1023, 0, -1) n"
            " WHERE octet_length(left(%(text)s, n)) < 1024 LIMIT 1",
            {"text": text},
        ).fetchall()
        found = link.execute(query.encode(), {"text": shown[0][0]}, prepare=True).fetchall()
        assert found == [(1,)]
    gate.open()


def test_whole_message_is_the_query(conn: Connection, gate: Gate) -> None:
    launch(conn, gate.sql)
    text = " SELECT 1; SELECT query, * FROM pg_stat_activity WHERE pid = pg_backend_pid() ; "
    cursor = conn.execute(text.encode())
    cursor.nextset()
    [row] = cursor.fetchall()
    assert row[0] == text
    gate.open()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT e.extname, e.extversion, count(*) FROM pg_extension e JOIN pg_depend d"
        " ON d.refobjid = e.oid GROUP BY e.oid",
        "SELECT e.oid AS o, e.extname FROM pg_extension e GROUP BY o",
        "SELECT e.oid, e.extname FROM pg_extension e GROUP BY 1",
    ],
)
def test_groups_by_the_primary_key(conn: Connection, observer: Connection, query: str) -> None:
    assert outcome(conn, query) == outcome(observer, query)


@pytest.mark.parametrize("relation", ["pg_stat_activity", "pg_extension"])
def test_whole_rows_are_of_the_relations_type(
    conn: Connection, gate: Gate, installed: None, relation: str
) -> None:
    launch(conn, gate.sql)
    for item in (relation, f"{relation} a", f"pg_catalog.{relation} AS a"):
        alias = "a" if item.endswith("a") else relation
        query = f"SELECT DISTINCT pg_typeof({alias})::text FROM {item}"
        assert rows(conn, query) == [(relation,)]
    gate.open()


def outcome(conn: Connection, query: str) -> object:
    try:
        return sorted(rows(conn, query))
    except psycopg.Error as error:
        return error.sqlstate, message(error)


def test_view_for_definitions(
    proxy: Proxy, conn: Connection, observer: Connection, installed: None, gate: Gate
) -> None:
    """In functions, on direct connections too, and for roles that were granted nothing."""
    conn.execute(
        "CREATE FUNCTION public.is_job(int) RETURNS bool LANGUAGE sql AS $$ SELECT EXISTS(SELECT"
        " FROM pg_background_stat_activity WHERE backend_type = 'pg_background' AND pid = $1) $$"
    )
    pid = launch(conn, gate.sql)
    query = f"SELECT public.is_job({pid}), public.is_job(pg_backend_pid())"
    assert rows(conn, query) == rows(observer, query) == [(True, False)]
    observer.execute("CREATE ROLE nobody_special")
    observer.execute("SET ROLE nobody_special")
    assert rows(observer, "SELECT count(*) > 0 FROM pg_background_stat_activity") == [(True,)]
    observer.execute("RESET ROLE; DROP ROLE nobody_special; DROP FUNCTION public.is_job(int)")
    gate.open()


# --- turned off ------------------------------------------------------------------------------


def test_switch(start_proxy: StartProxy, scratch: str, installed: None) -> None:
    with start_proxy("--catalogs", "off").connect(dbname=scratch) as conn:
        assert rows(conn, "SELECT extname FROM pg_extension") == [("plpgsql",)]
        pid = launch(conn, "SELECT pg_sleep(2)")
        query = f"SELECT backend_type FROM pg_stat_activity WHERE pid = {pid}"
        assert rows(conn, query) == [("client backend",)]
        assert rows(conn, f"SELECT pg_cancel_backend({pid})") == [(True,)]


@pytest.mark.parametrize("name", sorted(tool.decode() for tool in catalogs.TOOLS))
def test_tools_see_what_is_there(proxy: Proxy, scratch: str, installed: None, name: str) -> None:
    with proxy.connect(dbname=scratch, application_name=name) as conn:
        assert rows(conn, "SELECT extname FROM pg_extension") == [("plpgsql",)]
        conn.execute("SET application_name = 'no tool'")
        assert len(rows(conn, "SELECT extname FROM pg_extension")) == 2
