"""SQL never sees a stand-in under the name of a statement or portal that the protocol has made."""

from __future__ import annotations

from typing import Final

import asyncpg
import pytest

from protocol.messages import Bind, Close, Describe, Execute, Parse, Sync
from tests.support.servers import Proxy, Server, database
from tests.support.wire import Wire, error_of

pytestmark = pytest.mark.every_server

LAUNCH: Final = "SELECT pg_background_launch($1)"
RESULT: Final = (
    "SELECT * FROM pg_background_result(pg_background_launch("
    "'SELECT g FROM generate_series(1, 5) g')) AS (a int)"
)
USES: Final = (
    "EXECUTE \"Pr\"('SELECT 1')",
    "execute \"Pr\" ('SELECT 1');",
    "EXPLAIN EXECUTE \"Pr\"('SELECT 1')",
    "EXPLAIN (ANALYZE, COSTS OFF) EXECUTE \"Pr\"('SELECT 1')",
    "CREATE TEMP TABLE made AS EXECUTE \"Pr\"('SELECT 1')",
    "CREATE TABLE IF NOT EXISTS made AS EXECUTE \"Pr\"('SELECT 1') WITH NO DATA",
    "FETCH po",
    "FETCH 2 FROM po",
    "FETCH ALL IN Po",
    'MOVE FORWARD 3 IN "po"',
)


def prepared(wire: Wire) -> None:
    """Make ``Pr`` and, in a transaction, ``po``."""
    wire.query("BEGIN")
    wire.send(
        Parse(b"Pr", LAUNCH.encode(), ()).serialize()
        + Parse(b"", RESULT.encode(), ()).serialize()
        + Bind(b"po", b"", (), (), ()).serialize()
        + Sync().serialize()
    )
    assert [kind for kind, _ in wire.until_ready()] == ["1", "1", "2", "Z"]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("use", USES)
def test_a_call_that_the_protocol_has_prepared_is_not_used_by_sql(
    proxy: Proxy, use: str, extended: bool
) -> None:
    with Wire((proxy.host, proxy.port)) as wire:
        prepared(wire)
        if extended:
            wire.send(
                Parse(b"", use.encode(), ()).serialize()
                + Bind(b"", b"", (), (), ()).serialize()
                + Execute(b"", 0).serialize()
                + Sync().serialize()
            )
            answer = wire.until_ready()
        else:
            answer = wire.query(use)
        error = error_of(answer)
        assert error.sqlstate == "0A000"
        assert b"CREATE EXTENSION" in error.fields["H"]
        assert answer[-1] == ("Z", b"E")


def test_other_uses_of_names_are_the_servers(proxy: Proxy, server: Server) -> None:
    script = (
        "EXECUTE other(4)",
        "EXECUTE nobody(4)",
        "EXPLAIN (COSTS OFF) EXECUTE other(5)",
        "CREATE TEMP TABLE made AS EXECUTE other(6)",
        "SELECT count(*) FROM made",
        "DECLARE c CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 4) g",
        "FETCH 2 FROM c",
        "MOVE c",
        "FETCH c",
        "FETCH nobody",
        "GRANT EXECUTE ON FUNCTION nobody() TO alice",
        "SELECT 'execute \"Pr\"'",
        "EXECUTE other(4); FETCH c",
    )
    answers = []
    for endpoint in (server, proxy):
        with Wire((endpoint.host, endpoint.port)) as wire:
            wire.send(Parse(b"other", b"SELECT $1 + 1", (23,)).serialize() + Sync().serialize())
            wire.until_ready()
            if endpoint is proxy:
                wire.send(Parse(b"Pr", LAUNCH.encode(), ()).serialize() + Sync().serialize())
                wire.until_ready()
            answers.append([wire.query(sql) for sql in script])
    assert answers[0] == answers[1]


def test_the_protocol_executes_it_still(proxy: Proxy) -> None:
    with Wire((proxy.host, proxy.port)) as wire:
        prepared(wire)
        wire.send(
            Execute(b"po", 2).serialize() + Execute(b"po", 0).serialize() + Sync().serialize()
        )
        kinds = "".join(kind for kind, _ in wire.until_ready())
        assert kinds == "DDsDDDCZ"


IN_BLOCKS: Final = {
    "EXECUTE \"Pr\"('SELECT 1')": "0A000",
    "CREATE TEMP TABLE made AS EXECUTE \"Pr\"('SELECT 1')": "42809",
    "EXECUTE \"Pr\"('SELECT 1', 2)": "42601",
    "FETCH po": "34000",
    "FETCH ALL FROM po": "34000",
    "MOVE FORWARD 3 IN po": "34000",
}


def in_block(sql: str) -> str:
    """SQL that PL/pgSQL executes, so the proxy does not see it as a statement."""
    return f"DO $do$ BEGIN EXECUTE $sql${sql}$sql$; END $do$"


def cursor_block(use: str) -> str:
    """The same for a cursor variable."""
    return f"DO $$ DECLARE c refcursor := 'po'; n text; BEGIN {use}; END $$"


@pytest.mark.parametrize(
    ("block", "sqlstate"),
    [
        *((in_block(sql), sqlstate) for sql, sqlstate in IN_BLOCKS.items()),
        (cursor_block("FETCH c INTO n"), "34000"),
        (cursor_block("MOVE c"), "34000"),
        (cursor_block("FOR n IN FETCH ALL FROM po LOOP NULL; END LOOP"), "34000"),
    ],
)
def test_a_function_does_not_get_the_stand_in(proxy: Proxy, block: str, sqlstate: str) -> None:
    with Wire((proxy.host, proxy.port)) as wire:
        prepared(wire)
        answer = wire.query(block)
        assert error_of(answer).sqlstate == sqlstate
        assert not [kind for kind, _ in answer if kind in "DT"]
        wire.query("ROLLBACK")
        # The statement, unlike the portal, is still there.
        wire.send(
            Bind(b"", b"Pr", (), (b"SELECT 1",), ()).serialize()
            + Execute(b"", 0).serialize()
            + Sync().serialize()
        )
        assert "".join(kind for kind, _ in wire.until_ready()) == "2DCZ"


def test_an_error_in_a_function_says_what_to_do(proxy: Proxy) -> None:
    with Wire((proxy.host, proxy.port)) as wire:
        prepared(wire)
        fields = error_of(wire.query(in_block("EXECUTE \"Pr\"('SELECT 1')"))).fields
        assert fields["M"] == b'prepared statement "Pr" cannot be executed by SQL'
        assert b"CREATE EXTENSION" in fields["H"]


@pytest.mark.parametrize("extended", [False, True])
def test_a_statement_prepared_before_the_extension_stays_refused(
    server: Server, proxy: Proxy, extended: bool
) -> None:
    with (
        database(server, "later") as dbname,
        Wire((proxy.host, proxy.port), database=dbname) as wire,
    ):
        parse = Parse(b"Pr", LAUNCH.encode(), ()).serialize() + Sync().serialize()
        wire.send(parse)
        wire.until_ready()
        assert not errors_in(wire.query("CREATE EXTENSION pg_background"))
        for sql, sqlstate in (
            ("EXECUTE \"Pr\"('SELECT 1')", "0A000"),
            (in_block("EXECUTE \"Pr\"('SELECT 1')"), "0A000"),
        ):
            if extended:
                wire.send(
                    Parse(b"", sql.encode(), ()).serialize()
                    + Bind(b"", b"", (), (), ()).serialize()
                    + Execute(b"", 0).serialize()
                    + Sync().serialize()
                )
                answer = wire.until_ready()
            else:
                answer = wire.query(sql)
            assert error_of(answer).sqlstate == sqlstate
        # Deallocated, and prepared again, it is the server's too.
        assert not errors_in(wire.query('DEALLOCATE "Pr"'))
        wire.send(parse)
        assert not errors_in(wire.until_ready())
        for sql in ("EXECUTE \"Pr\"('SELECT 1')", in_block("EXECUTE \"Pr\"('SELECT 1')")):
            assert not errors_in(wire.query(sql))
        wire.query("DROP EXTENSION pg_background")


def test_the_rows_of_a_job_are_not_fetched_by_sql(server: Server, proxy: Proxy) -> None:
    """With the extension too: the server would gather all of them before the first."""
    with (
        database(server, "portals") as dbname,
        Wire((proxy.host, proxy.port), database=dbname) as wire,
    ):
        wire.query("CREATE EXTENSION pg_background")
        for sql, sqlstate in (("FETCH po", "0A000"), (in_block("FETCH po"), "34000")):
            prepared(wire)
            assert error_of(wire.query(sql)).sqlstate == sqlstate
            wire.send(Close(b"S", b"Pr").serialize() + Sync().serialize())
            wire.until_ready()
            wire.query("ROLLBACK")
        wire.query("DROP EXTENSION pg_background")


def errors_in(answer: list[tuple[str, bytes]]) -> list[bytes]:
    return [body for kind, body in answer if kind == "E"]


def in_server(wire: Wire) -> int:
    """How many prepared statements the server has, whatever their names."""
    counted = in_block("SET a.n = 0").replace(
        "EXECUTE $sql$SET a.n = 0$sql$",
        "PERFORM set_config('a.n', count(*)::text, false) FROM pg_prepared_statements",
    )
    assert not errors_in(wire.query(counted))
    [row] = [body for kind, body in wire.query("SHOW a.n") if kind == "D"]
    return int(row[6:])


@pytest.mark.parametrize("how", ["Close", "DEALLOCATE", "DEALLOCATE in a block", "replaced"])
def test_no_stand_in_is_left_behind(proxy: Proxy, how: str) -> None:
    with Wire((proxy.host, proxy.port)) as wire:
        for number in range(20):
            name = b"" if how == "replaced" else b"s%d" % number
            wire.send(
                Parse(name, LAUNCH.encode(), ()).serialize()
                + Bind(b"", name, (), (None,), ()).serialize()
                + Execute(b"", 0).serialize()
                + Sync().serialize()
            )
            assert not errors_in(wire.until_ready())
            if how == "Close":
                wire.send(Close(b"S", name).serialize() + Sync().serialize())
                wire.until_ready()
            elif how == "DEALLOCATE":
                wire.query(f"DEALLOCATE {name.decode()}")
            elif how == "DEALLOCATE in a block":
                wire.query(in_block(f"DEALLOCATE {name.decode()}"))
        # A Bind or Describe of any of them has the proxy look again.
        wire.send(
            Parse(b"last", LAUNCH.encode(), ()).serialize()
            + Describe(b"S", b"last").serialize()
            + Sync().serialize()
        )
        assert not errors_in(wire.until_ready())
        assert in_server(wire) == 2


def test_psycopg_deallocates_by_sql(proxy: Proxy) -> None:
    with proxy.connect() as conn:
        conn.prepared_max = 2
        conn.prepare_threshold = 0
        for number in range(8):
            for _ in range(2):
                row = conn.execute(
                    f"SELECT pg_background_launch(%s), {number}".encode(), ["SELECT 1"]
                ).fetchone()
                assert row is not None
                assert row[1] == number
        shown = conn.execute("SELECT statement FROM pg_prepared_statements", prepare=False)
        texts = [text for (text,) in shown.fetchall()]
        assert max(texts) == "SELECT pg_background_launch($1), 7"
        assert len(texts) <= 2


async def test_asyncpg_with_the_extension(server: Server, proxy: Proxy) -> None:
    with database(server, "asyncpg_names") as dbname:
        conn = await asyncpg.connect(
            host=proxy.host, port=proxy.port, user="postgres", database=dbname
        )
        try:
            await conn.execute("CREATE EXTENSION pg_background")
            statement = await conn.prepare(LAUNCH)
            assert await statement.fetchval("SELECT 1") > 0
            [name] = await conn.fetchrow(
                "SELECT name FROM pg_prepared_statements WHERE statement = $1", LAUNCH
            )
            assert int((await conn.execute(f"EXECUTE {name}('SELECT 1')")).split()[-1]) == 1
            async with conn.transaction():
                each = "SELECT g, pg_background_launch('SELECT 1') FROM generate_series(1, $1) g"
                cursor = await conn.cursor(each, 7)
                found = await cursor.fetch(2)
                await cursor.forward(2)
                found += await cursor.fetch(9)
                assert [row[0] for row in found] == [1, 2, 5, 6, 7]
                async for row in conn.cursor(RESULT, prefetch=2):
                    found.append(row)
                assert [row[0] for row in found[-5:]] == [1, 2, 3, 4, 5]
            await conn.execute("DROP EXTENSION pg_background CASCADE")
        finally:
            await conn.close()
