"""CREATE EXTENSION pg_background and its kin in DO blocks, as migrations write it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from proxy.extension import do_blocks
from proxy.sql.tokens import Tokens
from tests.conftest import StartProxy
from tests.support.background import failure, message, notices, run
from tests.support.growth import LINEAR, growth
from tests.support.servers import Connection, Proxy, Server, psql
from tests.support.sql import statement

pytestmark = pytest.mark.every_server

OTHER = "CREATE EXTENSION IF NOT EXISTS plpgsql"
"""What the server can do itself, to compare with."""


@pytest.fixture
def conn(proxy: Proxy, db: str) -> Iterator[Connection]:
    with proxy.connect(dbname=db) as conn:
        yield conn


@pytest.fixture
def direct(server: Server, db: str) -> Iterator[Connection]:
    with server.connect(dbname=db) as conn:
        yield conn


def version(conn: Connection) -> str | None:
    row = conn.execute(
        "SELECT extversion FROM pg_extension WHERE extname = 'pg_background'"
    ).fetchone()
    return None if row is None else row[0]


def schema(conn: Connection) -> str:
    row = conn.execute(
        "SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'pg_background'"
    ).fetchone()
    assert row is not None
    return str(row[0])


GUARDED = """
DO {}
BEGIN
  IF NOT EXISTS (SELECT 1 FROM pg_extension WHERE extname = {}) THEN
    CREATE EXTENSION pg_background;
  END IF;
END
{}
"""

# Blocks that create the extension, and may be executed twice.
MIGRATIONS = (
    GUARDED.format("$$", "'pg_background'", "$$"),
    GUARDED.format("$body$", "'pg_background'", "$body$"),
    GUARDED.format("LANGUAGE plpgsql $pg_background_script$", "$$pg_background$$",
                   "$pg_background_script$"),
    GUARDED.format("'", "''pg_background''", "'"),
    GUARDED.format("E'\\n", "\\'pg_background\\'", "'"),
    GUARDED.format("$ä$ /* ä */ ", "'pg_background'", "$ä$ LANGUAGE plpgsql"),
    "DO $$ BEGIN CREATE EXTENSION IF NOT EXISTS pg_background; END $$",
    "DO $$BEGIN create extension if not exists \"pg_background\" ;END$$",
    "DO $$ BEGIN EXECUTE 'CREATE EXTENSION IF NOT EXISTS pg_background'; END $$",
    "DO ' BEGIN EXECUTE ''CREATE EXTENSION IF NOT EXISTS pg_background;''; END '",
    "DO $$ BEGIN EXECUTE E'CREATE EXTENSION\\tIF NOT EXISTS pg_background'; END $$",
    "DO $$ BEGIN EXECUTE $x$CREATE EXTENSION IF NOT EXISTS pg_background$x$; END $$",
    "DO $$ BEGIN PERFORM 1 FROM pg_catalog.pg_extension e WHERE e.extname = 'pg_background';"
    " IF NOT FOUND THEN CREATE EXTENSION pg_background; END IF; END $$",
    "DO $$ DECLARE n int; BEGIN SELECT count(*) INTO n FROM pg_extension"
    " WHERE extname = 'pg_background'; IF n = 0 THEN CREATE EXTENSION pg_background;"
    " END IF; END $$",
    "DO $$ DECLARE there boolean := EXISTS (SELECT FROM pg_extension AS e"
    " WHERE extname = 'pg_background'); BEGIN IF there THEN RETURN; ELSE"
    " CREATE EXTENSION pg_background; END IF; END $$",
    "DO $$ DECLARE e record; n int := 0; BEGIN FOR e IN SELECT * FROM pg_extension LOOP"
    " IF e.extname = 'pg_background' THEN n := n + 1; END IF; END LOOP;"
    " IF n = 0 THEN CREATE EXTENSION pg_background; END IF; END $$",
    "DO $$ BEGIN CREATE EXTENSION pg_background; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    "DO $$ BEGIN BEGIN CREATE EXTENSION pg_background; EXCEPTION WHEN OTHERS THEN"
    " IF SQLSTATE <> '42710' THEN RAISE; END IF; END; END $$",
    "DO $$ <<here>> BEGIN CREATE EXTENSION IF NOT EXISTS plpgsql;"
    " CREATE EXTENSION IF NOT EXISTS pg_background; END here $$",
)  # fmt: skip


WAYS = ("simple", "prepared", "among others")


@pytest.mark.parametrize(
    ("block", "way"), [(block, WAYS[n % len(WAYS)]) for n, block in enumerate(MIGRATIONS)]
)
def test_migration_runs_twice(conn: Connection, direct: Connection, block: str, way: str) -> None:
    for _ in range(2):
        if way == "among others":
            cursor = conn.execute(f"SELECT 1; {block}; SELECT 2".encode())
            assert cursor.nextset()
        else:
            cursor = conn.execute(block.encode(), prepare=way == "prepared")
        assert cursor.statusmessage == "DO"
        assert version(conn) == "1.10"
        assert run(conn, "SELECT 1", "n int") == [(1,)]
    found = direct.execute("SELECT count(*) FROM pg_proc WHERE proname = 'pg_background_run'")
    assert found.fetchone() != (0,)


NAMES = ("p", "s", "x", "q", "e", "d", "n", "m", "c", "a", "t", "o", "f", "k", "i")


@pytest.mark.parametrize("declared", ["record", "pg_extension", "text := 'x'"])
def test_variables_of_the_blocks_own(conn: Connection, declared: str) -> None:
    """Names that the proxy's own SQL has, too."""
    variables = "".join(f"{name} {declared}; " for name in NAMES)
    block = (
        f"DO $$ DECLARE {variables} BEGIN IF NOT EXISTS (SELECT FROM pg_extension"
        " WHERE extname = 'pg_background') THEN CREATE EXTENSION pg_background; END IF; END $$"
    )
    for _ in range(2):
        conn.execute(block.encode())
    assert version(conn) == "1.10"


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("CREATE EXTENSION pg_background WITH SCHEMA app VERSION '1.8'", ("app", "1.8")),
        ("CREATE EXTENSION pg_background SCHEMA \"app\" VERSION \"2.0\" CASCADE", ("app", "2.0")),
        ("CREATE EXTENSION pg_background VERSION '1.8';"
         " ALTER EXTENSION pg_background UPDATE TO '2.0'", ("public", "2.0")),
        ("CREATE EXTENSION pg_background; ALTER EXTENSION pg_background SET SCHEMA app",
         ("app", "1.10")),
        ("CREATE EXTENSION pg_background; COMMENT ON EXTENSION pg_background IS 'it''s'",
         ("public", "1.10")),
    ],
)  # fmt: skip
def test_options(conn: Connection, command: str, made: tuple[str, str]) -> None:
    conn.execute("CREATE SCHEMA app")
    for block in (f"DO $$ BEGIN {command}; END $$", "DO '{}'"):
        if "{}" in block:
            doubled = command.replace("'", "''")
            block = block.format(f"BEGIN {doubled}; END")
        with conn.transaction(force_rollback=True):
            conn.execute(block.encode())
            assert (schema(conn), version(conn)) == made
            conn.execute("DO $$ BEGIN DROP EXTENSION IF EXISTS pg_background; END $$")
            assert version(conn) is None


def test_guarded_drop(conn: Connection) -> None:
    block = (
        "DO $$ BEGIN IF EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_background') THEN"
        " DROP EXTENSION pg_background CASCADE; END IF; END $$"
    )
    conn.execute(block.encode())
    conn.execute("CREATE EXTENSION pg_background")
    conn.execute(block.encode())
    assert version(conn) is None


def test_block_that_only_asks(conn: Connection) -> None:
    block = (
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_background')"
        " THEN RAISE EXCEPTION 'pg_background is needed'; END IF; END $$"
    )
    assert failure(conn, block.encode()).diag.message_primary == "pg_background is needed"
    conn.execute("CREATE EXTENSION pg_background")
    conn.execute(block.encode())


def said(error: psycopg.Error | dict[str, str | None]) -> list[str]:
    context = error["context"] if isinstance(error, dict) else error.diag.context
    return str(context).splitlines()


@pytest.mark.parametrize("quote", ["$$", "'"])
def test_errors_are_the_servers(conn: Connection, direct: Connection, quote: str) -> None:
    """In words, and in CONTEXT: compared with an extension that the server has."""
    conn.execute("CREATE EXTENSION pg_background")
    doubled = "''" if quote == "'" else "'"
    for command in (
        "CREATE EXTENSION {}",
        "EXECUTE {q}CREATE EXTENSION {}{q}",
        "PERFORM 1;\n  PERFORM 2;\n CREATE EXTENSION {} SCHEMA pg_catalog",
    ):
        block = f"DO {quote}\nBEGIN\n  {command};\nEND {quote}".replace("{q}", doubled)
        found = failure(conn, block.replace("{}", "pg_background").encode())
        expected = failure(direct, block.replace("{}", "plpgsql").encode())
        assert found.sqlstate == expected.sqlstate == "42710"
        assert found.diag.message_primary == 'extension "pg_background" already exists'
        expected_context = [line.replace("plpgsql", "pg_background") for line in said(expected)]
        assert said(found) == expected_context
        assert found.diag.internal_query == expected.diag.internal_query
    for command, state in (
        ("CREATE EXTENSION pg_background VERSION '9'", "22023"),
        ("CREATE EXTENSION pg_background SCHEMA nowhere", "3F000"),
    ):
        with conn.transaction(force_rollback=True):
            conn.execute("DROP EXTENSION pg_background")
            with pytest.raises(psycopg.Error) as raised, conn.transaction():
                conn.execute(f"DO $$ BEGIN {command}; END $$".encode())
        assert raised.value.sqlstate == state
        assert said(raised.value) == [
            f'SQL statement "{command}"',
            "PL/pgSQL function inline_code_block line 1 at SQL statement",
        ]


def test_notices_are_the_servers(conn: Connection, direct: Connection) -> None:
    conn.execute("CREATE EXTENSION pg_background")
    block = "DO $$ BEGIN\n RAISE NOTICE 'mine'; CREATE EXTENSION IF NOT EXISTS {}; END $$"
    with notices(conn) as found:
        conn.execute(block.replace("{}", "pg_background").encode())
    with notices(direct) as expected:
        direct.execute(block.replace("{}", "plpgsql").encode())
    for notice in (*found, *expected):
        del notice["source_file"], notice["source_line"], notice["source_function"]
    assert found == [
        {key: text and text.replace("plpgsql", "pg_background") for key, text in notice.items()}
        | {"context": str(notice["context"]).replace("SQL statement \"CREATE EXTENSION IF NOT"
                                                     " EXISTS plpgsql", "SQL statement \"CREATE"
                                                     " EXTENSION IF NOT EXISTS pg_background")}
        for notice in expected
    ]  # fmt: skip


@pytest.mark.parametrize(
    "block",
    [
        "DO $$ BEGIN CREATE EXTENSION IF NOT EXISTS pg_background; PERFORM 1 / 0; END $$",
        "DO $$\nBEGIN\n CREATE EXTENSION pg_background;\n SELEC 'ä';\nEND $$",
        "DO '\nBEGIN\n CREATE EXTENSION pg_background;\n SELEC ''ä'';\nEND '",
        "SELECT 'ä'; DO $$ BEGIN CREATE EXTENSION pg_background; NOPE; END $$",
    ],
)
def test_errors_of_the_blocks_own(conn: Connection, direct: Connection, block: str) -> None:
    found = failure(conn, block.encode())
    expected = failure(direct, block.replace("pg_background", "plpgsql").replace(
        "CREATE EXTENSION plpgsql", OTHER + " " * 4).encode())  # fmt: skip
    assert message(found) == message(expected)
    assert said(found) == said(expected)
    assert version(conn) is None


ASKED = "EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'pg_background')"


@pytest.mark.parametrize(
    "block",
    [
        f"DO $$ BEGIN\nIF {ASKED} THEN NULL; END IF;\nRAISE 'x';\nEND $$",
        "DO $$ BEGIN\nPERFORM 1 FROM pg_catalog\n.\npg_extension e;\nRAISE 'x';\nEND $$",
        "DO $$ BEGIN\nDROP EXTENSION\n IF EXISTS\n\n pg_background;\nRAISE 'x';\nEND $$",
        "DO $$ BEGIN\nEXECUTE\n'DROP EXTENSION\n IF EXISTS pg_background';\nRAISE 'x';\nEND $$",
        "DO 'BEGIN\nDROP EXTENSION\n IF EXISTS '\n'pg_background;\nRAISE ''x'';\nEND'",
        "DO E'BEGIN\\nDROP EXTENSION\\n IF EXISTS \\npg_background;\nRAISE \\'x\\';\nEND'",
    ],
)
def test_lines_behind_what_is_replaced(conn: Connection, direct: Connection, block: str) -> None:
    conn.execute("SET client_min_messages = warning")
    direct.execute("SET client_min_messages = warning")
    found, expected = failure(conn, block.encode()), failure(direct, block.encode())
    assert said(found) == said(expected)


@pytest.mark.parametrize(
    "definition",
    [
        f"CREATE VIEW made AS SELECT {ASKED} AS yes",
        f"CREATE OR REPLACE TEMP VIEW made AS SELECT {ASKED} AS yes",
        f"CREATE MATERIALIZED VIEW made AS SELECT {ASKED} AS yes",
    ],
)
def test_what_a_block_defines_is_stored_as_it_is(
    conn: Connection, direct: Connection, definition: str
) -> None:
    sources = []
    for each in (direct, conn):
        with each.transaction(force_rollback=True):
            each.execute(f"DO $$ BEGIN {definition}; END $$")
            sources.append(each.execute("SELECT pg_get_viewdef('made'::regclass)").fetchone())
    assert sources[0] == sources[1]


def test_body_of_a_function_that_a_block_defines(conn: Connection, direct: Connection) -> None:
    create = "CREATE FUNCTION made() RETURNS bool BEGIN ATOMIC SELECT true; SELECT {}; END"
    sources = []
    for each in (direct, conn):
        with each.transaction(force_rollback=True):
            each.execute(f"DO $$ BEGIN {create.format(ASKED)}; END $$")
            found = each.execute("SELECT pg_get_functiondef('made'::regproc)").fetchone()
            sources.append(found)
    assert sources[0] == sources[1]


def test_table_that_a_block_fills_lists_the_extension(conn: Connection) -> None:
    conn.execute("CREATE EXTENSION pg_background")
    conn.execute(f"DO $$ BEGIN CREATE TEMP TABLE made AS SELECT {ASKED} AS yes; END $$")
    assert conn.execute("SELECT yes FROM made").fetchone() == (True,)


def test_rights_are_those_of_the_session(conn: Connection) -> None:
    block = "DO $$ BEGIN CREATE EXTENSION pg_background; END $$"
    with conn.transaction(force_rollback=True):
        conn.execute("CREATE ROLE nobody_special")
        conn.execute("SET LOCAL ROLE nobody_special")
        with pytest.raises(psycopg.Error) as raised, conn.transaction():
            conn.execute(block.encode())
        assert raised.value.sqlstate == "42501"
        with pytest.raises(psycopg.Error) as raised, conn.transaction():
            conn.execute("CREATE EXTENSION pg_background")
        assert raised.value.sqlstate == "42501"
    with conn.transaction(force_rollback=True):
        conn.execute("SET TRANSACTION READ ONLY")
        with pytest.raises(psycopg.Error) as raised, conn.transaction():
            conn.execute(block.encode())
        assert raised.value.sqlstate == "25006"


def test_rolled_back_and_committed_within(conn: Connection, proxy: Proxy, db: str) -> None:
    """All sessions of the proxy know of it."""
    with proxy.connect(dbname=db) as other:
        assert run(other, "SELECT 1", "n int") == [(1,)]
        with conn.transaction(force_rollback=True):
            conn.execute("DO $$ BEGIN CREATE EXTENSION pg_background VERSION '2.0'; END $$")
        assert version(conn) is None
        block = (
            "DO $$ BEGIN CREATE EXTENSION pg_background VERSION '2.0'; COMMIT; ASSERT false; END $$"
        )
        assert failure(conn, block.encode()).sqlstate == "P0004"
        assert version(conn) == "2.0"
        for link in (conn, other):
            row = link.execute("SELECT (pg_background_launch('SELECT 1')).cookie").fetchone()
            assert row is not None
            assert isinstance(row[0], int)


def test_in_psql(proxy: Proxy, db: str) -> None:
    script = "".join(f"{block.strip()};\n" for block in MIGRATIONS)
    done = psql(proxy.port, "-X", "-v", "ON_ERROR_STOP=1", input=script, dbname=db)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DO"] * len(MIGRATIONS)


@pytest.mark.parametrize(
    "block",
    [
        "DO $$ BEGIN EXECUTE format('CREATE EXTENSION %I', 'pg_background'); END $$",
        "DO $$ DECLARE x text := 'CREATE EXTENSION pg_background'; BEGIN EXECUTE x; END $$",
        "DO $$ BEGIN CREATE EXTENSION pg_background BOGUS; END $$",
        "DO $$ BEGIN -- CREATE EXTENSION pg_background;\n PERFORM 1 / 0; END $$",
    ],
)
def test_what_is_for_the_server(conn: Connection, direct: Connection, block: str) -> None:
    found, expected = failure(conn, block.encode()), failure(direct, block.encode())
    assert message(found) == message(expected)
    assert found.diag.statement_position == expected.diag.statement_position
    assert said(found) == said(expected)


def test_with_the_servers_extension_wanted(start_proxy: StartProxy, db: str) -> None:
    with start_proxy("--extension", "server").connect(dbname=db) as conn:
        error = failure(conn, MIGRATIONS[0].encode())
        assert error.sqlstate in ("0A000", "58P01")


LONG_TEXT = "x" * 2000
"""Copied once for each command that may be before it, it takes time."""


@pytest.mark.parametrize(
    "repeated",
    [
        *("BEGIN CREATE ", "BEGIN EXECUTE '' ", "CREATE EXTENSION a "),
        f"BEGIN CREATE EXTENSION '{LONG_TEXT}' ",
        f"EXECUTE $x$ CREATE EXTENSION pg_background {'a ' * 1000} $x$; ",
    ],
)
def test_time_is_linear(repeated: str) -> None:
    def make(size: int) -> Tokens:
        body = repeated * (size // len(repeated))
        one = statement(f"DO $$ BEGIN pg_background extension {body} END $$".encode())
        assert one is not None
        return one

    def read(one: Tokens) -> object:
        return do_blocks.analyze(
            one,
            lambda command, text: b"",
            server_version=180000,
            standard_conforming_strings=True,
            with_catalogs=True,
        )

    assert growth(read, make, 30_000 if len(repeated) < 100 else 3_000_000) < LINEAR
