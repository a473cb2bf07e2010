"""Results of composite types: with the extension they have the types' names, as the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest
from psycopg.types.composite import CompositeInfo, register_composite

from protocol import messages as m
from protocol.values import oids
from proxy.api.functions import BOOL, CATALOGS, HANDLES, INT4, INT8, TEXT, Function
from tests.support.recorder import Frontend, S, b, d, e, p
from tests.support.servers import Connection, Proxy, Server, database, psql

pytestmark = pytest.mark.every_server

HANDLE = "SELECT pg_background_launch_v2('SELECT 1') AS h"
NULLS = {TEXT: "NULL::text", INT4: "NULL::int4", INT8: "NULL::int8", BOOL: "NULL::bool"}


@pytest.fixture(scope="module", params=["1.10", "2.0"])
def extended(request: pytest.FixtureRequest, server: Server, proxy: Proxy) -> Iterator[str]:
    """A database with the extension in a schema of its own, which is in the search_path."""
    with database(server, f"composites_{request.param.replace('.', '_')}") as name:
        with proxy.connect(dbname=name) as conn:
            conn.execute("CREATE SCHEMA ext")
            version = request.param
            conn.execute(f"CREATE EXTENSION pg_background SCHEMA ext VERSION '{version}'".encode())
            conn.execute(f"ALTER DATABASE {name} SET search_path = public, ext".encode())
        yield name


@pytest.fixture
def extended_conn(proxy: Proxy, extended: str) -> Iterator[Connection]:
    with proxy.connect(dbname=extended) as conn:
        yield conn


def described(client: Frontend, sql: str) -> list[tuple[bytes, int]]:
    answer = client.ask(p(sql), d(b"S"), S)
    return [
        (field.name, field.type_oid)
        for message in answer
        if isinstance(message, m.RowDescription)
        for field in message.fields
    ]


def test_each_function_is_described_with_the_type_that_it_has(
    server: Server, proxy: Proxy, extended: str
) -> None:
    api = 2 if extended.endswith("2_0") else 1
    functions = [
        function
        for overloads in CATALOGS[api].values()
        for function in overloads
        if function.columns and not function.returns_set
    ]
    assert len(functions) > 10
    with server.connect(dbname=extended) as conn, Frontend(proxy, database=extended) as client:
        for function in functions:
            [[expected, relation]] = conn.execute(
                "SELECT prorettype::int8, typrelid::int8 FROM pg_proc JOIN pg_type t"
                " ON t.oid = prorettype WHERE proname = %s AND pronargs = %s",
                [function.name, len(function.parameters)],
            ).fetchall()
            call = _call(function)
            name = function.name.encode()
            if relation:
                assert expected != oids.RECORD, function.name
            assert described(client, f"SELECT {call}") == [(name, expected)], call
            assert described(client, f"SELECT x FROM (SELECT {call}) AS s(x)") == [(b"x", expected)]
            # The fields, and where one is composite itself its type.
            columns = conn.execute(
                "SELECT attname, atttypid::int8 FROM pg_attribute"
                " WHERE attrelid = %s AND attnum > 0 ORDER BY attnum",
                [relation],
            ).fetchall()
            fields = [(column.encode(), type) for column, type in columns]
            assert described(client, f"SELECT ({call}).*") == fields, call
            assert described(client, f"SELECT * FROM {call}") == fields, call


def _call(function: Function) -> str:
    arguments = (
        "NULL::ext.pg_background_handle[]" if parameter.type == HANDLES else NULLS[parameter.type]
        for parameter in function.parameters
    )
    return f"{function.name}({', '.join(arguments)})"


def test_psql_gdesc(proxy: Proxy, extended: str) -> None:
    shown = psql(proxy.port, "-At", input=f"{HANDLE} \\gdesc\n", dbname=extended)
    assert shown.stdout == "h|pg_background_handle\n"


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
def test_psycopg_registers_a_composite(extended_conn: Connection, binary: bool) -> None:
    info = CompositeInfo.fetch(extended_conn, "pg_background_handle")
    assert info is not None
    register_composite(info, extended_conn)
    cursor = extended_conn.cursor(binary=binary)
    [[handle]] = cursor.execute(HANDLE).fetchall()
    assert handle.pid > 0
    assert handle.cookie != 0
    query = f"SELECT pg_background_detach_v2({handle.pid}, {handle.cookie})"
    extended_conn.execute(query.encode())


def test_asyncpg_has_records(proxy: Proxy, extended: str) -> None:
    async def fetch() -> tuple[asyncpg.Record, ...]:
        conn = await asyncpg.connect(
            host=proxy.host, port=proxy.port, user="postgres", database=extended
        )
        try:
            handle = (await conn.fetchrow(HANDLE))["h"]
            run = (await conn.fetchrow("SELECT pg_background_run('SELECT 1') AS r"))["r"]
            return handle, run
        finally:
            await conn.close()

    handle, run = asyncio.run(fetch())
    assert handle["pid"] > 0
    assert run["has_error"] is False
    assert run["timed_out"] is False


def test_types_that_are_gone_since_they_were_described(
    server: Server, proxy: Proxy, db: str
) -> None:
    with (
        proxy.connect(dbname=db) as admin,
        proxy.connect(dbname=db) as conn,
        Frontend(proxy, database=db) as client,
    ):
        assert described(client, HANDLE) == [(b"h", oids.RECORD)]
        admin.execute("CREATE EXTENSION pg_background")
        [(_, first)] = described(client, HANDLE)
        assert first != oids.RECORD
        client.ask(p(HANDLE, "s"), S)
        conn.prepare_threshold = 0
        conn.execute(HANDLE)
        admin.execute("DROP EXTENSION pg_background")
        admin.execute("CREATE EXTENSION pg_background")
        answer = client.ask(b("s"), e(), S)
        [error] = [each for each in answer if isinstance(each, m.ErrorResponse)]
        assert (error.sqlstate, error.message) == (
            "0A000",
            b"cached plan must not change result type",
        )
        [(_, second)] = described(client, HANDLE)
        assert second not in (first, oids.RECORD)
        # In another schema it has the same types.
        admin.execute("CREATE SCHEMA ext; ALTER EXTENSION pg_background SET SCHEMA ext")
        client.query("SET search_path = ext")
        assert described(client, HANDLE) == [(b"h", second)]
        admin.execute("DROP EXTENSION pg_background")
        assert described(client, HANDLE) == [(b"h", oids.RECORD)]
