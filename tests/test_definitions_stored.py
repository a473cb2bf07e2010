"""Definitions that look for jobs in pg_stat_activity, executed: what the client is told of them,
what the server stores, and what they find."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import StartProxy, upstream_of
from tests.support.background import failure, launch, message, notices
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server

QUERY = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_background'"
TOLD = 'pg_stat_activity has no backend_type "pg_background" when this definition reads it'

DEFINITIONS = (
    f"CREATE VIEW v AS {QUERY}",
    f"CREATE MATERIALIZED VIEW m AS {QUERY} WITH NO DATA",
    f"CREATE RULE r AS ON INSERT TO t DO ALSO INSERT INTO u {QUERY}",
    f"CREATE POLICY p ON t USING (n IN ({QUERY}))",
    f"CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS $${QUERY}$$",
    f"CREATE OR REPLACE FUNCTION f() RETURNS SETOF int LANGUAGE plpgsql AS"
    f" $$ BEGIN RETURN QUERY {QUERY}; END $$",
    "CREATE PROCEDURE f() LANGUAGE sql AS E'\\n" + QUERY.replace("'", "\\'") + "'",
    "CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS '" + QUERY.replace("'", "''") + "'",
    f"CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql BEGIN ATOMIC {QUERY}; END",
    f"DO $$ BEGIN PERFORM 1 FROM t WHERE n IN ({QUERY}); END $$",
)


@pytest.fixture(scope="module")
def dbname(server: Server, proxy: Proxy) -> Iterator[str]:
    """A database with the extension, in a schema that no search_path has."""
    with database(server, "definitions") as name:
        with proxy.connect(dbname=name) as conn:
            conn.execute('CREATE SCHEMA "My ext"')
            conn.execute('CREATE EXTENSION pg_background SCHEMA "My ext"')
            conn.execute("CREATE TABLE t (n int); CREATE TABLE u (n int)")
        yield name


@pytest.fixture(scope="module")
def rewriting_proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(upstream_of(server), "--catalogs", "definitions") as proxy:
        yield proxy


@pytest.fixture
def rewriting(rewriting_proxy: Proxy, dbname: str) -> Iterator[Connection]:
    with rewriting_proxy.connect(dbname=dbname) as conn:
        yield conn


@pytest.fixture
def noticing(proxy: Proxy, dbname: str) -> Iterator[Connection]:
    with proxy.connect(dbname=dbname) as conn:
        yield conn


@pytest.fixture(params=["noticing", "rewriting"])
def through(request: pytest.FixtureRequest) -> Connection:
    """A session through a proxy with either setting."""
    conn: Connection = request.getfixturevalue(request.param)
    return conn


@pytest.fixture
def direct(server: Server, dbname: str) -> Iterator[Connection]:
    with server.connect(dbname=dbname) as conn:
        yield conn


def stored(conn: Connection) -> list[Any]:
    """What the server has of the definitions that a transaction has made."""
    return conn.execute(
        """
        SELECT pg_get_viewdef(oid) FROM pg_class
          WHERE relname IN ('v', 'm') AND relnamespace = 'public'::regnamespace
        UNION ALL SELECT pg_get_ruledef(oid) FROM pg_rewrite WHERE rulename = 'r'
        UNION ALL SELECT pg_get_expr(polqual, polrelid) FROM pg_policy
        UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc
          WHERE proname = 'f' AND pronamespace = 'public'::regnamespace
        """
    ).fetchall()


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("prepare", [False, True, None])
def test_notice(
    noticing: Connection, direct: Connection, definition: str, prepare: bool | None
) -> None:
    """Once, after it has succeeded; what is stored is the client's own."""
    made: list[Any] = []
    for link in (noticing, direct):
        with link.transaction(force_rollback=True), notices(link) as told:
            if prepare is None:
                cursor = link.execute(f"SELECT 1; {definition}; SELECT 2".encode())
            else:
                cursor = link.execute(definition.encode(), prepare=prepare)
            made.append((cursor.statusmessage, stored(link)))
        if link is direct:
            assert told == []
            continue
        [notice] = told
        assert (notice["severity"], notice["sqlstate"]) == ("NOTICE", "00000")
        assert notice["message_primary"] == TOLD
        assert '"My ext".pg_background_stat_activity' in str(notice["message_hint"])
        assert 'catalogs = "definitions"' in str(notice["message_hint"])
    assert made[0] == made[1]


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("prepare", [False, True, None])
def test_rewritten(
    rewriting: Connection, direct: Connection, definition: str, prepare: bool | None
) -> None:
    """As the same definition that says so itself."""
    ours = '"My ext".pg_background_stat_activity AS pg_stat_activity'
    made: list[Any] = []
    for link in (rewriting, direct):
        own = definition if link is rewriting else definition.replace("pg_stat_activity", ours)
        with link.transaction(force_rollback=True), notices(link) as told:
            if prepare is None:
                cursor = link.execute(f"SELECT 1; {own}; SELECT 2".encode())
            else:
                cursor = link.execute(own.encode(), prepare=prepare)
            made.append((cursor.statusmessage, stored(link)))
        assert told == []
    assert made[0] == made[1]


def test_rewritten_definitions_find_jobs(rewriting: Connection) -> None:
    with rewriting.transaction(force_rollback=True):
        rewriting.execute('SET LOCAL search_path = public, "My ext"')
        for definition in (
            f"CREATE VIEW v AS {QUERY}",
            f"CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS $$ {QUERY} $$",
            "CREATE FUNCTION g(int) RETURNS text LANGUAGE plpgsql AS $$ DECLARE t text; BEGIN"
            " SELECT backend_type INTO t FROM pg_stat_activity WHERE pid = $1;"
            " RETURN CASE WHEN t = 'pg_background' THEN 'job' ELSE 'other' END; END $$",
        ):
            rewriting.execute(definition.encode())
        pid = launch(rewriting, "SELECT pg_sleep(60)")
        for query in ("SELECT * FROM v", "SELECT f()"):
            assert (pid,) in rewriting.execute(query.encode()).fetchall()
        found = rewriting.execute(f"SELECT g({pid}), g(pg_backend_pid())".encode()).fetchall()
        assert found == [("job", "other")]
        rewriting.execute(f"SELECT pg_terminate_backend({pid})".encode())


def test_what_cannot_be_changed_has_a_notice(rewriting: Connection) -> None:
    definition = QUERY.replace("pid", "*")
    with rewriting.transaction(force_rollback=True), notices(rewriting) as told:
        rewriting.execute(f"CREATE VIEW v AS {definition}".encode())
    [notice] = told
    assert "could not be changed for certain" in str(notice["message_detail"])


def test_without_the_extension(start_proxy: StartProxy, db: str) -> None:
    with start_proxy("--catalogs", "definitions").connect(dbname=db) as conn:
        with notices(conn) as told:
            conn.execute(f"CREATE VIEW v AS {QUERY}".encode())
            conn.execute(f"/* {QUERY} */ CREATE VIEW w AS SELECT 1 AS n".encode())
        assert [notice["message_primary"] for notice in told] == [TOLD]
        assert "CREATE EXTENSION pg_background makes a view" in str(told[0]["message_hint"])
        conn.execute("CREATE EXTENSION pg_background")
        with notices(conn) as told:
            conn.execute(f"CREATE OR REPLACE VIEW v AS {QUERY}".encode())
        assert told == []
        shown = conn.execute("SELECT pg_get_viewdef('v')").fetchall()
        assert "pg_background_stat_activity" in shown[0][0]


def test_role_that_may_not_use_the_view(rewriting: Connection) -> None:
    with rewriting.transaction(force_rollback=True), notices(rewriting) as told:
        rewriting.execute("CREATE ROLE nobody_special; GRANT CREATE ON SCHEMA public TO PUBLIC")
        rewriting.execute("SET LOCAL ROLE nobody_special")
        rewriting.execute(f"CREATE VIEW v AS {QUERY}".encode())
    assert [notice["message_primary"] for notice in told] == [TOLD]


@pytest.mark.parametrize("level", ["warning", "error", "notice", "debug1", "info"])
def test_notices_that_the_session_does_not_want(noticing: Connection, level: str) -> None:
    with noticing.transaction(force_rollback=True), notices(noticing) as told:
        noticing.execute(f"SET LOCAL client_min_messages = {level}".encode())
        noticing.execute("DO $$ BEGIN RAISE NOTICE 'direct'; END $$")
        noticing.execute(f"CREATE VIEW v AS {QUERY}".encode())
    found = [notice["message_primary"] for notice in told if notice["severity"] == "NOTICE"]
    assert found == (["direct", TOLD] if level in ("notice", "debug1", "info") else [])


def test_no_notice_after_an_error(through: Connection, direct: Connection) -> None:
    for definition in (
        f"CREATE VIEW nowhere.v AS {QUERY}",
        f"CREATE VIEW v AS {QUERY} AND nope",
        f"SELECT 'ä'; CREATE VIEW v AS {QUERY} AND nope",
        f"CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS $$ {QUERY} AND nope $$",
        f"CREATE FUNCTION f() RETURNS SETOF int LANGUAGE sql AS '{QUERY} AND nope'".replace(
            "'pg_background'", "''pg_background''"
        ),
    ):
        with notices(through) as told:
            found = failure(through, definition.encode())
        expected = failure(direct, definition.encode())
        assert message(found) == message(expected)
        assert found.diag.statement_position == expected.diag.statement_position
        assert told == []


def test_in_psql(proxy: Proxy, dbname: str) -> None:
    done = psql(
        proxy.port,
        *("-X", "-v", "ON_ERROR_STOP=1"),
        input=f"BEGIN; CREATE VIEW v AS {QUERY};\nROLLBACK;",
        dbname=dbname,
    )
    assert done.returncode == 0
    assert done.stderr.startswith(f"NOTICE:  {TOLD}\n")
    assert done.stdout.split() == ["BEGIN", "CREATE", "VIEW", "ROLLBACK"]


def test_given_once_for_a_prepared_statement(noticing: Connection) -> None:
    block = f"DO $$ BEGIN PERFORM 1 FROM t WHERE n IN ({QUERY}); END $$".encode()
    with notices(noticing) as told:
        for _ in range(3):
            assert noticing.execute(block, prepare=True).statusmessage == "DO"
    assert len(told) == 1


def test_pipeline(noticing: Connection) -> None:
    with (
        notices(noticing) as told,
        noticing.transaction(force_rollback=True),
        noticing.pipeline(),
    ):
        for number in range(3):
            noticing.execute("SELECT 1")
            noticing.execute(f"CREATE VIEW v{number} AS {QUERY}".encode())
        assert noticing.execute("SELECT 2").fetchone() == (2,)
    assert [notice["message_primary"] for notice in told] == [TOLD] * 3


def test_block_that_creates_the_extension_too(
    noticing: Connection, rewriting_proxy: Proxy, server: Server
) -> None:
    """The view is not there before; so there is a notice."""
    block = (
        "DO $$ BEGIN CREATE EXTENSION IF NOT EXISTS pg_background;"
        f" PERFORM 1 FROM t WHERE n IN ({QUERY}); END $$"
    )
    with database(server, "definitions_new") as name, rewriting_proxy.connect(dbname=name) as conn:
        conn.execute("CREATE TABLE t (n int)")
        for link in (conn, noticing):
            with notices(link) as told:
                assert link.execute(block.encode()).statusmessage == "DO"
            assert TOLD in [notice["message_primary"] for notice in told]
        assert conn.execute("SELECT pg_background_launch('SELECT 1')").fetchone()


def test_turned_off(start_proxy: StartProxy, dbname: str) -> None:
    with start_proxy("--catalogs", "off").connect(dbname=dbname) as conn:
        with conn.transaction(force_rollback=True), notices(conn) as told:
            conn.execute(f"CREATE VIEW v AS {QUERY}".encode())
        assert told == []


def test_dumps_are_restored_as_they_are(
    rewriting_proxy: Proxy, dbname: str, direct: Connection
) -> None:
    made: list[Any] = []
    with rewriting_proxy.connect(dbname=dbname, application_name="pg_restore") as conn:
        for link in (conn, direct):
            with link.transaction(force_rollback=True), notices(link) as told:
                link.execute(f"CREATE VIEW v AS {QUERY}".encode())
                made.append(stored(link))
            assert told == []
    assert made[0] == made[1]
