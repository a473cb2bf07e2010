"""Values of a job's result under the types that the client declares, or asks for in binary."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
import pytest

from protocol import messages as m
from protocol.startup import CancelRequest
from tests.support.background import launch, message, run, wait_until
from tests.support.recorder import Frontend, S, b, d, e, errors, kinds, p, q, rows
from tests.support.servers import Connection, Proxy
from tests.support.wire import Monitor

pytestmark = pytest.mark.every_server


# A job's column, its type, and the type that is declared.
MODIFIED = [
    ("3.14159::numeric", "numeric(5,2)"),
    ("314159.5::numeric", "numeric(5,2)"),
    ("'NaN'::numeric", "numeric(5,2)"),
    ("NULL::numeric", "numeric(5,2)"),
    ("'{1.234,NULL,99.999}'::numeric[]", "numeric(4,1)[]"),
    ("'abcdef'::varchar", "varchar(3)"),
    ("'ab   '::varchar", "varchar(3)"),
    ("''::varchar", "varchar(3)"),
    ("'ä\"\\'::varchar", "varchar(3)"),
    ("E'\\t\\n'::varchar", "varchar(3)"),
    ("'{abcd}'::varchar[]", "character varying(3)[]"),
    ("'ab'::char(2)", "char(6)"),
    ("'ab'::char(2)", "char"),
    ("'a'::char(1)", "character"),
    ("'2024-01-01 12:34:56.789'::timestamp", "timestamp(0)"),
    ("'2024-01-01 12:34:56.789+02'::timestamptz", "timestamp(1) with time zone"),
    ("'12:34:56.789'::time", "time(2)"),
    ("'12:34:56.789+01'::timetz", "time(0) with time zone"),
    ("'1 year 2 mons 3.456 s'::interval", "interval year"),
    ("'1 year 2 mons 3.456 s'::interval", "interval(1)"),
    ("'1 day 02:03:04.5'::interval", "interval day to minute"),
    ("B'101'::varbit", "varbit(2)"),
    ("B'101'::varbit", "varbit(5)"),
    ("B'101'::bit(3)", "bit(4)"),
    ("B'1'::bit(1)", "bit"),
]


def outcome(conn: Connection, query: str, *, binary: bool) -> Any:
    """The description and the values as they came, or the error; the session lives on."""
    with conn.cursor(binary=binary) as cursor:
        try:
            found = cursor.execute(query, prepare=binary).pgresult
        except psycopg.Error as error:
            return message(error)
    assert conn.execute("SELECT 1").fetchone() == (1,)
    assert found is not None
    columns = range(found.nfields)
    return (
        [(found.fname(n), found.ftype(n), found.fmod(n), found.fformat(n)) for n in columns],
        [[found.get_value(row, n) for n in columns] for row in range(found.ntuples)],
    )


@pytest.mark.parametrize("binary", [False, True])
def test_a_value_has_the_modifier_that_is_declared(conn: Connection, binary: bool) -> None:
    if conn.info.server_version < 130000:
        pytest.skip("the server's own SQL functions do not apply modifiers")
    for expression, type in MODIFIED:
        conn.execute(
            "CREATE OR REPLACE FUNCTION as_declared() RETURNS SETOF record LANGUAGE sql"
            f" AS $$SELECT {expression}$$"
        )
        server = outcome(conn, f"SELECT * FROM as_declared() AS (v {type})", binary=binary)
        pid = launch(conn, f"SELECT {expression}")
        ours = outcome(
            conn, f"SELECT * FROM pg_background_result({pid}) AS (v {type})", binary=binary
        )
        assert ours == server, (expression, type)


def test_a_domain_is_not_its_base_type(conn: Connection) -> None:
    conn.execute("CREATE DOMAIN positive AS int CHECK (value > 0)")
    for value in (-5, 5):
        pid = launch(conn, f"SELECT {value}")
        query = f"SELECT * FROM pg_background_result({pid}) AS (v positive)"
        assert outcome(conn, query, binary=False)[0] == "42804"


def test_modifiers_hold_beside_json_and_for_columns_not_selected(conn: Connection) -> None:
    sql = """SELECT ' {"a" : "\\u00e9"} '::json, 'null'::jsonb, '"x"'::jsonb, 12.345::numeric"""
    types = "a json, b jsonb, c jsonb, d numeric(4,1)"
    pid = launch(conn, sql)
    rows = conn.execute(f"SELECT * FROM pg_background_result({pid}) AS ({types})")
    result = rows.pgresult
    assert result is not None
    assert [result.get_value(0, column) for column in range(4)] == [
        b' {"a" : "\\u00e9"} ',
        b"null",
        b'"x"',
        b"12.3",
    ]
    pid = launch(conn, "SELECT 1, 99999.5::numeric")
    query = f"SELECT a FROM pg_background_result({pid}) AS (a int, b numeric(4,1))"
    assert outcome(conn, query, binary=False)[0] == "22003"


UNCONVERTED = [
    "'b'::mood",
    "'{a,b}'::mood[]",
    "'(1,\"x y\")'::pair",
    "'[1,5)'::int4range",
    "'(1,2)'::point",
    "B'101'::bit(3)",
    "B'101'::varbit",
    "'fat cat'::tsvector",
    "'12.50'::money",
    "'a & b'::tsquery",
    "'pg_class'::regclass",
]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("in_block", [False, True])
def test_binary_of_any_type_is_the_servers(conn: Connection, listed: bool, in_block: bool) -> None:
    conn.execute("DROP TYPE IF EXISTS mood, pair")
    conn.execute("CREATE TYPE mood AS ENUM ('a', 'b')")
    conn.execute("CREATE TYPE pair AS (n int, t text)")
    if in_block:
        conn.execute("BEGIN")
    for expression in UNCONVERTED:
        pid = launch(conn, f"SELECT {expression} AS v, NULL::int AS n")
        type = expression.rpartition("::")[2]
        query = f"SELECT * FROM pg_background_result({pid})"
        if listed:
            query += f" AS (v {type}, n int)"
        with conn.cursor(binary=True) as cursor:
            ours = cursor.execute(query).pgresult
            server = cursor.execute(f"SELECT {expression} AS v, NULL::int AS n").pgresult
            assert ours is not None
            assert server is not None
            assert ours.get_value(0, 0) == server.get_value(0, 0), expression
            assert ours.ftype(0) == server.ftype(0)
            assert ours.get_value(0, 1) is None
    if in_block:
        conn.execute("COMMIT")


@pytest.mark.parametrize("columns", [832, 1600])
def test_as_many_columns_are_listed_as_the_server_allows(conn: Connection, columns: int) -> None:
    pid = launch(conn, "SELECT " + ", ".join(map(str, range(columns))))
    listed = ", ".join(f"c{n} int" for n in range(columns))
    query = f"SELECT * FROM pg_background_result({pid}) AS ({listed})"
    assert conn.execute(query).fetchall() == [tuple(range(columns))]


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("last", ["job", "value"])
def test_an_error_in_the_middle_of_converted_rows(
    conn: Connection, in_block: bool, last: str
) -> None:
    values = {"job": ("1/(n - 30000)", "22012"), "value": ("100 * n", "22003")}
    expression, sqlstate = values[last]
    value = f"CASE WHEN n < 30000 THEN 0.25 ELSE {expression} END"
    pid = launch(conn, f"SELECT {value} FROM generate_series(1, 30001) n")
    if in_block:
        conn.execute("BEGIN")
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(f"SELECT * FROM pg_background_result({pid}) AS (v numeric(4,1))")
    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.statement_position is None
    if in_block:
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
        conn.execute("ROLLBACK")
    assert run(conn, "SELECT 1.26", "v numeric(4,1)") == [(Decimal("1.3"),)]


def cancel(proxy: Proxy, client: Frontend) -> None:
    with Frontend(proxy, login=False) as other:
        other.send(CancelRequest(client.key.pid, client.key.secret_key))
        other.until_closed()


def check_cancel(proxy: Proxy, client: Frontend, *, in_block: bool) -> None:
    """A cancel request ends the statement, and nothing else."""
    cancel(proxy, client)
    answer = client.until_ready()
    [error] = errors(answer)
    assert error.sqlstate == "57014"
    assert answer[-1] == m.ReadyForQuery(b"E" if in_block else b"I")
    client.query("ROLLBACK")
    assert client.value("SELECT 1") == "1"


SLOW_AT_THE_END = (
    "SELECT 0.25 * n, CASE WHEN n > 20000 THEN pg_sleep(600) END::text"
    " FROM generate_series(1, 20001) n"
)


@pytest.mark.parametrize("in_block", [False, True])
def test_a_cancel_between_converted_rows(proxy: Proxy, monitor: Monitor, in_block: bool) -> None:
    with Frontend(proxy) as client:
        client.query("BEGIN" if in_block else "SELECT")
        [[pid]] = rows(client.query(f"SELECT pg_background_launch($${SLOW_AT_THE_END}$$)"))
        query = "SELECT * FROM pg_background_result($1) AS (n numeric(9,1), t text)"
        client.send(p(query, types=(23,)), b(parameters=(pid,)), e(), S)
        client.until_type(m.DataRow, count=1000)
        check_cancel(proxy, client, in_block=in_block)
    monitor.terminate(int(pid or b""))  # it has a handle, so it goes on


@pytest.mark.parametrize("in_block", [False, True])
def test_a_cancel_while_the_server_converts(
    conn: Connection, proxy: Proxy, monitor: Monitor, in_block: bool
) -> None:
    conn.execute("DROP DOMAIN IF EXISTS slow CASCADE")
    conn.execute("DROP TYPE IF EXISTS slow_pair")
    conn.execute(
        "CREATE DOMAIN slow AS int CHECK (current_setting('t.slow', true) IS DISTINCT FROM 'on'"
        " OR pg_sleep(600)::text IS NOT NULL)"
    )
    conn.execute("CREATE TYPE slow_pair AS (n slow)")
    with Frontend(proxy, database=conn.info.dbname) as client:
        job = "SELECT ROW(1)::slow_pair"
        [[pid]] = rows(client.query(f"SELECT pg_background_launch('{job}')"))
        client.query(f"SELECT pg_background_wait({int(pid or b'')})")
        client.query("SET t.slow = on")
        client.query("BEGIN" if in_block else "SELECT")
        query = "SELECT * FROM pg_background_result($1) AS (v slow_pair)"
        client.send(p(query, types=(23,)), b(parameters=(pid,), results=(1,)), e(), S)
        primary = client.key.pid
        wait_until(lambda: monitor.state(primary) == ("active", "PgSleep"))
        check_cancel(proxy, client, in_block=in_block)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("in_block", [False, True])
def test_the_server_waits_between_converted_rows(
    conn: Connection, prepare: bool, in_block: bool
) -> None:
    """In a wait the primary sleeps, to be seen: `session.visible_wait`."""
    job = (
        "SELECT 0.25, (CASE WHEN n % 8000 = 0 THEN pg_sleep(0.3) END)::text, repeat('x', 20)"
        " FROM generate_series(1, 20000) n"
    )
    pid = launch(conn, job)
    if in_block:
        conn.execute("BEGIN")
    query = "SELECT count(*), min(v) FROM unnest(%s::numeric[]) v"
    listed = "(v numeric(9,1), s text, x text)"
    fetched = conn.execute(
        f"SELECT * FROM pg_background_result(%s) AS {listed}", [pid], prepare=prepare
    ).fetchall()
    values = [row[0] for row in fetched]
    assert conn.execute(query, [values]).fetchone() == (20000, Decimal("0.3"))
    if in_block:
        conn.execute("COMMIT")


def test_converted_rows_of_a_portal_that_is_suspended(proxy: Proxy) -> None:
    with Frontend(proxy) as client:
        client.query("BEGIN")
        job = "SELECT n / 8.0 FROM generate_series(1, 20) n"
        [[pid]] = rows(client.query(f"SELECT pg_background_launch('{job}')"))
        query = "SELECT * FROM pg_background_result($1) AS (v numeric(9,1))"
        answer = client.ask(p(query, types=(23,)), b("", "c", (pid,)), e("c", 3), e("c", 4), S)
        assert kinds(answer) == "12DDDsDDDDsZ"
        answers = [answer, client.ask(e("c", 7), S), client.query("SAVEPOINT s")[:0]]
        answers.append(client.ask(e("c", 7), S))
        assert kinds(answers[-1]) == "DDDDDDCZ"
        [expected] = rows(
            client.query(
                "SELECT string_agg((n / 8.0)::numeric(9,1)::text, ' ' ORDER BY n)"
                " FROM generate_series(1, 20) n"
            )
        )
        values = [row[0] or b"" for answer in answers for row in rows(answer)]
        assert b" ".join(values) == expected[0]


@pytest.mark.parametrize("type", ["numeric", "numeric(9,1)"])
def test_a_cancel_reaches_a_portal_of_an_earlier_batch(
    proxy: Proxy, monitor: Monitor, type: str
) -> None:
    with Frontend(proxy) as client:
        client.query("BEGIN")
        [[pid]] = rows(client.query(f"SELECT pg_background_launch($${SLOW_AT_THE_END}$$)"))
        query = f"SELECT * FROM pg_background_result($1) AS (n {type}, t text)"
        client.ask(p(query, types=(23,)), b("", "c", (pid,)), e("c", 1), S)
        client.send(e("c"), S)
        client.until_type(m.DataRow, count=1000)
        cancel(proxy, client)
        [error] = errors(client.until_ready())
        assert error.sqlstate == "57014"
    monitor.terminate(int(pid or b""))


# --- what was described is what is sent ---


OTHER_COLUMNS = [
    "'x'::text AS n",
    "1 AS m",
    "1 AS n, 2 AS m",
    "1::int8 AS n",
    "1.5::numeric(4,1) AS n",
]


@pytest.mark.parametrize("in_block", [False, True])
def test_a_job_of_other_columns_than_were_described_is_refused(
    proxy: Proxy, in_block: bool
) -> None:
    with Frontend(proxy) as client:

        def launched(columns: str) -> bytes | None:
            [[pid]] = rows(client.query(f"SELECT pg_background_launch($$SELECT {columns}$$)"))
            return pid

        client.ask(p("SELECT * FROM pg_background_result($1)", "s", (23,)), S)
        # Nothing was described yet.
        assert kinds(client.ask(b("s", parameters=(launched("1.5"),)), e(), S)) == "2DCZ"
        answer = client.ask(b("s", parameters=(launched("1 AS n"),)), d(b"P"), e(), S)
        assert kinds(answer) == "2TDCZ"
        for columns in OTHER_COLUMNS:
            pid, same = launched(columns), launched("2 AS n")
            client.ask(*[q("BEGIN")] * in_block, *[q("SELECT")] * (not in_block))
            answer = client.ask(b("s", parameters=(same,)), e(), S)
            assert rows(answer) == [(b"2",)]
            answer = client.ask(b("s", parameters=(pid,)), e(), S)
            assert kinds(answer) == "2EZ"
            [error] = errors(answer)
            assert (error.sqlstate, error.message) == (
                "0A000",
                b"cached plan must not change result type",
            )
            assert answer[-1] == m.ReadyForQuery(b"E" if in_block else b"I")
            client.query("ROLLBACK")
        # A client that asks again is told.
        answer = client.ask(b("s", parameters=(launched("'x' AS t"),)), d(b"P"), e(), S)
        assert kinds(answer) == "2TDCZ"
        answer = client.ask(b("s", parameters=(launched("'y' AS t"),)), e(), S)
        assert rows(answer) == [(b"y",)]


def test_psycopg_is_told_of_each_jobs_columns(conn: Connection) -> None:
    for columns in ["1 AS n", *OTHER_COLUMNS]:
        pid = launch(conn, f"SELECT {columns}")
        cursor = conn.execute("SELECT * FROM pg_background_result(%s)", [pid], prepare=True)
        direct = conn.execute(f"SELECT {columns}")
        assert repr(cursor.description) == repr(direct.description)
        assert cursor.fetchall() == direct.fetchall()
