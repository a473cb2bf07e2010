"""Output settings that a job sets for itself do not change how its result is read: it has the same
text as the session's own SELECT."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.support.background import failure, run, value
from tests.support.in_database import one, with_extension
from tests.support.servers import Connection, Proxy, Server

pytestmark = pytest.mark.every_server

OBJECTS = (
    "CREATE TYPE pair AS (day date, bytes bytea)",
    "CREATE DOMAIN instant AS timestamptz",
    "CREATE TABLE printed AS SELECT date '2024-01-02' AS day, interval '-1 day -2 hours' AS span,"
    " 1.0/3::float8 AS third, timestamptz '2024-01-02 00:00+00' AS at, '\\x00ff41'::bytea AS bytes,"
    " '\u00e9' AS text, ARRAY[date '2024-01-02'] AS days, 1234.5::money AS price,"
    " tstzrange('2024-01-02 00:00+00', NULL) AS since, point(1.0/3, 2) AS place,"
    " ROW('2024-01-02', '\\x00ff')::pair AS pair,"
    " ARRAY['2024-01-02 00:00+00'::instant] AS instants",
    "CREATE FUNCTION hidden(text, text, bool) RETURNS text LANGUAGE sql"
    " AS 'SELECT set_config($1, $2, $3)'",
    "CREATE PROCEDURE called() LANGUAGE plpgsql AS $$ BEGIN SET datestyle = german; END $$",
    "CREATE TABLE triggering (n int)",
    "CREATE FUNCTION triggered() RETURNS trigger LANGUAGE plpgsql"
    " AS $$ BEGIN SET LOCAL datestyle = german; RETURN NEW; END $$",
    "CREATE TRIGGER triggered BEFORE INSERT ON triggering"
    " FOR EACH ROW EXECUTE PROCEDURE triggered()",
)
COLUMNS = (
    "day date, span interval, third float8, at timestamptz, bytes bytea, text text, days date[],"
    " price money, since tstzrange, place point, pair pair, instants instant[]"
)
SESSIONS = [
    "",
    "SET datestyle = 'sql, dmy'; SET timezone = 'Asia/Tokyo'; SET bytea_output = 'escape';"
    " SET intervalstyle = 'iso_8601'; SET extra_float_digits = -3",
]
CHANGES = [
    "SET datestyle = 'german'",
    "SET SESSION \"DateStyle\" TO 'postgres, dmy'",
    "SET LOCAL intervalstyle = sql_standard; SET LOCAL extra_float_digits = -12",
    "SET LOCAL TIME ZONE 'America/New_York'",
    "SET bytea_output = escape; SET lc_monetary = 'POSIX'; RESET TimeZone",
    "SET NAMES 'LATIN1'",
    "SET client_encoding = 'SQL_ASCII'",
    "RESET ALL; SET extra_float_digits = -9",
    'SET U&"d\\0061testyle" = german',
    "SELECT set_config('datestyle', 'german', false)",
    "SELECT U&\"set\\005Fconfig\"('datestyle', 'german', true)",
    "UPDATE pg_settings SET setting = 'german' WHERE name = 'DateStyle'",
    "DO $do$ BEGIN SET bytea_output = escape; SET LOCAL datestyle = german; END $do$",
    "(SELECT hidden('datestyle', 'german', true))",
    "VALUES (hidden('timezone', 'Asia/Kolkata', true))",
    "EXPLAIN (ANALYZE) SELECT hidden('datestyle', 'german', true)",
    "PREPARE p AS SELECT hidden('datestyle', 'german', true); EXECUTE p",
    "DECLARE c CURSOR FOR SELECT hidden('datestyle', 'german', true); MOVE ALL IN c",
    "CALL called()",
    "SELECT pg_background_progress(10, 'half'); SET datestyle = german",
]
QUERIES = [
    "SELECT * FROM printed",
    "TABLE printed; -- the end",
    "(SELECT * FROM printed) /* the end */",
    "WITH w AS (SELECT * FROM printed) SELECT * FROM w",
    "SELECT * FROM printed FOR UPDATE",
]


@pytest.fixture(scope="module")
def objects(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    with server.connect(dbname=scratch) as conn:
        for command in OBJECTS:
            if server.version < 110000:  # arrays of domains, and procedures, came with 11
                command = command.replace("::instant]", "::timestamptz]")
                if command.startswith("CREATE PROCEDURE"):
                    continue
            conn.execute(command.encode())
    yield from with_extension(server, proxy, scratch)


@pytest.fixture
def session(proxy: Proxy, scratch: str, objects: None) -> Iterator[Connection]:
    with proxy.connect(dbname=scratch) as conn:
        yield conn


def texts(conn: Connection, query: str) -> list[list[bytes | None]]:
    """Rows as they are sent."""
    if conn.info.server_version < 110000:  # see `objects`
        query = query.replace("instant[]", "timestamptz[]")
    result = conn.pgconn.exec_(query.encode())
    assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
    return [
        [result.get_value(row, column) for column in range(result.nfields)]
        for row in range(result.ntuples)
    ]


def fetches(job: str, columns: str = COLUMNS) -> tuple[str, ...]:
    """Statements that fetch its rows: direct ones, and one whose call is made in the server."""
    call = f"pg_background_result(pg_background_launch($job${job}$job$))"
    return (
        f"SELECT * FROM {call}",
        f"SELECT * FROM {call} AS ({columns})",
        f"SELECT r.* FROM (SELECT 1 OFFSET 0) o, LATERAL {call} AS r({columns})",
    )


@pytest.mark.parametrize("settings", SESSIONS, ids=["defaults", "own"])
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_result_has_the_text_of_the_sessions_own_query(
    session: Connection, number: int, settings: str
) -> None:
    if CHANGES[number].startswith("CALL") and session.info.server_version < 110000:
        pytest.skip("procedures came with 11")
    session.execute(settings.encode())
    expected = texts(session, "SELECT * FROM printed")
    job = f"{CHANGES[number]}; {QUERIES[number % len(QUERIES)]}"
    for fetch in fetches(job):
        assert texts(session, fetch) == expected


def test_expected_values_of_the_extension(session: Connection) -> None:
    job = (
        "SET datestyle = 'german'; SET intervalstyle = 'sql_standard';"
        " SET extra_float_digits = -12; SELECT date '2024-01-02', interval '-1 day -2 hours',"
        " 1.0/3::float8, timestamptz '2024-01-02 00:00+00'"
    )
    session.execute("SET timezone = 'UTC'")
    third = b"0.3333333333333333" if session.info.server_version >= 120000 else b"0.333333333333333"
    for fetch in fetches(job, "a date, i interval, f float8, t timestamptz"):
        assert texts(session, fetch) == [
            [b"2024-01-02", b"-1 days -02:00:00", third, b"2024-01-02 00:00:00+00"]
        ]


def test_binary_results(session: Connection) -> None:
    query = "SELECT day, span, third, at, bytes, days FROM printed"
    job = f"SET datestyle = 'sql, dmy'; SET bytea_output = escape; {query}"
    if session.info.server_version < 120000:  # docs/limits.md: the text has 15 digits otherwise
        session.execute("SET extra_float_digits = 3")
    with session.cursor(binary=True) as cursor:
        expected = cursor.execute(query.encode()).fetchall()
        rows = cursor.execute("SELECT * FROM pg_background_result(pg_background_launch(%s))", [job])
        assert rows.fetchall() == expected


def test_run_query(session: Connection) -> None:
    job = "SET datestyle = 'sql, dmy'; SELECT date '2024-01-02' AS day"
    call = f"pg_background_run_query($job${job}$job$)"
    assert texts(session, f"SELECT * FROM {call} AS (day date)") == [[b"2024-01-02"]]
    inside = f"SELECT inside($$(SELECT day FROM {call} AS (day date))$$)"
    assert one(session, inside) == "2024-01-02"


def test_the_last_statement_itself_has_the_jobs_settings(session: Connection) -> None:
    job = "SET datestyle = 'german'; SELECT date '2024-01-02'::text, date '3.2.2024'"
    assert texts(session, fetches(job)[0]) == [[b"02.01.2024", b"2024-02-03"]]
    job = "SELECT set_config('datestyle', 'german', false), date '2024-01-02'"
    assert texts(session, fetches(job)[0]) == [[b"German, DMY", b"2024-01-02"]]


def test_the_last_statement_runs_once(session: Connection) -> None:
    session.execute("CREATE SEQUENCE once")
    job = "SET datestyle = 'german'; SELECT n, nextval('once') FROM generate_series(1, 4) n"
    assert run(session, job) == [(n, n) for n in range(1, 5)]
    assert one(session, "SELECT nextval('once')") == 5


@pytest.mark.parametrize(
    "query",
    [
        "SELECT",
        "SELECT 1 AS a, 2 AS a, NULL, ROW(1, 'x')",
        "SELECT n FROM generate_series(1, 0) n",
        "SELECT n FROM generate_series(1, 1000) n ORDER BY n DESC",
        "SELECT 1.5::numeric(5, 2) AS n, 'x'::char(3) AS c, bytes FROM printed",
        "VALUES (1, 'x'), (2, NULL)",
    ],
)
def test_columns_and_rows_are_those_of_the_query(session: Connection, query: str) -> None:
    described = []
    for sql in (fetches(query)[0], fetches(f"SET datestyle = german; {query}")[0]):
        result = session.pgconn.exec_(sql.encode())
        columns = [
            (result.fname(n), result.ftype(n), result.fmod(n), result.ftable(n))
            for n in range(result.nfields)
        ]
        described.append((columns, result.ntuples, texts(session, sql)))
    assert described[0] == described[1]


def test_statement_timeout_holds_for_the_last_statement(session: Connection) -> None:
    if session.info.server_version < 130000:
        pytest.skip("the server looks at it when the string begins")
    job = "SET statement_timeout = '100ms'; SET datestyle = german; SELECT pg_sleep(30)"
    error = failure(session, "SELECT * FROM pg_background_result(pg_background_launch(%s))", [job])
    assert isinstance(error, psycopg.errors.QueryCanceled)
    assert "statement timeout" in str(error)


def test_a_setting_that_the_result_does_not_depend_on(session: Connection) -> None:
    job = "CREATE TEMP TABLE t (n int); SET datestyle = 'german'; INSERT INTO t VALUES (1) {}"
    assert run(session, job.format("RETURNING n")) == [(1,)]
    assert run(session, job.format("")) == [("CREATE TABLE",), ("SET",), ("INSERT 0 1",)]
    assert value(session, "SELECT hidden('datestyle', 'german', false)") == "German, DMY"


@pytest.mark.parametrize(
    "job",
    [
        "CREATE TEMP TABLE t (d date); SET datestyle = 'german';"
        " INSERT INTO t VALUES ('2024-01-02') RETURNING d",
        "PREPARE p AS SELECT date '2024-01-02'; SET datestyle = 'german'; EXECUTE p",
        "SELECT hidden('datestyle', 'german', false), date '2024-01-02'",
        "SELECT hidden('bytea_output', 'escape', false), '\\x00'::bytea",
        "SELECT hidden('client_encoding', 'LATIN1', false), '\u00e9'",
        "INSERT INTO triggering VALUES (1); SELECT day FROM printed",
        "CREATE TEMP TABLE t AS SELECT hidden('timezone', 'Asia/Tokyo', true); TABLE printed",
    ],
)
def test_what_cannot_be_printed_again_is_an_error(session: Connection, job: str) -> None:
    error = failure(session, "SELECT * FROM pg_background_result(pg_background_launch(%s))", [job])
    assert error.sqlstate == "0A000"
    assert "printed with other settings" in str(error)


def test_an_error_points_into_the_jobs_text(session: Connection) -> None:
    for begin, end in (("SELECT ", ""), ("SELECT 1 + (", ")"), ("TABLE ", "")):
        job = f"SET datestyle = 'german'; SELECT '\u00e9'; {begin}nowhere{end}"
        call = "SELECT * FROM pg_background_result(pg_background_launch(%s))"
        error = failure(session, call, [job])
        assert error.diag.statement_position is None
        assert error.diag.internal_position == str(job.index("nowhere") + 1)
        assert error.diag.internal_query == job


def test_a_statement_in_brackets_that_do_not_match_stays_wrong(session: Connection) -> None:
    job = "SET datestyle = german; SELECT 1) TABLE x, y AS (SELECT 2"
    error = failure(session, "SELECT * FROM pg_background_result(pg_background_launch(%s))", [job])
    assert isinstance(error, psycopg.errors.SyntaxError)


@pytest.mark.parametrize("before", ["", "SET work_mem = '8MB'; ", "SELECT pg_sleep(0), now(); "])
def test_a_job_without_a_change_is_sent_as_it_is(session: Connection, before: str) -> None:
    job = f"{before}SELECT current_query()"
    assert value(session, job) == job
