"""How drivers write a call: with a placeholder for its result, which is of type void, by name, by
position, in their own notations. The server's functions of the same names say what each gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from protocol import messages as m
from protocol.values import oids
from tests.support.recorder import Frontend, S, b, d, e, kinds, p, rows
from tests.support.servers import Proxy, Server, database

pytestmark = pytest.mark.every_server

NATIVE: Final = """
CREATE FUNCTION pg_background_launch(sql text, queue_size int4 DEFAULT 0) RETURNS int4
  LANGUAGE sql STRICT AS 'SELECT 4194303';
CREATE FUNCTION pg_background_detach(pid int4) RETURNS void LANGUAGE sql STRICT AS '';
CREATE FUNCTION pg_background_wait(pid int4, cookie int8) RETURNS void LANGUAGE sql STRICT AS '';
"""
V: Final = oids.VOID
SQL: Final = b"SELECT 1"

CALLS: Final[list[tuple[str, tuple[int, ...], tuple[bytes | None, ...]]]] = [
    # pgJDBC's {? = call pg_background_launch(?)}, {? = call pg_background_launch(?, ?)}.
    ("select * from pg_background_launch($1,$2)  as result", (V, oids.VARCHAR), (None, SQL)),
    ("select * from pg_background_launch($1,$2)  as result", (V, 0), (None, SQL)),
    ("select * from pg_background_launch($1,$2)  as result", (V,), (None, SQL)),
    (
        "select * from pg_background_launch($1,$2,$3)  as result",
        (V, 0, oids.INT4),
        (None, SQL, b"0"),
    ),
    ("select * from pg_background_launch($1,$2,$3)", (0, V, 0), (SQL, None, b"0")),
    ("select * from pg_background_launch($1,$2,$3)", (0, 0, V), (SQL, b"0", None)),
    ("select * from pg_background_launch($1,$2,$3)", (V, 0, V), (None, SQL, None)),
    ("SELECT pg_background_launch($1, $2)", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch($2, $1)", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch($1, 'SELECT 1')", (V,), (None,)),
    ("SELECT pg_background_launch($1, 'SELECT ' || $2)", (V, oids.TEXT), (None, b"1")),
    ("SELECT pg_background_launch($1, $2) AS a, $2", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch(($1), $2)", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch((($1)), ($2))", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch($1, sql => $2)", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_launch($1, queue_size := 0, sql := $2)", (V, oids.TEXT), (None, SQL)),
    ("SELECT pg_background_detach($1, $2)", (V, oids.INT4), (None, None)),
    ("SELECT pg_background_launch($1)", (V,), (None,)),
    ("SELECT pg_background_detach($1, $2, $3, $4)", (V, 0, 0, 0), (None, b"1", b"0", b"0")),
    ("SELECT pg_background_launch($1::text, $2)", (V, 0), (None, SQL)),
    ("SELECT pg_background_launch(sql => $1)", (V,), (None,)),
    ("SELECT pg_background_launch($1 || $2)", (V, 0), (None, SQL)),
    ("SELECT pg_background_launch($2, $1)", (0, V), (SQL, None)),
    ("SELECT pg_background_launch($2, $3)", (0, V), (SQL, None, b"0")),
    # psycopg2's callproc, Npgsql, psqlODBC.
    ("SELECT * FROM pg_background_launch($1)", (), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (oids.TEXT,), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (oids.VARCHAR,), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (705,), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (oids.BPCHAR,), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (oids.NAME,), (SQL,)),
    ("SELECT * FROM pg_background_launch($1)", (oids.INT4,), (b"1",)),
    ('SELECT * FROM "pg_background_launch"($1, $2)', (0, oids.INT2), (SQL, b"0")),
    ('SELECT * FROM "pg_background_launch"("sql" := $1)', (), (SQL,)),
    ('SELECT * FROM public."pg_background_launch"("sql" => $1, queue_size => $2)', (), (SQL, b"0")),
    ("SELECT * FROM PG_BACKGROUND_LAUNCH(queue_size => $2, sql => $1)", (), (SQL, b"0")),
    ("SELECT Pg_Background_Launch($1::varchar, CAST($2 AS int))", (), (SQL, b"0")),
    ("select pg_background_launch($1) as result", (oids.VARCHAR,), (SQL,)),
    ("select pg_background_launch($1, queue_size => $2)", (), (SQL, b"0")),
    ("SELECT pg_background_launch(sql => $1, $2)", (), (SQL, b"0")),
    ("SELECT pg_background_launch(text => $1)", (), (SQL,)),
    ("SELECT pg_background_detach($1, $2, $3)", (), (b"1", b"0", b"0")),
    ("SELECT pg_background_launch()", (), ()),
]


@pytest.fixture(scope="module")
def databases(server: Server, proxy: Proxy) -> Iterator[list[str]]:
    """One whose functions are the server's; then one without the extension, and one with it."""
    names = ["void_native", "void_ours", "void_extension"]
    with database(server, names[0]), database(server, names[1]), database(server, names[2]):
        with server.connect(dbname=names[0]) as conn:
            conn.execute(NATIVE)
        with proxy.connect(dbname=names[2]) as conn:
            conn.execute("CREATE EXTENSION pg_background")
        yield names


def outline(answer: list[m.BackendMessage]) -> object:
    """What is the same of two answers to a call: the columns, the number of rows, the SQLSTATE."""
    described: list[object] = []
    for message in answer:
        if isinstance(message, m.RowDescription):
            described.append([(f.name, f.type_oid) for f in message.fields])
        elif isinstance(message, m.ParameterDescription):
            described.append(message.types)
        elif isinstance(message, m.ErrorResponse):
            described.append(message.sqlstate)
    return kinds(answer), described


@pytest.mark.parametrize("place", [1, 2], ids=["alone", "with the extension"])
def test_a_call_is_taken_as_the_server_takes_it(
    server: Server, proxy: Proxy, databases: list[str], place: int
) -> None:
    different: list[object] = []
    with (
        Frontend(server, database=databases[0]) as direct,
        Frontend(proxy, database=databases[place]) as client,
    ):
        for sql, types, values in CALLS:
            script = (p(sql, "", types), d(b"S"), b("", "", values), d(b"P"), e(), S)
            expected, answer = outline(direct.ask(*script)), outline(client.ask(*script))
            if answer != expected:
                different.append((sql, types, answer, expected))
    assert not different


def test_what_is_launched_is_the_argument(proxy: Proxy, databases: list[str]) -> None:
    sql, types, _ = CALLS[0]
    with Frontend(proxy, database=databases[1]) as client:
        answer = client.ask(p(sql, "", types), b("", "", (None, b"SELECT 'it'")), e(), S)
        [[pid]] = rows(answer)
        assert pid is not None
        assert rows(client.query(f"SELECT * FROM pg_background_result({int(pid)})")) == [(b"it",)]
