"""pg_background_result: its shapes, the job's notices and error, and who may have it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.support.background import (
    cancel_sleep,
    failure,
    fields,
    job_failure,
    launch,
    message,
    notices,
    result,
    run,
    value,
    wait_until_ended,
)
from tests.support.servers import Connection, Proxy, psql

pytestmark = pytest.mark.every_server

JOB = "SELECT n AS a, 'text ' || n AS b, NULL::int AS c FROM generate_series(1, 3) n"
ROWS = [(1, "text 1", None), (2, "text 2", None), (3, "text 3", None)]
ROWTYPE = "remote query result rowtype does not match the specified FROM clause rowtype"
NO_RESULT_SET = (
    "remote query did not return a result set, but result rowtype is not a single text column"
)


def names(cursor: psycopg.Cursor[Any]) -> list[str]:
    assert cursor.description is not None
    return [column.name for column in cursor.description]


# --- shapes ---


@pytest.mark.parametrize("mode", ["simple", "binary", "prepared"])
@pytest.mark.parametrize(
    ("query", "columns", "rows"),
    [
        ("SELECT * FROM {} AS (a int, b text, c int)", ["a", "b", "c"], ROWS),
        ("SELECT * FROM {} AS (x int, y text, z int)", ["x", "y", "z"], ROWS),
        ("SELECT * FROM {} AS t (a int, b text, c int)", ["a", "b", "c"], ROWS),
        ("SELECT t.* FROM {} t (a int, b text, c int);", ["a", "b", "c"], ROWS),
        (
            'SELECT "T".b, "Ä b" FROM {} AS "T" ("Ä b" int, b text, c integer)',
            ["b", "Ä b"],
            [(b, a) for a, b, _ in ROWS],
        ),
        ("SELECT b FROM {} AS (a int, b text, c int)", ["b"], [(b,) for _, b, _ in ROWS]),
        (
            "SELECT c, b AS other, a leading_one, b FROM {} AS (a int4, b text, c int)",
            ["c", "other", "leading_one", "b"],
            [(c, b, a, b) for a, b, c in ROWS],
        ),
        (
            "SELECT *, a AS again FROM {} AS (a int, b text, c int)",
            ["a", "b", "c", "again"],
            [(*row, row[0]) for row in ROWS],
        ),
        ("SELECT * FROM {}", ["a", "b", "c"], ROWS),
        ("SELECT * FROM {} AS r", ["a", "b", "c"], ROWS),
        ("SELECT r.* FROM {} r", ["a", "b", "c"], ROWS),
        ("SELECT b, r.a AS n FROM {} r", ["b", "n"], [(b, a) for a, b, _ in ROWS]),
        ("SELECT {}", ["a", "b", "c"], ROWS),
        ("SELECT {} AS ignored", ["a", "b", "c"], ROWS),
        ("-- first\nselect /* here */ {} ;", ["a", "b", "c"], ROWS),
    ],
)
def test_result_has_the_shape_that_was_asked_for(
    conn: Connection, mode: str, query: str, columns: list[str], rows: list[Any]
) -> None:
    for call in (
        f"pg_background_result({launch(conn, JOB)})",
        f"pg_background_result(pid => {launch(conn, JOB)})",
        f"PUBLIC.pg_background_result('{launch(conn, JOB)}')",
        "pg_background_result(pg_background_launch($job$" + JOB + "$job$))",
    ):
        cursor = conn.cursor(binary=mode == "binary")
        cursor.execute(query.format(call), prepare=mode == "prepared" or None)
        assert names(cursor) == columns
        assert cursor.fetchall() == rows
        assert cursor.statusmessage == f"SELECT {len(rows)}"


def test_one_column_takes_the_label(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1 AS one")
    assert names(conn.execute(f"SELECT pg_background_result({pid}) AS n")) == ["n"]
    pid = launch(conn, "VACUUM pg_am")
    assert names(conn.execute(f"SELECT pg_background_result({pid})")) == ["result"]


def test_result_through_parameters_again_and_again(conn: Connection) -> None:
    query = "SELECT b, a FROM pg_background_result(%s) AS (a int, b text)"
    for number in range(12):  # psycopg prepares it by itself after five
        pid = launch(conn, f"SELECT {number}, 'x'")
        cursor = conn.execute(query, [pid], binary=bool(number % 2))
        assert cursor.fetchall() == [("x", number)]


def test_null_pid_gives_no_rows(conn: Connection) -> None:
    for query in (
        "SELECT * FROM pg_background_result(NULL) AS (n int)",
        "SELECT pg_background_result(NULL)",
        "SELECT * FROM pg_background_result(NULL)",
        "SELECT * FROM pg_background_result(pg_background_launch(NULL)) AS (n int)",
    ):
        for prepare in (None, True):
            assert conn.execute(query, prepare=prepare).fetchall() == []


def test_server_side_cursor_of_the_driver_is_refused(conn: Connection) -> None:
    """DECLARE CURSOR is a place where a call cannot be served."""
    pid = launch(conn, "SELECT 1")
    with (
        conn.transaction(force_rollback=True),
        conn.cursor("named") as cursor,
        pytest.raises(psycopg.errors.FeatureNotSupported),
    ):
        cursor.execute("SELECT * FROM pg_background_result(%s) AS (n int)", [pid])
    assert result(conn, pid) == [(1,)]


def test_rows_stream_one_by_one(conn: Connection) -> None:
    pid = launch(conn, "SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n", 4096)
    rows = conn.cursor().stream("SELECT * FROM pg_background_result(%s) AS (n int, x text)", [pid])
    assert sum(row[0] for row in rows) == 20000 * 20001 // 2


@pytest.mark.parametrize("queue_size", [64, 65536])
@pytest.mark.parametrize("binary", [False, True])
def test_rows_come_whole_whatever_the_queue_size(
    conn: Connection, queue_size: int, binary: bool
) -> None:
    job = "SELECT n, repeat(chr(8364), n) FROM generate_series(0, 700) n"
    pid = launch(conn, job, queue_size)
    query = "SELECT * FROM pg_background_result(%s) AS (n int, x text)"
    rows = conn.execute(query, [pid], binary=binary).fetchall()
    assert rows == [(n, "€" * n) for n in range(701)]


def test_only_the_last_statements_rows_are_the_result(conn: Connection) -> None:
    assert run(conn, "SELECT 1, 2; SELECT 'three'; SELECT 4 AS n", "n int") == [(4,)]
    assert run(conn, "CREATE TEMP TABLE t (n int); SELECT 4") == [(4,)]
    assert run(conn, "SELECT 1; SELECT 2 WHERE false", "n int") == []


def test_command_tags_of_a_job_without_rows(conn: Connection) -> None:
    conn.execute("CREATE TABLE tags (n int)")
    job = "INSERT INTO tags VALUES (1); INSERT INTO tags VALUES (2), (3)"
    tags = [("INSERT 0 1",), ("INSERT 0 2",)]
    assert run(conn, job, "result text") == tags
    assert run(conn, job) == tags
    assert run(conn, "SELECT 1; UPDATE tags SET n = 0") == [("SELECT 1",), ("UPDATE 6",)]
    rows = conn.execute(
        "SELECT pg_background_result(pg_background_launch(%s))", [job], binary=True
    ).fetchall()
    assert rows == tags


# --- types ---


@pytest.mark.parametrize(
    ("job", "columns"),
    [
        ("SELECT 1", "a int, b int"),
        ("SELECT 1, 2", "a int"),
        ("SELECT 1", "a bigint"),
        ("SELECT 1", "a text"),
        ("SELECT 'x'::varchar", "a text"),
        ("SELECT 'x'", "a varchar"),
        ("SELECT now()", "a timestamp"),
        ("SELECT 1, 'x'", "a text, b int"),
        ("SELECT ARRAY[1]", "a bigint[]"),
        ("SELECT", "a int"),
    ],
)
def test_columns_that_differ_in_number_or_type_are_refused(
    conn: Connection, job: str, columns: str
) -> None:
    pid = launch(conn, job)
    query = f"SELECT * FROM pg_background_result({pid}) AS ({columns})"
    assert message(failure(conn, query)) == ("42804", ROWTYPE)


@pytest.mark.parametrize("columns", ["a int", "a text, b text", "a varchar"])
def test_job_without_rows_is_one_text_column(conn: Connection, columns: str) -> None:
    pid = launch(conn, "SET work_mem = '1MB'")
    query = f"SELECT * FROM pg_background_result({pid}) AS ({columns})"
    assert message(failure(conn, query)) == ("42804", NO_RESULT_SET)


def test_type_modifiers_do_not_count_and_oids_do(conn: Connection) -> None:
    conn.execute("CREATE DOMAIN positive AS int CHECK (VALUE > 0)")
    conn.execute("CREATE TYPE mood AS ENUM ('sad', 'ok')")
    conn.execute("CREATE TYPE pair AS (a int, b text)")
    assert run(conn, "SELECT 'x'::varchar(5)", "a varchar") == [("x",)]
    assert run(conn, "SELECT 'ok'::mood", "m mood") == [("ok",)]
    assert run(conn, "SELECT ROW(1, 'x')::pair", "p pair") == [("(1,x)",)]
    assert run(conn, "SELECT ARRAY['a', NULL, 'b c']", "a text[]") == [(["a", None, "b c"],)]


def test_type_without_binary_form_fits_text(conn: Connection) -> None:
    job = "SELECT acldefault('r', 10)::text, (acldefault('r', 10))[1]"
    [[_, item]] = run(conn, job, "t text, a text")
    assert "postgres=" in item
    rows = run(conn, "SELECT (acldefault('r', 10))[1]", "a aclitem")
    assert rows == [(item,)]


def test_every_type_comes_as_the_server_sends_it(conn: Connection, observer: Connection) -> None:
    job = (
        "SELECT true AS a, 1::int2 AS b, 2::int8 AS c, 1.5::float4 AS d, -1.5e300::float8 AS e,"
        " 12345678901234567890.123450 AS f, 'NaN'::numeric AS g, 'x' AS h, 'c'::\"char\" AS i,"
        " '\\x00ff'::bytea AS j, '2026-11-22'::date AS k, '12:34:56.789'::time AS l,"
        " '2026-11-22 12:34:56.789'::timestamp AS m, '2026-11-22 12:34:56+02'::timestamptz AS n,"
        " '1 day 02:03'::interval AS o, '6c0a1b1e-0000-4000-8000-000000000001'::uuid AS p,"
        " '{\"a\": 1}'::json AS q, '{\"a\": 1}'::jsonb AS r, ARRAY[1, NULL, 3] AS s,"
        " ARRAY['a,b', '\"', NULL] AS t, '10.0.0.1/8'::inet AS u, 'n'::name AS v, 7::oid AS w,"
        " NULL::text AS x, '' AS y"
    )
    for binary in (False, True):
        direct = observer.execute(job, binary=binary)
        pid = launch(conn, job)
        fetched = conn.execute(f"SELECT pg_background_result({pid})", binary=binary)
        assert names(fetched) == names(direct)
        assert repr(fetched.fetchall()) == repr(direct.fetchall())  # NaN is not itself


@pytest.mark.parametrize("job", ["SELECT ROW(1, 2) AS r", "SELECT ARRAY[ROW(1)] AS r"])
def test_record_cannot_be_had_in_binary_and_is_refused_with_a_hint(
    conn: Connection, job: str
) -> None:
    value(conn, job)
    with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
        conn.execute("SELECT pg_background_result(%s)", [launch(conn, job)], binary=True)
    assert '"r"' in (caught.value.diag.message_detail or "")
    assert caught.value.diag.message_hint
    assert run(conn, "SELECT 1") == [(1,)]


# --- once ---


def test_result_is_for_one_fetch(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    assert result(conn, pid) == [(1,)]
    expected = ("42704", f"PID {pid} is not attached to this session")
    for query in (
        f"SELECT * FROM pg_background_result({pid})",
        f"SELECT * FROM pg_background_result({pid}) AS (n int)",
        f"SELECT pg_background_result({pid})",
        f"SELECT pg_background_detach({pid})",
    ):
        assert message(failure(conn, query)) == expected


def test_failed_job_is_for_one_fetch_too(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1/0")
    assert failure(conn, f"SELECT pg_background_result({pid})").sqlstate == "22012"
    assert message(failure(conn, f"SELECT pg_background_result({pid})")) == (
        "42704",
        f"PID {pid} is not attached to this session",
    )


def test_fetch_that_was_not_finished_cannot_begin_again(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    query = f"SELECT * FROM pg_background_result({pid}) AS (a text)"
    assert failure(conn, query).sqlstate == "42804"
    assert message(failure(conn, query.replace("text", "int"))) == (
        "42704",
        f"results for PID {pid} have already been consumed",
    )
    conn.execute(f"SELECT pg_background_detach({pid})")


@pytest.mark.parametrize("pid", [999999, 0, -1, 2147483647])
def test_unknown_pid(conn: Connection, pid: int) -> None:
    expected = ("42704", f"PID {pid} is not attached to this session")
    assert message(failure(conn, "SELECT pg_background_result(%s)", [pid])) == expected
    query = f"SELECT * FROM pg_background_result({pid}) AS (n int)"
    assert message(failure(conn, query)) == expected


def test_job_of_another_session_is_unknown(conn: Connection, proxy: Proxy, scratch: str) -> None:
    pid = launch(conn, "SELECT 1")
    with proxy.connect(dbname=scratch) as other:
        error = failure(other, f"SELECT pg_background_result({pid})")
        assert message(error) == ("42704", f"PID {pid} is not attached to this session")
    assert result(conn, pid) == [(1,)]


# --- errors and notices ---

RAISE = """DO $$ BEGIN RAISE {} 'message äöü' USING ERRCODE = '{}', DETAIL = 'the detail',
    HINT = 'the hint', SCHEMA = 's', TABLE = 't', COLUMN = 'c', DATATYPE = 'd', CONSTRAINT = 'n';
    END $$"""


@pytest.mark.parametrize(
    "job",
    [
        "SELECT 1/0",
        "SELEC",
        "SELECT no_such",
        "SELECT 'x'::int",
        "INSERT INTO checked VALUES (-1)",
        "INSERT INTO checked VALUES (1), (1)",
        "INSERT INTO checked VALUES (NULL)",
        "INSERT INTO referring VALUES (7)",
        "SELECT 0::positive_2",
        "SELECT json '{'",
        "DO $$ BEGIN EXECUTE 'SELECT no_such'; END $$",
        RAISE.format("EXCEPTION", "P0001"),
        RAISE.format("EXCEPTION", "XX123"),
    ],
)
def test_error_of_a_job_keeps_all_its_fields(
    conn: Connection, observer: Connection, job: str
) -> None:
    observer.execute("CREATE TABLE IF NOT EXISTS checked (n int PRIMARY KEY CHECK (n > 0))")
    observer.execute("CREATE TABLE IF NOT EXISTS referring (n int REFERENCES checked)")
    observer.execute(
        "DO $$ BEGIN CREATE DOMAIN positive_2 AS int CHECK (VALUE > 0);"
        " EXCEPTION WHEN duplicate_object THEN END $$"
    )
    direct = failure(observer, job)
    pid = launch(conn, job)
    error = failure(conn, f"SELECT pg_background_result({pid})")
    assert type(error) is type(direct)
    expected = fields(direct.diag)
    if expected["statement_position"] is not None:
        # It points into the job's text, not into that of the caller's query.
        expected["internal_position"] = expected["statement_position"]
        expected |= {"statement_position": None, "internal_query": job}
    assert fields(error.diag) == expected
    line = f"background worker, pid {pid}"
    assert error.diag.context == "\n".join(filter(None, [direct.diag.context, line]))


def test_failed_job_aborts_the_callers_transaction(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        for query in (
            "SELECT pg_background_result(%s)",
            "SELECT * FROM pg_background_result(%s) AS (n int)",
        ):
            conn.execute("CREATE TABLE never (n int)")
            pid = launch(conn, "SELECT 1/0")
            assert failure(conn, query, [pid]).sqlstate == "22012"
            assert failure(conn, "SELECT 1").sqlstate == "25P02"
            conn.rollback()
            row = conn.execute("SELECT to_regclass('never')::text").fetchone()
            assert row == (None,)


def test_rows_before_the_error_arrive(conn: Connection) -> None:
    job = "SELECT 10 / (n - 3) FROM generate_series(1, 5) n"
    pid = launch(conn, job)
    rows = conn.cursor().stream(f"SELECT * FROM pg_background_result({pid}) AS (n int)")
    assert [next(rows), next(rows)] == [(-5,), (-10,)]
    with pytest.raises(psycopg.errors.DivisionByZero):
        next(rows)
    assert conn.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("level", ["NOTICE", "WARNING", "INFO"])
def test_notice_of_a_job_keeps_all_its_fields(
    conn: Connection, observer: Connection, level: str
) -> None:
    job = RAISE.format(level, "01234")
    with notices(observer) as direct:
        observer.execute(job)
    with notices(conn) as early:
        pid = launch(conn, job)
    assert early == []
    with notices(conn) as fetched:
        assert result(conn, pid) == [("DO",)]
    [expected], [notice] = direct, fetched
    context = "\n".join(filter(None, [expected["context"], f"background worker, pid {pid}"]))
    assert notice == {**expected, "context": context}


def test_notices_come_in_order_and_before_the_error(conn: Connection) -> None:
    job = "DO $$ BEGIN FOR n IN 1..100 LOOP RAISE NOTICE '%', n; END LOOP; RAISE 'over'; END $$"
    with notices(conn) as collected:
        error = job_failure(conn, job)
    assert message(error) == ("P0001", "over")
    assert [notice["message_primary"] for notice in collected] == [str(n) for n in range(1, 101)]


def test_notices_in_the_middle_of_rows(conn: Connection) -> None:
    conn.execute(
        "CREATE FUNCTION noisy(n int) RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE 'row %', n; RETURN n; END $$"
    )
    job = "SELECT noisy(n) FROM generate_series(1, 50) n"
    for binary in (False, True):
        pid = launch(conn, job)
        with notices(conn) as collected:
            query = f"SELECT pg_background_result({pid})"
            assert conn.execute(query, binary=binary).fetchall() == [(n,) for n in range(1, 51)]
        assert [notice["message_primary"] for notice in collected] == [
            f"row {n}" for n in range(1, 51)
        ]


def test_notices_of_earlier_statements_arrive_too(conn: Connection) -> None:
    with notices(conn) as collected:
        assert run(conn, "DROP TABLE IF EXISTS no_such_1; SELECT 1") == [(1,)]
    assert [notice["sqlstate"] for notice in collected] == ["00000"]


def test_notices_that_nobody_fetches_are_bounded_and_lost(conn: Connection) -> None:
    job = "DO $$ BEGIN FOR n IN 1..3000 LOOP RAISE NOTICE '%', repeat('x', 1000); END LOOP; END $$"
    pid = launch(conn, job, 64)
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    with notices(conn) as collected:
        assert run(conn, "SELECT 1") == [(1,)]
    assert collected == []


def test_verbose_vacuum_shows_its_messages(proxy: Proxy, scratch: str) -> None:
    sql = "SELECT pg_background_result(pg_background_launch('vacuum verbose pg_am'))"
    done = psql(proxy.port, "-v", "SHOW_CONTEXT=always", "-c", sql, dbname=scratch)
    assert 'INFO:  vacuuming "' in done.stderr
    assert "\nCONTEXT:  " in done.stderr
    assert "background worker, pid " in done.stderr
    assert [line.strip() for line in done.stdout.splitlines()[:3]] == [
        "result",
        "--------",
        "VACUUM",
    ]


# --- what ends a job ---


def test_cancelled_job(conn: Connection, observer: Connection) -> None:
    pid = launch(conn, "SELECT pg_sleep(60)")
    cancel_sleep(observer, pid)
    error = failure(conn, "SELECT pg_background_result(%s)", [pid])
    assert message(error) == ("57014", "canceling statement due to user request")


def test_killed_job(conn: Connection, observer: Connection) -> None:
    pid = launch(conn, "SELECT pg_sleep(60)")
    observer.execute("SELECT pg_terminate_backend(%s)", [pid])
    wait_until_ended(observer, pid)
    error = failure(conn, "SELECT pg_background_result(%s)", [pid])
    assert message(error) == ("08006", f"lost connection to worker process with PID {pid}")


def test_fetch_ends_by_the_callers_own_statement_timeout(
    conn: Connection, observer: Connection
) -> None:
    for query in (
        "SELECT pg_background_result(%s)",
        "SELECT * FROM pg_background_result(%s) AS (x text)",
    ):
        pid = launch(conn, "SELECT pg_sleep(60)")
        conn.execute("SET statement_timeout = 50")
        error = failure(conn, query, [pid])
        assert message(error) == ("57014", "canceling statement due to statement timeout")
        conn.execute("RESET statement_timeout")
        observer.execute("SELECT pg_terminate_backend(%s)", [pid])


def test_fetch_of_a_job_that_ended_long_ago(conn: Connection, observer: Connection) -> None:
    pid = launch(conn, "SELECT n FROM generate_series(1, 1000) n")
    wait_until_ended(observer, pid)
    assert len(result(conn, pid, "n int")) == 1000
