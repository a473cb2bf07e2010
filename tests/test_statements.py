"""Statements: what is served and what is not, and that a stand-in does what the call would do.

For the latter the test database has real functions of our names. Each statement runs there as it
is; then its stand-in runs, the calls are made here from what it returned, and both must give the
same columns, rows and errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import pq

from proxy.functions import FUNCTIONS, INT4, REQUIRED, TEXT
from proxy.statements import (
    Call,
    Output,
    Plan,
    ResultPlan,
    ScalarPlan,
    analyze,
    complaint,
    mentions,
)
from tests.servers import Connection, Server, database


def plan(sql: str) -> Plan | None:
    return analyze(sql.encode())


def scalar(sql: str) -> ScalarPlan:
    found = plan(sql)
    assert isinstance(found, ScalarPlan)
    return found


def result(sql: str) -> ResultPlan:
    found = plan(sql)
    assert isinstance(found, ResultPlan)
    return found


# --- what is served -------------------------------------------------------------------------

SERVED = [
    "SELECT pg_background_launch('SELECT 1')",
    "SELECT pg_background_launch('a'), pg_background_launch('b', 100) AS b;",
    "select all PG_Background_Launch('a') pid",
    "SELECT(pg_background_launch('a'))FROM t",
    'SELECT "pg_background_launch"(\'a\')AS"p"FROM t',
    "SELECT((pg_background_launch('a')))x, i, t.* FROM t",
    "SELECT *, pg_background_launch(q) FROM t",
    "SELECT (t.*), pg_background_launch(q) FROM t",
    "SELECT t.* AS x, pg_background_launch(q), 1 FROM t",
    "SELECT (t).*, pg_background_launch(q) FROM t WHERE i > 1",
    "SELECT count(*), pg_background_launch('a') FROM t",
    "SELECT pg_background_launch(string_agg(q, '; ')) FROM t",
    "SELECT pg_background_launch(unnest(ARRAY['a', NULL, 'ccc'])), generate_series(1, 2)",
    "SELECT pg_background_launch(NULL), pg_background_launch('a', NULL)",
    "SELECT public.pg_background_launch('a')",
    "SELECT pg_background_launch(sql => 'a', queue_size => 7)",
    "SELECT pg_background_launch(queue_size := 7, sql := 'a')",
    "SELECT pg_background_launch('a', queue_size => 7)",
    "SELECT pg_background_launch($$a'b$$, (SELECT max(i) FROM t)) -- ends so",
    "SELECT pg_background_launch(E'a\\'b' -- (\n, /* ) */ 7 -- here\n) -- there\n AS x",
    "SELECT pg_background_launch('a'\n'b')",
    "SELECT pg_background_launch(q::varchar(3), i::smallint) FROM t LIMIT 2",
    "SELECT pg_background_launch(CASE WHEN i > 1 THEN 'a' ELSE 'bb' END) FROM t ORDER BY i DESC",
    "SELECT i, pg_background_launch(q) AS p FROM t ORDER BY 1 DESC, q",
    "SELECT i, pg_background_launch(q) AS p FROM t ORDER BY i + 1, lower(q) NULLS FIRST LIMIT 1",
    "SELECT i, pg_background_launch(q) AS a FROM t ORDER BY lower(q), (SELECT i) LIMIT (2)",
    "SELECT i, pg_background_launch(q) FROM t FETCH FIRST ROW ONLY",
    "SELECT pg_background_launch(format('VACUUM %I', relname)) FROM pg_class"
    " WHERE relname ~~ 'pg_a%' AND relkind = 'r' ORDER BY relname",
    "SELECT pg_background_launch(a.q) FROM t a JOIN t b USING (i), LATERAL (SELECT 1) c(x)"
    " WHERE b.i IN (1, 2) AND EXISTS (SELECT 1)",
    "WITH x(a) AS (SELECT 'a'::text) SELECT pg_background_launch(a) FROM x",
    "WITH x AS (INSERT INTO t VALUES (9, 'nine') RETURNING q)"
    " SELECT pg_background_launch(q) FROM x",
    "SELECT pg_background_launch('a') WHERE false",
    "SELECT pg_background_detach(1)",
    "SELECT pg_background_detach(pg_background_launch('a'))",
    "SELECT pg_background_detach((pg_background_launch(sql => q))) d FROM t",
    "SELECT pg_background_launch('a', queue_size => pg_background_launch('b', 5))",
    "SELECT grant_pg_background_privileges('r')",
    "SELECT grant_pg_background_privileges('r', true) AS g",
    "SELECT revoke_pg_background_privileges('r', print_commands => i > 1) FROM t",
    "SELECT * FROM pg_background_launch('a')",
    "SELECT * FROM pg_background_launch('a') AS pid",
    "SELECT pid AS p FROM pg_background_launch('a') pid;",
    "SELECT t.pid FROM pg_background_launch('a') AS t(pid)",
    "SELECT pg_background_launch FROM public.pg_background_launch('a', 7)",
    "SELECT * FROM pg_background_detach(pg_background_launch('a'))",
    "SELECT * FROM grant_pg_background_privileges('r', true) AS ok",
    "SELECT * FROM pg_background_result(1) AS (a int, b text, c numeric(5,1))",
    "SELECT*FROM pg_background_result(1)AS(a int,b text,c numeric(5,1))",
    "SELECT * FROM pg_background_result(1) AS t(a int, b text, c numeric(5,1));",
    "SELECT t.* FROM pg_background_result(1) t(a int, b text, c numeric(5,1))",
    "SELECT b AS x, t.a, c y FROM pg_background_result(1) t(a int, b text, c numeric(5,1)) -- x",
    'SELECT "B b", *, t."a" FROM pg_background_result(1) "t"(a int, "B b" text, c numeric(5,1))',
    "SELECT pg_background_result.b FROM pg_background_result(1) AS (a int, b text, c numeric(5,1))",
    "SELECT a FROM pg_background_result(pg_background_launch('a'))"
    " AS t(a int, b text, c numeric(5,1))",
    "SELECT b FROM pg_background_result(pid => (SELECT 1)) AS t(a int, b text, c numeric(5,1))",
]


@pytest.mark.parametrize("sql", SERVED)
def test_served(sql: str) -> None:
    assert plan(sql) is not None


@pytest.mark.parametrize(
    "sql",
    [
        # Mentions that are no call.
        "SELECT 'pg_background_launch(1)'",
        "SELECT 1 -- pg_background_launch('a')",
        "SELECT pg_background_launch FROM t",
        "SELECT \"pg_background_launch('a')\"",
        "SELECT * FROM pg_background_launch",
        "SELECT $$pg_background_launch('a')$$",
        "SELECT pg_background_other('a')",
        "SELECT \"PG_BACKGROUND_LAUNCH\"('a')",
        "SELECT 1 FROM t pg_background_launch(a, b)",
        "WITH pg_background_launch(a) AS (SELECT 1) SELECT a FROM pg_background_launch",
        "CREATE FUNCTION pg_background_launch(a text) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION pg_background_launch(text, int)",
        "GRANT EXECUTE ON FUNCTION pg_background_launch(text, int) TO alice",
        # Calls where they are not served.
        "SELECT pg_background_launch('a') + 1",
        "SELECT 1 + pg_background_launch('a')",
        "SELECT - pg_background_launch('a')",
        "SELECT @@@ pg_background_launch('a')",
        "SELECT pg_background_launch('a')::text",
        "SELECT CAST(pg_background_launch('a') AS text)",
        "SELECT pg_background_launch('a') IS NULL",
        "SELECT pg_background_launch('a') ISNULL",
        "SELECT pg_background_launch('a') NOTNULL",
        "SELECT pg_background_launch('a') IN (1, 2)",
        "SELECT pg_background_launch('a') BETWEEN 1 AND 2",
        "SELECT pg_background_launch('a') COLLATE \"C\"",
        "SELECT pg_background_launch('a') AT TIME ZONE 'UTC'",
        "SELECT pg_background_launch('a') OPERATOR(pg_catalog.+) 1",
        "SELECT pg_background_launch('a') OVER ()",
        "SELECT pg_background_launch('a') FILTER (WHERE true)",
        "SELECT pg_background_launch('a') !",
        "SELECT (pg_background_launch('a')).*",
        "SELECT ARRAY[pg_background_launch('a')]",
        "SELECT (pg_background_launch('a'), 1)",
        "SELECT max(pg_background_launch(q)) FROM t",
        "SELECT coalesce(1, pg_background_launch('a'), 2)",
        "SELECT CASE WHEN true THEN pg_background_launch('a') END",
        "SELECT CASE pg_background_launch('a') WHEN 1 THEN 2 END",
        "SELECT (SELECT pg_background_launch('a'))",
        "SELECT 1 WHERE pg_background_launch('a') > 0",
        "SELECT 1 FROM t ORDER BY pg_background_launch(q)",
        "SELECT 1 LIMIT pg_background_launch('a')",
        "SELECT 1 FROM (SELECT pg_background_launch('a')) x",
        "SELECT pg_background_launch('a') FROM (SELECT pg_background_launch('a')) x",
        "WITH x AS (SELECT pg_background_launch('a')) SELECT * FROM x",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT pg_background_launch('a')",
        "SELECT DISTINCT pg_background_launch('a')",
        "SELECT DISTINCT ON (i) pg_background_launch('a'), i FROM t",
        "SELECT pg_background_launch('a') FROM t GROUP BY i",
        "SELECT pg_background_launch('a') HAVING true",
        "SELECT pg_background_launch('a'), sum(i) OVER w FROM t WINDOW w AS ()",
        "SELECT pg_background_launch('a') UNION ALL SELECT 1",
        "SELECT 1 UNION SELECT pg_background_launch('a')",
        "(SELECT pg_background_launch('a'))",
        "SELECT pg_background_launch('a') INTO x",
        "SELECT pg_background_launch('a') FROM t FOR UPDATE",
        "SELECT pg_background_launch('a') FROM t OFFSET 1",
        "SELECT pg_background_launch('a') FROM t LIMIT 1 OFFSET 1",
        "SELECT pg_background_launch('a') LIMIT 1, 2",
        "SELECT *, pg_background_launch('a'), * FROM t",
        "SELECT (t.*), pg_background_launch('a'), t.* FROM t",
        "VALUES (pg_background_launch('a'))",
        "EXPLAIN SELECT pg_background_launch('a')",
        "PREPARE x AS SELECT pg_background_launch('a')",
        "DECLARE c CURSOR FOR SELECT pg_background_launch('a')",
        "CREATE TABLE x AS SELECT pg_background_launch('a')",
        "CREATE VIEW x AS SELECT pg_background_launch('a')",
        "INSERT INTO t SELECT pg_background_launch('a')",
        "COPY (SELECT pg_background_launch('a')) TO STDOUT",
        "DO 'BEGIN PERFORM pg_background_launch(''a''); END'",
        "CALL pg_background_launch('a')",
        "DELETE FROM t USING pg_background_launch('a')",
        "SELECT extract(year FROM pg_background_launch('a'))",
        "SELECT 1 IS DISTINCT FROM pg_background_launch('a')",
        "SELECT pg_background_launch('a'); SELECT 1",
        # A sort by the call.
        "SELECT pg_background_launch(q) FROM t ORDER BY 1",
        "SELECT pg_background_launch(q) FROM t ORDER BY (1)",
        "SELECT pg_background_launch(q) FROM t ORDER BY 01",
        "SELECT *, pg_background_launch(q) FROM t ORDER BY 3",
        "SELECT pg_background_launch(q) AS p FROM t ORDER BY p",
        'SELECT pg_background_launch(q) AS p FROM t ORDER BY i, ("p") DESC',
        "SELECT pg_background_launch(q) FROM t ORDER BY pg_background_launch",
        "SELECT pg_background_launch(q) AS é FROM t ORDER BY É",
        f"SELECT pg_background_launch(q) AS {'p' * 63} FROM t ORDER BY {'p' * 70}",
        'SELECT pg_background_launch(q) AS p FROM t ORDER BY U&"p"',
        # Arguments.
        "SELECT pg_background_launch()",
        "SELECT pg_background_launch('a', 1, 2)",
        "SELECT pg_background_launch('a', nosuch => 1)",
        "SELECT pg_background_launch('a', sql => 'b')",
        "SELECT pg_background_launch(sql => 'b', sql => 'b')",
        "SELECT pg_background_launch(queue_size => 1)",
        "SELECT pg_background_launch(sql => 'a', 1)",
        "SELECT pg_background_launch(sql => )",
        "SELECT pg_background_launch('a', )",
        "SELECT pg_background_launch(*)",
        "SELECT pg_background_launch(DISTINCT 'a')",
        "SELECT pg_background_launch(ALL 'a')",
        "SELECT pg_background_launch(VARIADIC ARRAY['a'])",
        "SELECT pg_background_launch('a' ORDER BY 1)",
        "SELECT pg_background_launch('a'",
        "SELECT pg_background_launch('a'])",
        "SELECT pg_background_launch('a' || pg_background_launch('b'))",
        "SELECT pg_background_launch(pg_background_launch('b'))",
        "SELECT pg_background_detach(pg_background_launch('a', pg_background_launch('b')))",
        "SELECT pg_background_detach(pg_background_result(1))",
        "SELECT pg_background_launch('a)",
        # FROM.
        "SELECT * FROM pg_background_launch('a'), t",
        "SELECT * FROM t, pg_background_launch(q)",
        "SELECT * FROM t JOIN LATERAL pg_background_launch(q) ON true",
        "SELECT * FROM ROWS FROM (pg_background_launch('a'))",
        "SELECT * FROM pg_background_launch('a') WITH ORDINALITY",
        "SELECT * FROM pg_background_launch('a') AS t(a, b)",
        "SELECT * FROM pg_background_launch('a') AS t(a int)",
        "SELECT * FROM pg_background_launch('a') AS (pid)",
        "SELECT * FROM pg_background_launch('a') (pid)",
        "SELECT t FROM pg_background_launch('a') AS t(pid)",
        "SELECT pid, pid FROM pg_background_launch('a') AS pid",
        "SELECT 1 FROM pg_background_launch('a')",
        "SELECT FROM pg_background_launch('a')",
        "SELECT * FROM (pg_background_launch('a'))",
        "SELECT * FROM ONLY pg_background_launch('a')",
        "SELECT * FROM pg_background_result(1) AS t(a int) WHERE a > 1",
        "SELECT * FROM pg_background_result(1) AS t(a int) ORDER BY a",
        "SELECT * FROM pg_background_result(1) AS t(a int) LIMIT 1",
        "SELECT * FROM pg_background_result(1) AS t(a int), t",
        "SELECT * FROM pg_background_result(1) AS t(a int) JOIN t u ON true",
        "SELECT * FROM pg_background_result(1) WHERE (a isnull)",
        "SELECT * FROM pg_background_result(1) LIMIT 1",
        "SELECT * FROM pg_background_result(1) UNION SELECT * FROM pg_background_result(2)",
        "SELECT * FROM pg_background_result(1) AS t(a, b)",
        "SELECT * FROM pg_background_result(1) AS t(a int, b)",
        "SELECT * FROM pg_background_result(1) AS t()",
        "SELECT * FROM pg_background_result(1) AS",
        "SELECT * FROM pg_background_result(1) (a int)",
        "SELECT a + 1 FROM pg_background_result(1) AS t(a int)",
        "SELECT count(*) FROM pg_background_result(1) AS t(a int)",
        "SELECT DISTINCT a FROM pg_background_result(1) AS t(a int)",
        "SELECT t FROM pg_background_result(1) AS t(a int)",
        "SELECT t.row_to_json FROM pg_background_result(1) AS t(a int)",
        "SELECT u.a FROM pg_background_result(1) AS t(a int)",
        "SELECT u.a FROM pg_background_result(1) t",
        "SELECT current_user FROM pg_background_result(1) AS t(a int)",
        "SELECT a 'x' FROM pg_background_result(1) AS t(a int)",
        "SELECT t.* AS x FROM pg_background_result(1) AS t(a int)",
        "SELECT a isnull FROM pg_background_result(1) AS t(a int)",
        'SELECT U&"a" FROM pg_background_result(1) AS t(a int)',
        "SELECT a FROM pg_background_result(1) AS t(a int, pg_background_arguments int)",
        "SELECT INTO x * FROM pg_background_result(1) AS t(a int)",
        # pg_background_result as an item.
        "SELECT pg_background_result(1), 2",
        "SELECT pg_background_result(1) FROM t",
        "SELECT pg_background_result(1) WHERE true",
        "SELECT pg_background_result(1) LIMIT 1",
        "SELECT pg_background_result(1) isnull",
        "SELECT pg_background_result(1) AS 'x'",
        "SELECT pg_background_result(1) AS",
        "SELECT DISTINCT pg_background_result(1)",
        "SELECT (pg_background_result(1)).*",
        "SELECT pg_background_result(1), pg_background_result(2)",
    ],
)
def test_not_served(sql: str) -> None:
    assert plan(sql) is None


def test_mentions() -> None:
    assert mentions(b'select "PG_Background_launch"')
    assert mentions(b"GRANT_PG_BACKGROUND_PRIVILEGES")
    assert not mentions(b"pg_backgroun d pg-background")


# --- the plan -------------------------------------------------------------------------------


def test_calls_and_their_arguments() -> None:
    found = scalar(
        "SELECT i, pg_background_detach(pid => pg_background_launch(queue_size := 5, sql := 'a')),"
        " grant_pg_background_privileges(user_name => 'r') FROM t"
    )
    detach, grant = found.columns
    assert (detach.index, grant.index) == (1, 2)
    [argument] = detach.call.arguments
    assert (argument.parameter.name, argument.name) == ("pid", "pid")
    assert isinstance(argument.value, Call)
    inner = [(a.parameter.name, a.value) for a in argument.value.arguments]
    assert inner == [("queue_size", 0), ("sql", 1)]
    assert [(a.parameter.name, a.name) for a in grant.call.arguments] == [
        ("role_name", "user_name")
    ]
    assert [leaf[0].function.name for leaf in detach.call.leaves()] == ["pg_background_launch"] * 2


def test_columns_behind_a_star_count_from_the_end() -> None:
    def indices(sql: str) -> list[int]:
        return [column.index for column in scalar(sql).columns]

    assert indices("SELECT pg_background_launch('a'), * FROM t") == [0]
    assert indices("SELECT *, pg_background_launch('a'), 1 FROM t") == [-2]
    assert indices("SELECT 1, (t.*), pg_background_launch('a') FROM t") == [-1]


def test_outputs() -> None:
    defined = result("SELECT b, *, t.a AS x FROM pg_background_result(1) AS t(a int, b text)")
    assert defined.outputs == (Output(1), Output(None), Output(0, b"x"))
    assert defined.defined_columns == 2
    named = result('SELECT a, t."B c" AS x, t.* FROM pg_background_result(1) t')
    assert named.outputs == (Output(b"a"), Output(b"B c", b"x"), Output(None))
    assert named.defined_columns == 0
    assert result("SELECT * FROM pg_background_result($1)").outputs == (Output(None),)
    assert result("SELECT pg_background_result(1)").outputs == (Output(None),)
    assert result("SELECT pg_background_result(1) AS Xy").outputs == (Output(None, b"xy"),)


def test_shape_is_read_once_and_only_so_far() -> None:
    """Statements of one shape differ in constants; neither their size nor nesting matters."""
    for number in range(3):
        found = scalar(f"SELECT {number}, pg_background_launch('{number}', {number}) FROM t")
        assert f"'{number}'".encode() in found.rewrite.sql
    started = time.monotonic()
    for deep in (
        "ARRAY[",
        "decimal(",
        "((",
        "enum(struct(",
        "CASE WHEN ",
        "(SELECT ",
        "- ",
        "NOT ",
    ):
        plan(f"SELECT pg_background_launch('a'), {deep * 300}")
        plan(f"SELECT pg_background_launch('a') FROM t WHERE {deep * 300}")
    plan(f"SELECT {'(' * 5000}pg_background_launch('a'){')' * 5000}")
    plan(f"SELECT {'pg_background_launch(' * 5000}'a'{')' * 5000}")
    plan(f"SELECT {'pg_background_launch(7), ' * 5000}")
    assert time.monotonic() - started < 10


def test_encodings_with_ascii_second_bytes() -> None:
    so = "ソ".encode("shift_jis")
    sql = b"SELECT pg_background_launch('" + so + b"') AS " + so + b" FROM t ORDER BY i"
    found = analyze(sql, encoding="SJIS", standard_conforming_strings=False)
    assert found is not None
    assert b"textcat('" + so + b"', '')" in found.rewrite.sql
    assert analyze(sql, standard_conforming_strings=False) is None


def test_positions_map_back() -> None:
    sql = "SELECT 'é', pg_background_launch(nosuch) FROM t WHERE nothing"
    rewrite = scalar(sql).rewrite
    text = rewrite.sql.decode()
    for word, original in (
        ("'é'", "'é'"),
        ("pg_catalog.textcat", "pg_background_launch"),
        ("nosuch", "nosuch"),
        ("FROM", "FROM"),
        ("nothing", "nothing"),
    ):
        position = rewrite.original_position(text.index(word) + 1, "utf-8")
        assert position == sql.index(original) + 1
    assert rewrite.original_position(len(text) + 1, "utf-8") == len(sql) + 1


def test_complaints_name_the_users_call() -> None:
    found = scalar(
        "SELECT pg_background_launch(1), pg_background_launch(sql => 'a', queue_size => 'b')"
    )
    complain = b"function pg_catalog.%s does not exist"
    assert (
        complaint(found, complain % b"textcat(integer, unknown)")
        == b"function pg_background_launch(integer) does not exist"
    )
    assert (
        complaint(found, b'Funktion pg_catalog.int4up("a)b") existiert nicht')
        == b'Funktion pg_background_launch(sql => text, queue_size => "a)b") existiert nicht'
    )
    second = found.rewrite.sql.rindex(b"pg_catalog.textcat") + 1
    assert (
        complaint(found, complain % b"textcat(date, unknown)", second)
        == b"function pg_background_launch(sql => date, queue_size => integer) does not exist"
    )
    assert complaint(found, b"function f(integer) does not exist") is None


# --- nothing raises -------------------------------------------------------------------------

SOUP = st.lists(
    st.sampled_from(
        [
            *("pg_background_launch", "pg_background_launch(", "pg_background_result(1)", "("),
            *("pg_background_detach(", '"pg_background_launch"(', ")", "[", "]", ",", ".", "*"),
            *("SELECT", "FROM", "WHERE", "ORDER BY", "LIMIT", "AS", "t", "a int", "WITH", "'s'"),
            *('"q"', "1", "$1", "=>", "::", ":=", ";", 'U&"x"', "é", "- ", "--\n", "/*", "'"),
            *("UNION", "VALUES", "CASE WHEN", "END", "INTO", "ALL", "ARRAY", "{", "$$", "OVER"),
            *("pivot", "unpivot", "lateral", "match_recognize", "qualify", "interval", "for"),
        ]
    ),
    max_size=16,
).map(" ".join)


@settings(max_examples=3000, deadline=None)
@given(SOUP, st.booleans())
@example("SELECT pg_background_launch(", True)
def test_never_raises(soup: str, conforming: bool) -> None:
    for prefix in ("", "SELECT pg_background_launch('x') , ", "SELECT * FROM pg_background_result"):
        found = analyze((prefix + soup).encode(), standard_conforming_strings=conforming)
        if found is not None:
            assert b"pg_background" in found.rewrite.sql


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=40))
def test_never_raises_on_bytes(data: bytes) -> None:
    mentions(data)
    for encoding in (None, "SJIS", "GB18030", "BIG5", "JOHAB"):
        analyze(b"SELECT pg_background_launch('x') " + data, encoding=encoding)
        analyze(data + b" pg_background_launch('x')", encoding=encoding)


# --- against the server ---------------------------------------------------------------------

# Functions of our names that say what they were called with.
STUBS = """
    CREATE TABLE t (i int, q text);
    INSERT INTO t VALUES (1, 'one'), (3, 'three'), (2, NULL);
    CREATE FUNCTION pg_background_launch(sql text, queue_size int DEFAULT 0) RETURNS int
        STRICT VOLATILE LANGUAGE plpgsql AS 'BEGIN RETURN 1000 * length(sql) + queue_size; END';
    CREATE FUNCTION pg_background_result(pid int) RETURNS SETOF record STRICT LANGUAGE plpgsql AS
        'BEGIN RETURN QUERY SELECT pid, ''b''::text, 2.5::numeric(5,1); END';
    CREATE FUNCTION pg_background_detach(pid int) RETURNS void STRICT VOLATILE
        LANGUAGE plpgsql AS 'BEGIN END';
    CREATE FUNCTION grant_pg_background_privileges(role_name text, print_commands bool = false)
        RETURNS bool VOLATILE LANGUAGE plpgsql AS 'BEGIN RETURN print_commands; END';
    CREATE FUNCTION revoke_pg_background_privileges(role_name text, print_commands bool = false)
        RETURNS bool VOLATILE LANGUAGE plpgsql AS 'BEGIN RETURN print_commands; END';
"""

Value = bytes | None


def call(conn: Connection, made: Call, leaves: list[Value]) -> Value:
    """What the stubs do."""
    values: dict[str, Value] = {}
    for argument in made.arguments:
        if isinstance(argument.value, Call):
            values[argument.parameter.name] = call(conn, argument.value, leaves)
        else:
            values[argument.parameter.name] = leaves[argument.value]
    name = made.function.name
    if made.function.strict and None in values.values():
        return None
    if name == "pg_background_launch":
        length = len((values["sql"] or b"").decode())
        return str(1000 * length + int(values.get("queue_size") or b"0")).encode()
    if name == "pg_background_detach":
        return b""
    if name == "pg_background_result":
        return values["pid"]
    printed = values.get("print_commands", b"false")
    return printed and printed[:1]


@dataclass
class Outcome:
    """Columns (name and type) and rows, or an error: SQLSTATE, message, position."""

    columns: list[tuple[bytes | None, int]]
    rows: list[list[Value]]
    error: tuple[bytes, bytes, int | None] | None

    @classmethod
    def of(cls, conn: Connection, sql: bytes) -> Outcome:
        """Runs ``sql`` in a transaction that is rolled back."""
        conn.pgconn.exec_(b"BEGIN")
        found = conn.pgconn.exec_(sql)
        conn.pgconn.exec_(b"ROLLBACK")
        error = None
        if found.status == pq.ExecStatus.FATAL_ERROR:
            field = pq.DiagnosticField
            position = found.error_field(field.STATEMENT_POSITION)
            error = (
                found.error_field(field.SQLSTATE) or b"",
                found.error_field(field.MESSAGE_PRIMARY) or b"",
                int(position) if position else None,
            )
        return cls(
            [(found.fname(at), found.ftype(at)) for at in range(found.nfields)],
            [
                [found.get_value(row, at) for at in range(found.nfields)]
                for row in range(found.ntuples)
            ],
            error,
        )


def served(conn: Connection, plan: Plan) -> Outcome:
    """What a session makes of a plan."""
    outcome = Outcome.of(conn, plan.rewrite.sql)
    if outcome.error is not None:
        state, message, position = outcome.error
        message = complaint(plan, message, position) or message
        if position is not None:
            position = plan.rewrite.original_position(position, "utf-8")
        outcome.error = (state, message, position)
    elif isinstance(plan, ScalarPlan):
        for column in plan.columns:
            name, type_oid = outcome.columns[column.index]
            assert type_oid == TEXT.oid
            outcome.columns[column.index] = (name, column.call.function.result_type.oid)
            for row in outcome.rows:
                row[column.index] = call(conn, column.call, leaves(conn, row[column.index]))
    else:
        assert plan.defined_columns
        [row] = outcome.rows
        assert outcome.columns[-1] == (b"pg_background_arguments", TEXT.oid)
        assert row[:-1] == [None] * (len(row) - 1)
        pid = call(conn, plan.call, leaves(conn, row[-1]))
        job: list[Value] = [pid, b"b", b"2.5"]
        outcome.rows = []
        if pid is not None:
            outcome.rows = [[]]
            for output in plan.outputs:
                assert not isinstance(output.column, bytes)
                outcome.rows[0] += job if output.column is None else [job[output.column]]
        del outcome.columns[-plan.defined_columns - 1 :]
    return outcome


def leaves(conn: Connection, text: Value) -> list[Value]:
    assert text is not None
    rows = conn.execute("SELECT unnest(%s::text[])", [text.decode()]).fetchall()
    return [None if value is None else value.encode() for (value,) in rows]


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    with database(server, "statements") as name, server.connect(dbname=name) as conn:
        conn.execute(STUBS)
        yield conn


@pytest.mark.parametrize("sql", SERVED)
def test_a_stand_in_does_what_the_call_would_do(connection: Connection, sql: str) -> None:
    found = plan(sql)
    assert found is not None
    outcome = served(connection, found)
    assert outcome.error is None
    assert outcome == Outcome.of(connection, sql.encode())


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_background_launch(1)",
        "SELECT 'é', pg_background_launch(now()), 1",
        "SELECT pg_background_launch('a', 'x')",
        "SELECT pg_background_launch('a'::text, 1.5)",
        "SELECT pg_background_launch('a'::text, 5000000000)",
        "SELECT pg_background_launch('a', sql) FROM t",
        "SELECT pg_background_launch('a'), pg_background_launch(sql => 1)",
        "SELECT pg_background_launch(t) FROM t",
        "SELECT pg_background_launch(t.*) FROM t",
        "SELECT pg_background_launch(ROW(1, 2))",
        "SELECT pg_background_launch('a', (SELECT i FROM t))",
        "SELECT pg_background_launch((SELECT 1, 2))",
        "SELECT pg_background_launch(nosuch) FROM t",
        "SELECT pg_background_launch(nosuch(1))",
        "SELECT pg_background_launch('a') FROM nosuch",
        "SELECT pg_background_launch(q), count(*) FROM t",
        "SELECT pg_background_launch('a', 1 / 0)",
        "SELECT pg_background_launch('a' AS b)",
        "SELECT pg_background_launch('a') year",
        "SELECT pg_background_launch('a') FROM t ORDER BY 5",
        "SELECT i, pg_background_launch('a') FROM t u, t",
        "SELECT pg_background_detach('x')",
        "SELECT pg_background_detach(pg_background_launch(1))",
        "SELECT grant_pg_background_privileges('a', 'x')",
        "SELECT grant_pg_background_privileges('a'::text, 1)",
        "SELECT * FROM pg_background_launch(string_agg('a', 'b'))",
        "SELECT * FROM pg_background_launch(nosuch)",
        "SELECT * FROM pg_background_launch('a'::text, 1.5) AS x",
        "SELECT * FROM pg_background_result('a') AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1.5) AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(max(1)) AS t(a int, b text, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1) AS t(a int, b nosuch, c numeric(5,1))",
        "SELECT * FROM pg_background_result(1) AS t(a int, a text, a numeric(5,1))",
        "SELECT a FROM pg_background_result(1) AS t(a int, b SETOF text)",
    ],
)
def test_errors_are_as_they_would_be(connection: Connection, sql: str) -> None:
    found = plan(sql)
    assert found is not None
    outcome = served(connection, found)
    assert outcome.error is not None
    assert outcome.error == Outcome.of(connection, sql.encode()).error


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a FROM pg_background_result(a) AS t(a int)",
        "SELECT * FROM pg_background_result(t.a) AS t(a int)",
        "SELECT * FROM pg_background_result(generate_series(1, 3)) AS t(a int, b text, c numeric)",
        "SELECT * FROM pg_background_result(generate_series(1, 3))",
        "SELECT pg_background_result(generate_series(1, 3))",
        "SELECT pg_background_result(max(1))",
        "SELECT * FROM pg_background_launch(unnest(ARRAY['a', 'b'])) x",
    ],
)
def test_what_the_server_refuses_stays_refused(connection: Connection, sql: str) -> None:
    """By its own words, which may differ in what they say of functions in FROM."""
    found = plan(sql)
    assert found is not None
    assert Outcome.of(connection, sql.encode()).error is not None
    assert served(connection, found).error is not None


@pytest.mark.parametrize(
    ("sql", "types"),
    [
        ("SELECT pg_background_launch($1)", [TEXT]),
        ("SELECT pg_background_launch($1, $2) FROM t", [TEXT, INT4]),
        ("SELECT pg_background_launch(queue_size => $1, sql => $2)", [INT4, TEXT]),
        ("SELECT * FROM pg_background_launch($1)", [TEXT]),
        ("SELECT pg_background_result($1)", [INT4]),
        ("SELECT * FROM pg_background_result($1)", [INT4]),
        ("SELECT a FROM pg_background_result($1) AS t(a int)", [INT4]),
        ("SELECT pg_background_detach($1)", [INT4]),
    ],
)
def test_parameters_get_the_types_of_the_call(
    connection: Connection, sql: str, types: list[object]
) -> None:
    found = plan(sql)
    assert found is not None
    prepared = connection.pgconn.prepare(b"", found.rewrite.sql)
    assert prepared.status == pq.ExecStatus.COMMAND_OK, prepared.error_message
    described = connection.pgconn.describe_prepared(b"")
    oids = {TEXT.oid: TEXT, INT4.oid: INT4}
    assert [oids[described.param_type(at)] for at in range(described.nparams)] == types


def test_search_path_does_not_matter(connection: Connection) -> None:
    found = scalar("SELECT pg_background_launch('a', 7)")
    connection.execute("CREATE SCHEMA evil")
    connection.execute(
        "CREATE FUNCTION evil.textcat(text, text) RETURNS text LANGUAGE sql AS 'SELECT ''evil'''"
    )
    connection.execute("CREATE TYPE evil.text AS ENUM ('evil')")
    connection.execute("SET search_path = evil, pg_catalog")
    try:
        assert Outcome.of(connection, found.rewrite.sql).rows == [[b"{a,7}"]]
    finally:
        connection.execute("RESET search_path")
        connection.execute("DROP SCHEMA evil CASCADE")


ARGUMENT = st.sampled_from(
    [
        *("'a'", "q", "NULL", "$$b$$", "u.q || 'x'", "(SELECT 'ccc')", "sql => 'a'", "i", "nosuch"),
        *("'a', i", "'a', 5", "'a', queue_size => i", "q -- ',\n", "string_agg(q, '')"),
        "unnest(ARRAY[q, 'z'])",
    ]
)
CALL = ARGUMENT.map(lambda argument: f"pg_background_launch({argument})") | ARGUMENT.map(
    lambda argument: f"(pg_background_detach(pg_background_launch({argument})))"
)
LABEL = st.sampled_from(
    ["", "", " AS p", " p", ' AS "P q"', " isnull", " AS select", " day", "/**/x", " AS i", " + 1"]
)
FREE = st.sampled_from(
    [
        *("i", "*", "u.*", "(u.*)", "(u).*", "1 = i", "count(*)", "'s'", "- i", "q q", "E'\\''"),
        *("CASE WHEN i = 1 THEN q END", "i IS DISTINCT FROM 2", "ARRAY[i]", "i IN (1, 2)"),
        *("i::numeric(9, 2)", "(SELECT q LIMIT 1)", "extract(year FROM now()) > 1", "u.i AS order"),
        *("generate_series(1, 2)", "row_number() OVER (ORDER BY i)", 'q COLLATE "C"', "u"),
        *("CAST(i AS decimal(5))", "U&'x' UESCAPE '!'", "(i, q)", "(i)", "i p", "(u.*) IS NULL"),
    ]
)
ITEM = st.tuples(CALL, LABEL).map("".join) | FREE
REST = st.sampled_from(
    [
        *("", " FROM t u", " FROM t u WHERE i > 1", " WHERE false", " FROM t u LIMIT 0"),
        *(" FROM t u ORDER BY i", " FROM t u ORDER BY 1, i", " FROM t u ORDER BY p, 2"),
        *(" FROM t u ORDER BY (2)", " FROM t u ORDER BY ((p)), i", " FROM t u ORDER BY i LIMIT 1"),
        " FROM ONLY t u, t v ORDER BY u.i, v.i",
        " FROM (SELECT * FROM t) u ORDER BY i DESC FETCH FIRST 2 ROWS ONLY",
        " FROM t u LEFT JOIN t v USING (i, q) ORDER BY i",
        " FROM t AS u(i, q) ORDER BY q NULLS FIRST",
        *(
            " FROM t u OFFSET 1",
            " FROM t u FOR UPDATE",
            " FROM t u GROUP BY i, q",
            " UNION SELECT 1",
        ),
    ]
)


@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ITEM, min_size=1, max_size=4), REST)
@example(["u.*", "pg_background_launch(q)"], " FROM t u ORDER BY 1")
def test_any_select_gives_what_it_would_give(
    connection: Connection, items: list[str], rest: str
) -> None:
    sql = "SELECT " + ", ".join(items) + rest
    found = plan(sql)
    if found is None:
        return
    outcome = served(connection, found)
    native = Outcome.of(connection, sql.encode())
    assert outcome == native


# --- the table ------------------------------------------------------------------------------


def test_the_table_of_functions() -> None:
    launch, result_ = FUNCTIONS["pg_background_launch"][0], FUNCTIONS["pg_background_result"][0]
    assert [p.default for p in launch.parameters] == [REQUIRED, 0]
    assert launch.strict
    assert result_.returns_set
    for name, overloads in FUNCTIONS.items():
        assert all(function.name == name for function in overloads)
        signatures = {tuple(p.type for p in function.parameters) for function in overloads}
        assert len(signatures) == len(overloads)
