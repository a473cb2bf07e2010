"""An error of a job points into the job's text, never into its caller's.

What is expected is what the server says of the same text in an EXECUTE in PL/pgSQL, where it is an
internal query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from psycopg import sql

from protocol.messages import ErrorResponse, Query
from proxy.jobs.registry import kept_error
from tests.support.background import (
    Fields,
    failure,
    fields,
    job_failure,
    launch,
    notices,
    run,
)
from tests.support.in_database import with_extension
from tests.support.servers import Connection, Proxy, Server, psql
from tests.support.wire import Wire, error_of

pytestmark = pytest.mark.every_server

OBJECTS: Final = (
    "CREATE FUNCTION executes(text) RETURNS int LANGUAGE plpgsql AS"
    " $$ BEGIN EXECUTE $1; RETURN 1; END $$",
    "CREATE FUNCTION is_bad(text) RETURNS bool LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM inner_nowhere; RETURN true; END $$",
    "CREATE DOMAIN checked AS text CHECK (is_bad(VALUE))",
    "CREATE TYPE holds AS (c checked)",
    "CREATE FUNCTION divides(int) RETURNS int LANGUAGE sql AS 'SELECT 1 / $1'",
    "CREATE FUNCTION broken(int) RETURNS int LANGUAGE sql AS 'SELECT ''x''::text::int + $1'",
)

JOBS: Final = (
    "SELEC",
    "SELECT 1 FROM nowhere",
    "SELECT nowhere",
    "SELECT\n  1,\n  nowhere,\n  2",
    "\n\n  SELECT nowhere\n",
    "/* é */ SELECT 'äöü', nowhere",
    "SELECT '\U0001f600\U0001f600', nowhere -- \U0001f600",
    "SELECT 'x'::int",
    "SELECT 1 +",
    "SELECT (1",
    "SELECT 'x",
    "SELECT $$x",
    'SELECT "x',
    'SELECT ""',
    "SELECT 1 /* x",
    "SELECT U&'\\zzzz'",
    "SELECT $1",
    "SELECT now(1)",
    "SELECT 1 + 'é'::text",
    "SELECT sum(n), n FROM generate_series(1, 2) n",
    "SELECT 1; SELECT 2; SELECT nowhere; SELECT 3",
    "CREATE TEMP TABLE t (n int); INSERT INTO t VALUES ('x')",
    "INSERT INTO pg_class (nowhere) VALUES (1)",
    "CREATE TABLE t (n nowhere)",
    "DO $x$ BEGIN EXECUTE 'SELECT nowhere'; END $x$",
    "SELECT executes('SELECT inner_nowhere')",
    "SELECT '(x)'::holds",
    "SELECT divides(0)",
    "SELECT broken(1)",
    "SELECT 1 / 0",
    "DO $x$ BEGIN RAISE 'x'; END $x$",
    "VALUES (1), ('x'), (2, 3)",
    "EXPLAIN SELECT nowhere",
    "SET work_mem = 'x'",
    "SELECT (SELECT 1, 2)",
    "SELECT generate_series(1, 2), CASE WHEN generate_series(1, 2) = 1 THEN 1 END",
)
REWRITTEN: Final = (
    "SET datestyle = german; SELECT nowhere",
    "SET datestyle = german; SELECT 'é', (nowhere)",
    "SELECT 'é'; SET datestyle = german; TABLE nowhere",
    "SELECT nowhere; SET datestyle = german; SELECT 1",
    "SET datestyle = german; SELECT 1 / 0",
    "SET datestyle = german; SELECT executes('SELECT inner_nowhere')",
    "SET datestyle = german; CREATE TEMP TABLE t (n int); INSERT INTO t VALUES ('x') RETURNING n",
    "SET datestyle = german; INSERT INTO nowhere VALUES (1) RETURNING *",
)


@pytest.fixture(autouse=True, scope="module")
def objects(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension, too."""
    with server.connect(dbname=scratch) as conn:
        for command in OBJECTS:
            conn.execute(command.encode())
    yield from with_extension(server, proxy, scratch)


def executed(job: str) -> bytes:
    """A statement that has the server execute the text."""
    return f"DO $outer$ BEGIN EXECUTE $job${job}$job$; END $outer$".encode()


def directly(conn: Connection, job: str) -> Fields:
    """What the server says of it."""
    return fields(failure(conn, executed(job)).diag)


@pytest.mark.parametrize("job", [*JOBS, *REWRITTEN])
def test_an_error_points_into_the_jobs_text(
    conn: Connection, observer: Connection, job: str
) -> None:
    expected = directly(observer, job)
    assert expected["statement_position"] is None
    assert fields(job_failure(conn, job).diag) == expected


@pytest.mark.parametrize(
    "job",
    [
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT nowhere'",
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN (; END $$",
        "DO $x$ BEGIN SELEC 1; END $x$",
    ],
)
def test_an_error_in_a_functions_body(conn: Connection, observer: Connection, job: str) -> None:
    """Its place in the command, which the server does not find in an EXECUTE."""
    direct = failure(observer, job.encode())
    diag = job_failure(conn, job).diag
    assert (diag.statement_position, diag.internal_query) == (None, job)
    assert diag.internal_position == direct.diag.statement_position


@pytest.mark.parametrize(
    "call",
    [
        "SELECT * FROM pg_background_result(pg_background_launch({})) AS (n int)",
        "SELECT pg_background_result(pg_background_launch({}))",
        "SELECT n + 1 FROM pg_background_run_query({}) AS (n int)",
        "SELECT * FROM pg_background_run_query({})",
        "DO $do$ BEGIN PERFORM * FROM pg_background_run_query({}) AS (n int); END $do$",
        "SELECT * FROM pg_background_run_query({}) AS (n int), generate_series(1, 2)",
    ],
)
def test_whichever_way_it_is_fetched(conn: Connection, observer: Connection, call: str) -> None:
    for job in ("SELECT\n'é', nowhere", "SELECT executes('SELECT inner_nowhere')", "SELECT 1 / 0"):
        expected = directly(observer, job)
        query = sql.SQL(call).format(sql.Literal(job))
        found = fields(failure(conn, query).diag)
        if found["source_file"] == "pl_exec.c":  # PL/pgSQL has raised it
            for name in ("source_file", "source_line", "source_function"):
                found[name] = expected[name]
        assert found == expected


def test_a_result_read_in_portions_and_in_binary(conn: Connection, observer: Connection) -> None:
    job = "SELECT nowhere"
    expected = directly(observer, job)
    pid = launch(conn, job)
    with conn.cursor(binary=True) as cursor, pytest.raises(psycopg.Error) as caught:
        cursor.execute("SELECT * FROM pg_background_result(%s) AS (n int)", [pid])
    assert fields(caught.value.diag) == expected
    with conn.transaction(force_rollback=True):
        pid = launch(conn, job)
        conn.execute(
            f"DECLARE c CURSOR FOR SELECT * FROM pg_background_result({pid}) AS (n int)".encode()
        )
        found = fields(failure(conn, "FETCH 1 FROM c").diag)
    assert (found["internal_position"], found["internal_query"]) == ("8", job)


def test_what_code_in_the_database_catches_has_the_rest(conn: Connection) -> None:
    block = (
        "DO $do$ DECLARE m text; BEGIN PERFORM * FROM"
        " pg_background_run_query('SELECT nowhere') AS (n int);"
        " EXCEPTION WHEN undefined_column THEN GET STACKED DIAGNOSTICS m = MESSAGE_TEXT;"
        " RAISE NOTICE '%', m; RAISE EXCEPTION 'another'; END $do$"
    )
    with notices(conn) as heard:
        error = failure(conn, block.encode())
    assert [notice["message_primary"] for notice in heard] == ['column "nowhere" does not exist']
    assert error.diag.internal_query is None


def test_psql_shows_the_line_of_the_job(server: Server, proxy: Proxy, scratch: str) -> None:
    for job in ("SELECT 1,\n  nowhere\nFROM x", "SELEC 'é'", "SELECT 1 / 0"):
        direct = psql(server.port, "-c", executed(job).decode(), dbname=scratch)
        call = (
            f"SELECT * FROM pg_background_result(pg_background_launch($job${job}$job$)) AS (n int)"
        )
        proxied = psql(proxy.port, "-c", call, dbname=scratch)
        assert direct.returncode == proxied.returncode == 1

        def shown(text: str) -> str:
            return text.partition("CONTEXT:")[0]

        assert shown(proxied.stderr) == shown(direct.stderr)
        assert ("QUERY:" in proxied.stderr) == ("/ 0" not in job)


def test_the_message_itself(proxy: Proxy, scratch: str) -> None:
    """Its fields P, p and q, byte for byte."""
    with Wire(("127.0.0.1", proxy.port), database=scratch) as wire:
        pid = wire.launch("SELECT nowhere")
        found = error_of(wire.query(f"SELECT pg_background_result({pid})")).fields
    assert "P" not in found
    assert (found["p"], found["q"]) == (b"8", b"SELECT nowhere")


# --- notices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        "SELECT 1, 'a\\\\b'",
        "SELECT 'é', 'a\\\\b', 'c\\\\d'",
        "SET datestyle = german; SELECT 'é', 'a\\\\b'",
        "SELECT executes('SELECT ''a\\\\\\\\b'' ')",
    ],
)
def test_a_warning_points_into_the_jobs_text(
    conn: Connection, observer: Connection, job: str
) -> None:
    for one in (conn, observer):
        one.execute("SET standard_conforming_strings = off")
    with notices(observer) as expected:
        observer.execute(executed(job))
    assert {notice["sqlstate"] for notice in expected} <= {"22P06"}
    with notices(conn) as found:
        run(conn, job)
    for notice in (*expected, *found):
        del notice["context"]
    assert found == expected
    # The server warns once in a text.
    assert {notice["statement_position"] for notice in found} <= {None}
    assert "22P06" in {notice["sqlstate"] for notice in found}


# --- other words -----------------------------------------------------------------------------

PROGRESS: Final = "SELECT pg_background_progress({})"


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ("nowhere", "nowhere"),
        ("1, nowhere", "nowhere"),
        ("1, 'é' || nowhere", "nowhere"),
        ("msg => nowhere, pct => 1", "nowhere"),
        ("msg => 'x', pct => nowhere", "nowhere"),
        ("1 + , 'x'", " ,"),
        ("'x'", "'x'"),
        ("1 / 0", None),
        ("executes('SELECT inner_nowhere')", "inner"),
    ],
)
@pytest.mark.parametrize("before", ["", "SELECT 'é'; SELECT pg_background_progress(1, 'ü'); "])
def test_an_error_in_a_report_of_progress(
    conn: Connection, before: str, arguments: str, place: str | None
) -> None:
    """The server has a block in place of the call."""
    job = before + PROGRESS.format(arguments)
    diag = job_failure(conn, job).diag
    if place == "inner":
        assert (diag.internal_position, diag.internal_query) == ("8", "SELECT inner_nowhere")
    elif place is None:
        assert (diag.internal_position, diag.internal_query) == (None, None)
    else:
        position = str(job.index(arguments) + arguments.index(place) + 1)
        assert (diag.internal_position, diag.internal_query) == (position, job)
    context = [line.partition(" pid")[0] for line in str(diag.context).split("\n")]
    own = ["PL/pgSQL function executes(text) line 1 at EXECUTE"] if place == "inner" else []
    assert context == [*own, "background worker,"]


def test_an_error_behind_reports_of_progress(conn: Connection, observer: Connection) -> None:
    reports = "SELECT 'é'; SELECT pg_background_progress(1, 'ü'); SELECT pg_background_progress(2)"
    for rest in (
        "; SELECT nowhere",
        ";\nSELECT 'x'::int",
        "; SET datestyle = german; TABLE nowhere",
    ):
        job = reports + rest
        diag = job_failure(conn, job).diag
        place = rest.index("nowhere" if "nowhere" in rest else "'x'")
        assert diag.internal_position == str(len(reports) + place + 1)
        assert diag.internal_query == job


def test_a_syntax_error_at_the_end_of_a_text_that_goes_on(conn: Connection) -> None:
    """The server finds what stands behind it in the words that it got."""
    for job in ("SET datestyle = german; SELECT 1 +", "SET datestyle = german; SELECT é, ("):
        diag = job_failure(conn, job).diag
        assert (diag.internal_position, diag.internal_query) == (str(len(job) + 1), job)


# --- encodings -------------------------------------------------------------------------------

TEXT: Final = "SELECT '日本', nowhere"


def error_in(wire: Wire, encoding: str, codec: str, query: str) -> ErrorResponse:
    wire.query(f"SET client_encoding = '{encoding}'")
    wire.send(Query(query.encode(codec)).serialize())
    return error_of(wire.until_ready())


@pytest.mark.parametrize(
    ("server_encoding", "encoding", "codec", "text"),
    [
        ("UTF8", "UTF8", "utf-8", "日本ソ"),
        ("UTF8", "SJIS", "cp932", "日本ソ"),
        ("UTF8", "EUC_JP", "euc_jp", "日本ソ"),
        ("UTF8", "GBK", "gbk", "日本"),
        ("UTF8", "GB18030", "gb18030", "日本\U0001f600"),
        ("UTF8", "BIG5", "big5", "日本功"),
        ("UTF8", "LATIN1", "latin-1", "äöü"),
        ("UTF8", "WIN1252", "cp1252", "äöü€"),
        ("UTF8", "SQL_ASCII", "utf-8", "日本"),
        ("SQL_ASCII", "UTF8", "utf-8", "日本"),
        ("SQL_ASCII", "SQL_ASCII", "utf-8", "日本"),
        ("SQL_ASCII", "LATIN1", "latin-1", "äöü"),
    ],
)
def test_in_any_encoding(
    server: Server, proxy: Proxy, server_encoding: str, encoding: str, codec: str, text: str
) -> None:
    name = "positions_" + server_encoding.lower()
    with server.connect() as conn:
        conn.execute(f"DROP DATABASE IF EXISTS {name}".encode())
        conn.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{server_encoding}'"
            " LC_COLLATE 'C' LC_CTYPE 'C'".encode()
        )
    try:
        address = ("127.0.0.1", server.port), ("127.0.0.1", proxy.port)
        with (
            Wire(address[0], database=name) as direct,
            Wire(address[1], database=name) as proxied,
        ):
            for words in (
                f"SELECT '{text}', nowhere",
                f"SET datestyle = german; SELECT '{text}', nowhere",
                f"SELECT '{text}'; SELECT nowhere; SET datestyle = german; SELECT '{text}'",
            ):
                expected = error_in(direct, encoding, codec, executed(words).decode())
                call = f"SELECT pg_background_result(pg_background_launch($job${words}$job$))"
                found = error_in(proxied, encoding, codec, call)
                assert {**found.fields, "W": b""} == {**expected.fields, "W": b""}
                assert found.fields["q"] == words.encode(codec)
    finally:
        with server.connect() as conn:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


# --- sizes -----------------------------------------------------------------------------------


def test_a_long_text_has_the_position_only(conn: Connection) -> None:
    job = "SELECT '{}', nowhere"
    longest = job.format("x" * (65536 - len(job) + 2))
    diag = job_failure(conn, longest).diag
    assert (diag.internal_position, diag.internal_query) == (str(65536 - 6), longest)
    diag = job_failure(conn, "/**/" + longest).diag
    assert (diag.internal_position, diag.internal_query) == (str(65536 - 2), None)
    assert diag.statement_position is None


def test_a_long_text_in_other_words_has_none(conn: Connection) -> None:
    words = "x" * 65536
    for job in (
        f"SET datestyle = german; SELECT '{words}', nowhere",
        f"SELECT '{words}'; SELECT pg_background_progress(nowhere)",
        f"SELECT pg_background_progress(1); SELECT '{words}', nowhere",
    ):
        diag = job_failure(conn, job).diag
        assert diag.message_primary == 'column "nowhere" does not exist'
        assert (diag.statement_position, diag.internal_position) == (None, None)
        assert diag.internal_query is None


def test_what_is_kept_of_an_error_has_no_part_of_a_query() -> None:
    error = ErrorResponse({"C": b"42703", "M": b"x" * 5000, "p": b"4999", "q": b"x" * 5000})
    kept = kept_error(error, b"UTF8").fields
    assert (len(kept["M"]), kept["p"], "q" in kept) == (4096 + 5, b"4999", False)
