"""Python's drivers, direct and by the proxy: psycopg, asyncpg and SQLAlchemy see the same.

Invariant: an action gathers whatever the driver shows (values, types, notices, errors), and the two
lists are equal; then the same driver launches jobs through the proxy and fetches them.
"""

from __future__ import annotations

import asyncio
import datetime
import decimal
import ipaddress
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, Final, TypeVar

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from tests.support.background import fields
from tests.support.clients import DATABASE, TIMEOUT, Endpoint, same
from tests.support.servers import Connection, Proxy, Server, database

T = TypeVar("T")

TYPES: Final = """
    SELECT true, 1::int2, 2::int4, 3::int8, 1.5::float4, 'NaN'::float8, 12.340::numeric, 'a' AS t,
        'b'::varchar(3), 'c'::"char", '\\x00ff'::bytea, '2001-02-03'::date, '04:05:06.7'::time,
        '2001-02-03 04:05:06+00'::timestamptz, '2001-02-03 04:05:06'::timestamp, '1 day 2:00'::interval,
        'aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee'::uuid, '{"a": [1]}'::jsonb, '[1]'::json,
        '10.0.0.1'::inet, '10.0.0.0/8'::cidr, ARRAY[[1, 2], [3, NULL]], ARRAY['x', NULL, '{'],
        int4range(1, 5), ROW(1, 'x'), NULL::int, B'101'
"""  # noqa: E501


# --- psycopg -------------------------------------------------------------------------------------


def test_psycopg_values(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with endpoint.connect(dbname=DATABASE) as conn:
            for binary in (False, True):
                cursor = conn.execute(TYPES, binary=binary)
                seen.append(repr(cursor.fetchall()))
                seen.append(
                    [(c.name, c.type_code, c.internal_size) for c in cursor.description or ()]
                )
                for value in (
                    *(
                        None,
                        True,
                        1,
                        1 << 40,
                        1.5,
                        decimal.Decimal("1.50"),
                        "ä\U0001f418",
                        b"\0\xff",
                    ),
                    *([1, 2], [["a"], [None]], datetime.date(1, 1, 1), datetime.timedelta(1, 2, 3)),
                    *(
                        uuid.UUID(int=5),
                        ipaddress.ip_address("::1"),
                        Jsonb({"a": None}),
                        "x" * 100000,
                    ),
                ):
                    placeholder = "%b" if binary else "%t"
                    query = f"SELECT {placeholder}, pg_typeof({placeholder})::text"
                    try:
                        seen.append(conn.execute(query, [value] * 2, binary=binary).fetchone())
                    except psycopg.Error as error:
                        seen.append(fields(error.diag))
            seen.append(conn.execute("SELECT 1 AS a, 2 AS a").fetchone())
            cursor = conn.execute("SELECT 1; SELECT 'x' WHERE false; SET a.b = 'c'")
            more: bool | None = True
            while more:
                seen.append((cursor.statusmessage, cursor.rowcount))
                more = cursor.nextset()
            seen.append(conn.cursor(row_factory=dict_row).execute("SELECT 1 AS n").fetchall())
            seen.append(conn.info.parameter_status("server_version"))
        return seen

    same(server, proxy, act)


def test_psycopg_pipelines(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with endpoint.connect(dbname=DATABASE) as conn:
            conn.execute("CREATE TABLE t (a int PRIMARY KEY, b text)")
            with conn.pipeline() as pipeline, conn.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO t VALUES (%s, %s) RETURNING a",
                    [(i, "x" * i) for i in range(500)],
                    returning=True,
                )
                cursors = [conn.execute("SELECT %s::int", [i]) for i in range(50)]
                pipeline.sync()
                seen += [found.fetchall() for found in cursors]
                seen.append(cursor.fetchall())
            bad = None
            try:
                with conn.pipeline() as pipeline:
                    good = conn.execute("SELECT 'before'")
                    conn.execute("INSERT INTO t VALUES (1000), (1)")
                    bad = conn.execute("SELECT 'skipped'")
                    pipeline.sync()
                    after = conn.execute("SELECT 'after'")
                    seen.append(after.fetchall())
            except psycopg.Error as error:
                seen.append(fields(error.diag))
            seen.append((good.statusmessage, bad and bad.statusmessage))
            with conn.pipeline(), conn.transaction():
                conn.execute("DELETE FROM t WHERE a > 10")
                try:
                    with conn.transaction():
                        conn.execute("SELECT 1/0")
                        conn.pipeline()
                except psycopg.Error as error:
                    seen.append(error.sqlstate)
            seen.append(conn.execute("SELECT count(*), max(a) FROM t").fetchall())
        return seen

    seen = same(server, proxy, act)
    assert seen[-1] == [(11, 10)]


@pytest.mark.parametrize("format", ["TEXT", "BINARY"])
def test_psycopg_copies(server: Server, proxy: Proxy, format: str) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with endpoint.connect(dbname=DATABASE) as conn, conn.cursor() as cursor:
            cursor.execute("CREATE TABLE t (a int, b text, c timestamptz)")
            when = datetime.datetime(2001, 2, 3, tzinfo=datetime.UTC)
            with cursor.copy(f"COPY t FROM STDIN (FORMAT {format})") as copy:
                copy.set_types(["int4", "text", "timestamptz"])
                for i in range(20000):
                    copy.write_row(
                        (i, None if i % 7 == 0 else f"pg_background_launch({i})\t", when)
                    )
            seen.append(cursor.statusmessage)
            with cursor.copy(f"COPY t TO STDOUT (FORMAT {format})") as copy:
                seen.append(b"".join(bytes(block) for block in copy))
            with cursor.copy("COPY (SELECT * FROM t LIMIT %s) TO STDOUT", [5]) as copy:
                copy.set_types(["int4", "text", "timestamptz"])
                seen += copy.rows()
            try:
                with cursor.copy(f"COPY t FROM STDIN (FORMAT {format})") as copy:
                    copy.write(b"garbage\n" * 100000)
            except psycopg.Error as error:
                seen.append(fields(error.diag))
            # Given up by us: psycopg has the server fail with its CopyFail, and raises our error.
            try:
                with cursor.copy("COPY t FROM STDIN") as copy:
                    copy.write(b"1\tx\t\\N\n")
                    raise ZeroDivisionError
            except ZeroDivisionError:
                seen.append(conn.info.transaction_status)
            # Left in the middle by an error of ours: psycopg cancels what is still coming.
            try:
                with cursor.copy("COPY (SELECT repeat('x', 999) FROM t, t u) TO STDOUT") as copy:
                    seen.append(len(copy.read()))
                    raise ZeroDivisionError
            except ZeroDivisionError:
                seen.append(conn.info.transaction_status)
            seen.append(cursor.execute("SELECT count(*) FROM t").fetchone())
        return seen

    same(server, proxy, act)


def test_psycopg_server_cursors(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with endpoint.connect(dbname=DATABASE, autocommit=False) as conn:
            with conn.cursor("forward") as cursor:
                cursor.execute("SELECT i, 'x' FROM generate_series(1, %s) i", [1000])
                seen += [cursor.fetchone(), cursor.fetchmany(10), len(cursor.fetchall())]
            with conn.cursor("scrolls", scrollable=True, withhold=True, binary=True) as cursor:
                cursor.execute("SELECT generate_series(1, 100)")
                conn.commit()
                cursor.scroll(50)
                seen.append(cursor.fetchone())
                cursor.scroll(-1)
                seen.append(cursor.fetchone())
                cursor.itersize = 7
                seen.append(list(cursor))
            with conn.cursor() as plain:
                seen.append(list(plain.stream("SELECT generate_series(1, %s)", [300])))
                if psycopg.pq.version() >= 170000:
                    seen.append(list(plain.stream("SELECT generate_series(1, 300)", size=20)))
                with pytest.raises(psycopg.errors.DivisionByZero):
                    list(plain.stream("SELECT 1/(5 - i) FROM generate_series(1, 9) i"))
            conn.rollback()
            seen.append(conn.info.transaction_status)
        return seen

    same(server, proxy, act)


def test_psycopg_prepared_statements(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with endpoint.connect(dbname=DATABASE) as conn:
            conn.prepare_threshold = 2
            conn.prepared_max = 3
            conn.execute("CREATE TABLE t AS SELECT 1 AS a")
            seen += [
                conn.execute(f"SELECT {number}, %s::int", [turn]).fetchall()
                for turn in range(8)
                for number in range(5)
            ]
            seen += [conn.execute("SELECT * FROM t").fetchall() for _ in range(5)]
            conn.execute("ALTER TABLE t ADD b int")
            try:
                seen.append(conn.execute("SELECT * FROM t").fetchall())
            except psycopg.Error as error:
                seen.append(fields(error.diag))
            conn.execute("DEALLOCATE ALL")
            seen.append(conn.execute("SELECT %s", ["x"], prepare=True).fetchall())
            seen.append(conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchall())
        return seen

    same(server, proxy, act)


def test_psycopg_transactions_notices_and_notifies(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        with (
            endpoint.connect(dbname=DATABASE) as conn,
            endpoint.connect(dbname=DATABASE) as other,
        ):
            conn.add_notice_handler(lambda notice: seen.append(fields(notice)))
            conn.execute("DO $$ BEGIN RAISE NOTICE 'n' USING DETAIL = 'd'; END $$")
            conn.execute("LISTEN c")
            other.execute("NOTIFY c, 'one'")
            with other.transaction():
                other.execute("SELECT pg_notify('c', repeat('x', 7000))")
            received = conn.notifies(timeout=TIMEOUT, stop_after=2)
            seen += [(notify.channel, notify.payload) for notify in received]
            conn.execute("CREATE TABLE t (a int)")
            for commit in (True, False):
                xid = f"branch {commit}"
                with closing(endpoint.connect(dbname=DATABASE, autocommit=False)) as two_phase:
                    two_phase.tpc_begin(two_phase.xid(1, "global", xid))
                    two_phase.execute("INSERT INTO t VALUES (1)")
                    two_phase.tpc_prepare()
                    found = other.tpc_recover()
                    seen += [(item.gtrid, item.bqual, item.database) for item in found]
                    if commit:
                        two_phase.tpc_commit()
                if not commit:
                    other.tpc_rollback(found[0])
            seen.append(other.tpc_recover())
            with other.transaction():
                with other.transaction(force_rollback=True):
                    other.execute("INSERT INTO t VALUES (2)")
                seen.append(other.execute("TABLE t").fetchall())
        return seen

    assert same(server, proxy, act)[-2:] == [[], [(1,)]]


def test_psycopg_cancels(server: Server, proxy: Proxy) -> None:
    async def act(endpoint: Endpoint) -> list[Any]:
        async with await psycopg.AsyncConnection.connect(
            endpoint.dsn(dbname=DATABASE), autocommit=True
        ) as conn:
            sleeping = asyncio.create_task(conn.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0.2)
            await conn.cancel_safe(timeout=TIMEOUT)
            with pytest.raises(psycopg.errors.QueryCanceled) as caught:
                await sleeping
            # A cancelled task has psycopg cancel the statement too.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(conn.execute("SELECT pg_sleep(60)"), 0.2)
            cursor = await conn.execute("SELECT 'lives'")
            return [fields(caught.value.diag), await cursor.fetchall()]

    assert same(server, proxy, in_loop(act))[1] == [("lives",)]


def test_psycopg_launches_jobs(server: Server, proxy: Proxy) -> None:
    with database(server, DATABASE), proxy.connect(dbname=DATABASE) as conn:
        conn.prepare_threshold = 2
        for turn in range(8):
            binary = turn % 2 == 1
            assert fetch_job(conn, f"SELECT {turn} AS n, 'x' AS t", binary=binary) == [(turn, "x")]
        with conn.pipeline():
            launched = [
                conn.execute("SELECT pg_background_launch(%s)", [f"SELECT {i} AS n"])
                for i in range(5)
            ]
            pids = [cursor.fetchall()[0][0] for cursor in launched]
            results = [
                conn.execute("SELECT n FROM pg_background_result(%s) AS (n int)", [pid])
                for pid in reversed(pids)
            ]
            assert [cursor.fetchall() for cursor in results] == [[(i,)] for i in (4, 3, 2, 1, 0)]
        with conn.transaction():
            assert fetch_job(conn, "SELECT generate_series(1, 3) AS n") == [(1,), (2,), (3,)]
        job = "SELECT generate_series(1, 1000)"
        [(pid,)] = conn.execute("SELECT pg_background_launch(%s)", [job]).fetchall()
        query = "SELECT * FROM pg_background_result(%s) AS (n int)"
        assert sum(n for (n,) in conn.cursor().stream(query, [pid])) == 500500
        assert psycopg.ClientCursor(conn).execute(
            "SELECT * FROM pg_background_result(pg_background_launch(%s)) AS (t text)",
            ["SELECT 'client-side, it''s'::text"],
        ).fetchall() == [("client-side, it's",)]


def fetch_job(conn: Connection, job: str, *, binary: bool = False) -> list[Any]:
    [(pid,)] = conn.execute("SELECT pg_background_launch(%s)", [job], binary=binary).fetchall()
    query = "SELECT * FROM pg_background_result(%s)"
    return conn.execute(query, [pid], binary=binary).fetchall()


# --- asyncpg -------------------------------------------------------------------------------------


def in_loop(
    action: Callable[[Endpoint], Awaitable[T]],
) -> Callable[[Endpoint], T]:
    """The action with an event loop of its own, and a limit."""

    async def bounded(endpoint: Endpoint) -> T:
        return await asyncio.wait_for(action(endpoint), TIMEOUT)

    return lambda endpoint: asyncio.run(bounded(endpoint))


def connect(endpoint: Endpoint, **options: Any) -> Any:
    return asyncpg.connect(
        host=endpoint.host, port=endpoint.port, user="postgres", database=DATABASE, timeout=10,
        ssl=False, **options,
    )  # fmt: skip


def failed(error: asyncpg.PostgresError) -> dict[str, Any]:
    """All that asyncpg knows of an error."""
    return error.as_dict()  # type: ignore[no-any-return]


def test_asyncpg_types(server: Server, proxy: Proxy) -> None:
    async def act(endpoint: Endpoint) -> list[Any]:
        conn = await connect(endpoint, server_settings={"application_name": "clients"})
        try:
            seen: list[Any] = [repr(await conn.fetchrow(TYPES))]
            await conn.execute(
                "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (a int, b mood);"
                "CREATE DOMAIN positive AS int CHECK (VALUE > 0);"
                "CREATE TABLE t (m mood, p pair[], d positive, j jsonb)"
            )
            await conn.set_type_codec(
                "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
            )
            await conn.executemany(
                "INSERT INTO t VALUES ($1, $2, $3, $4)",
                [("glad", [(i, "sad"), None], i, {"n": i}) for i in range(1, 200)],
            )
            seen.append(repr(await conn.fetch("SELECT * FROM t ORDER BY d")))
            for query, args in (
                ("INSERT INTO t (d) VALUES ($1)", (-1,)),
                ("SELECT $1::int", (1 << 40,)),
                ("SELECT $1::mood", ("angry",)),
                ("SELECT none", ()),
                ("SELECT 1; SELECT 2", ()),
            ):
                try:
                    seen.append(await conn.fetch(query, *args))
                except asyncpg.PostgresError as error:
                    seen.append(failed(error))
                except asyncpg.DataError as error:
                    seen.append(str(error))
            seen.append(await conn.fetchval("SHOW application_name"))
            seen.append(str(conn.get_server_version()))
            return seen
        finally:
            await conn.close()

    same(server, proxy, in_loop(act))


def test_asyncpg_listeners_cursors_and_copies(server: Server, proxy: Proxy) -> None:
    async def act(endpoint: Endpoint) -> list[Any]:
        conn, other = await connect(endpoint), await connect(endpoint)
        seen: list[Any] = []
        try:
            heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
            await conn.add_listener(
                "c", lambda _c, _p, channel, text: heard.put_nowait((channel, text))
            )
            conn.add_log_listener(lambda _, message: seen.append(failed(message)))
            await other.execute("NOTIFY c, 'one'")
            async with other.transaction():
                await other.execute("SELECT pg_notify('c', $1)", "two")
            seen += [await heard.get(), await heard.get()]
            await conn.execute("DO $$ BEGIN RAISE WARNING 'w'; END $$")
            await conn.execute("CREATE TABLE t (a int, b text)")
            records = [(i, f"x{i}" if i % 3 else None) for i in range(20000)]
            seen.append(await conn.copy_records_to_table("t", records=records))
            copied = bytearray()

            async def take(data: bytes) -> None:
                copied.extend(data)

            seen.append(
                await conn.copy_from_query(
                    "SELECT * FROM t WHERE a < $1", 1000, output=take, format="csv"
                )
            )
            seen.append(bytes(copied))
            async with conn.transaction():
                cursor = await conn.cursor("SELECT a FROM t ORDER BY a")
                seen += [await cursor.fetch(3), await cursor.forward(10), await cursor.fetchrow()]
                seen.append([r async for r in conn.cursor("SELECT $1 + 1", 1, prefetch=5)])
                total = 0
                async for record in conn.cursor("SELECT a FROM t", prefetch=100):
                    total += record["a"]
                seen.append(total)
                with pytest.raises(asyncpg.DivisionByZeroError):
                    async with conn.transaction():
                        await conn.execute("SELECT 1/0")
            statement = await conn.prepare("SELECT * FROM t WHERE a = $1")
            seen += [await statement.fetch(5), str(statement.get_attributes())]
            seen.append(await conn.fetch("SELECT * FROM t WHERE a = 1"))
            await other.execute("ALTER TABLE t ADD c int")
            seen.append(await conn.fetch("SELECT * FROM t WHERE a = 1"))
            try:
                await conn.fetch("SELECT pg_sleep(60)", timeout=0.2)
            except TimeoutError:
                seen.append("timed out")
            seen.append(await conn.fetchval("SELECT 'lives'"))
            await conn.reset()
        finally:
            await conn.close()
            await other.close()
        return seen

    seen = same(server, proxy, in_loop(act))
    assert "timed out" in seen


def test_asyncpg_pool(server: Server, proxy: Proxy) -> None:
    async def act(endpoint: Endpoint) -> list[Any]:
        async with asyncpg.create_pool(
            host=endpoint.host, port=endpoint.port, user="postgres", database=DATABASE, ssl=False,
            min_size=2, max_size=4, max_queries=5,
        ) as pool:  # fmt: skip

            async def work(number: int) -> Any:
                async with pool.acquire(timeout=TIMEOUT) as conn, conn.transaction():
                    await conn.execute("SET search_path = pg_catalog")
                    return await conn.fetchval("SELECT $1::int * 2", number)

            values = await asyncio.gather(*(work(number) for number in range(60)))
            return [*values, await pool.fetchval("SHOW search_path")]

    same(server, proxy, in_loop(act))


def test_asyncpg_launches_jobs(server: Server, proxy: Proxy) -> None:
    async def act(endpoint: Endpoint) -> None:
        conn = await connect(endpoint)
        try:
            for turn in range(8):
                pid = await conn.fetchval("SELECT pg_background_launch($1)", f"SELECT {turn} AS n")
                query = "SELECT * FROM pg_background_result($1) AS (n int)"
                assert await conn.fetchval(query, pid) == turn
            launch = await conn.prepare("SELECT pg_background_launch($1, $2)")
            pids = [await launch.fetchval(f"SELECT '{i}'::text", 65536) for i in range(5)]
            for number, pid in enumerate(pids):
                rows = await conn.fetch(f"SELECT * FROM pg_background_result({pid}) AS (t text)")
                assert rows[0]["t"] == str(number)
            pid = await conn.fetchval("SELECT pg_background_launch('SELECT pg_sleep(60)')")
            query = "SELECT * FROM pg_background_result($1) AS (t text)"
            with pytest.raises(TimeoutError):
                await conn.fetch(query, pid, timeout=0.3)
            assert await conn.fetchval("SELECT pg_terminate_backend($1)", pid)
            async with conn.transaction():
                pid = await conn.fetchval("SELECT pg_background_launch('SELECT 1/0')")
                with pytest.raises(asyncpg.DivisionByZeroError):
                    async with conn.transaction():
                        await conn.fetch(query, pid)
                assert await conn.fetchval("SELECT 'lives'") == "lives"
        finally:
            await conn.close()

    with database(server, DATABASE):
        in_loop(act)(proxy)


# --- SQLAlchemy ----------------------------------------------------------------------------------


def engine(endpoint: Endpoint, driver: str = "psycopg", **options: Any) -> sa.Engine:
    url = sa.URL.create(
        f"postgresql+{driver}",
        username="postgres",
        host=endpoint.host,
        port=endpoint.port,
        database=DATABASE,
    )
    return sa.create_engine(url, **options)


def tables() -> sa.MetaData:
    metadata = sa.MetaData()
    sa.Table(
        "people",
        metadata,
        sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
        sa.Column("name", sa.String(50), nullable=False, unique=True, comment="as it is said"),
        sa.Column("mood", sa.Enum("sad", "glad", name="mood"), server_default="glad"),
        sa.Column("data", sa.JSON),
        sa.Column("tags", sa.ARRAY(sa.Text)),
        sa.Column("paid", sa.Numeric(10, 2), sa.CheckConstraint("paid >= 0", name="not_negative")),
    )
    sa.Table(
        "orders",
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("person", sa.ForeignKey("people.id", ondelete="CASCADE"), index=True),
    )
    return metadata


def test_sqlalchemy_reflects_and_inserts(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        metadata = tables()
        people = metadata.tables["people"]
        db = engine(endpoint)
        try:
            metadata.create_all(db)
            metadata.create_all(db)
            with db.begin() as conn:
                rows = [
                    {"name": f"n{i}", "data": {"i": i}, "tags": ["a", None]} for i in range(2500)
                ]
                inserted = conn.execute(people.insert().returning(people.c.id), rows)
                seen.append(sorted(inserted.scalars()))
                conn.execute(
                    people.update().where(people.c.id < 10), {"paid": decimal.Decimal("1.5")}
                )
            inspector = sa.inspect(db)
            for table in inspector.get_table_names():
                seen += [
                    table,
                    [{**c, "type": repr(c["type"])} for c in inspector.get_columns(table)],
                    inspector.get_pk_constraint(table),
                    inspector.get_foreign_keys(table),
                    inspector.get_indexes(table),
                    inspector.get_unique_constraints(table),
                    inspector.get_check_constraints(table),
                    inspector.get_table_comment(table),
                ]
            reflected = sa.MetaData()
            reflected.reflect(db)
            seen.append(
                sorted(re.sub(r" at 0x\w+", "", repr(t)) for t in reflected.tables.values())
            )
            with db.connect() as conn:
                streamed = conn.execution_options(stream_results=True, max_row_buffer=100)
                found = streamed.execute(sa.select(people).order_by(people.c.id))
                seen.append([tuple(row) for row in found])
            metadata.drop_all(db)
            seen.append(sa.inspect(db).get_table_names())
        finally:
            db.dispose()
        return seen

    same(server, proxy, act)


def test_sqlalchemy_transactions_and_pool(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        seen: list[Any] = []
        db = engine(endpoint, pool_size=2, max_overflow=1, pool_pre_ping=True)
        t = sa.Table("t", sa.MetaData(), sa.Column("a", sa.Integer, primary_key=True))
        try:
            t.create(db)
            with db.connect() as conn:
                with conn.begin():
                    conn.execute(t.insert(), [{"a": i} for i in range(3)])
                    with pytest.raises(sa.exc.IntegrityError) as caught, conn.begin_nested():
                        conn.execute(t.insert(), {"a": 1})
                    assert isinstance(caught.value.orig, psycopg.Error)
                    seen.append(fields(caught.value.orig.diag))
                    conn.execute(t.insert(), {"a": 9})
                conn.execute(t.delete())
                conn.rollback()
                seen.append(list(conn.execute(sa.select(sa.func.count()).select_from(t)).scalars()))
            with db.connect().execution_options(isolation_level="SERIALIZABLE") as conn:
                seen.append(conn.scalar(sa.text("SHOW transaction_isolation")))
            with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
                conn.execute(sa.text("VACUUM t"))
                seen.append(conn.scalar(sa.text("SHOW transaction_isolation")))
            with db.connect() as conn:
                two_phase = conn.begin_twophase("xid")
                conn.execute(t.insert(), {"a": 100})
                two_phase.prepare()
                two_phase.commit()
            held = [db.connect() for _ in range(3)]
            pids = {conn.scalar(sa.text("SELECT pg_backend_pid()")) for conn in held}
            for conn in held:
                conn.close()
            with db.connect() as conn:
                seen += [len(pids), conn.scalar(sa.text("SELECT pg_backend_pid()")) in pids]
            # A backend that ended while it was in the pool is replaced.
            with server.connect() as killer:
                killer.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [DATABASE],
                )
            with db.connect() as conn:
                seen.append(conn.scalar(sa.select(sa.func.max(t.c.a))))
        finally:
            db.dispose()
        return seen

    assert same(server, proxy, act)[-1] == 100


def test_sqlalchemy_launches_jobs(server: Server, proxy: Proxy) -> None:
    with database(server, DATABASE):
        db = engine(proxy)
        try:
            for turn in range(8):
                with db.begin() as conn:
                    job = f"SELECT {turn} AS n, 'x'::text AS t"
                    pid = conn.scalar(sa.select(sa.func.pg_background_launch(job)))
                    query = sa.text("SELECT * FROM pg_background_result(:pid) AS (n int, t text)")
                    found = conn.execute(query, {"pid": pid})
                    assert [tuple(row) for row in found] == [(turn, "x")]
                    pid = conn.scalar(sa.select(sa.func.pg_background_launch(job)))
                    values = sa.func.pg_background_result(pid).table_valued(
                        sa.column("n", sa.Integer), sa.column("t", sa.Text)
                    )
                    listed = conn.execute(sa.select(values.render_derived(with_types=True)))
                    assert [tuple(row) for row in listed] == [(turn, "x")]
        finally:
            db.dispose()


def test_sql_of_psycopg_composes(server: Server, proxy: Proxy) -> None:
    def act(endpoint: Endpoint) -> list[Any]:
        with endpoint.connect(dbname=DATABASE) as conn:
            name = 'pg_background_launch("x")'
            conn.execute(sql.SQL("CREATE TABLE {} (a int)").format(sql.Identifier(name)))
            query = sql.SQL("SELECT {}, * FROM {}")
            found = conn.execute(query.format(sql.Literal(name), sql.Identifier(name)))
            return [found.fetchall(), [column.name for column in found.description or ()]]

    same(server, proxy, act)
