"""Calls from inside the database: functions, triggers, views, and whatever else the server runs.

Each requirement of such a call has its tests here and in test_in_database_waits; what the functions
do is tested with direct calls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import psutil
import psycopg
import pytest
from psycopg import sql

from tests.support import background
from tests.support.background import failure, message, notices, wait_until
from tests.support.in_database import handle, inside, launch, one, rows, with_extension
from tests.support.servers import Connection, Proxy, Server, psql

pytestmark = pytest.mark.every_server

_number = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def extension(server: Server, proxy: Proxy, scratch: str) -> Iterator[None]:
    """The module's database has the extension, and what these tests need beside it."""
    with server.connect(dbname=scratch) as conn:
        conn.execute("CREATE TABLE done (place text); GRANT ALL ON done TO PUBLIC")
    yield from with_extension(server, proxy, scratch)


def launched(conn: Connection) -> int:
    """How many jobs this session has launched."""
    return int(one(conn, "SELECT (pg_background_stats_v2()).workers_launched"))


# --- anywhere --------------------------------------------------------------------------------

JOB = "$j$INSERT INTO done VALUES ('{place}')$j$"
CALL = f"pg_background_launch({JOB})"

# Where the call stands; {call} is it.
PLACES = {
    "do": "DO $$ DECLARE p int; BEGIN p := {call}; END $$",
    "perform": "DO $$ BEGIN PERFORM {call}; END $$",
    "exception": "DO $$ BEGIN BEGIN PERFORM {call}; PERFORM 1/0; EXCEPTION WHEN"
    " division_by_zero THEN NULL; END; END $$",
    "function": "CREATE FUNCTION f_function() RETURNS int LANGUAGE plpgsql AS"
    " $$ BEGIN RETURN {call}; END $$; SELECT f_function()",
    "sql_function": "CREATE FUNCTION f_sql() RETURNS int LANGUAGE sql AS"
    " $$ SELECT {call} $$; SELECT f_sql()",
    "procedure": "CREATE PROCEDURE p_procedure() LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM {call}; END $$; CALL p_procedure()",
    "trigger": "CREATE TABLE t_trigger (x int); CREATE FUNCTION f_trigger() RETURNS trigger"
    " LANGUAGE plpgsql AS $$ BEGIN PERFORM {call}; RETURN NEW; END $$;"
    " CREATE TRIGGER t BEFORE INSERT ON t_trigger FOR EACH ROW EXECUTE PROCEDURE f_trigger();"
    " INSERT INTO t_trigger VALUES (1)",
    "deferred_trigger": "CREATE TABLE t_deferred (x int); CREATE FUNCTION f_deferred() RETURNS"
    " trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM {call}; RETURN NEW; END $$;"
    " CREATE CONSTRAINT TRIGGER t AFTER INSERT ON t_deferred DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE PROCEDURE f_deferred(); INSERT INTO t_deferred VALUES (1)",
    "view": "CREATE VIEW v_view AS SELECT {call} AS pid; SELECT * FROM v_view",
    "rule": "CREATE TABLE t_rule (x int); CREATE RULE r AS ON INSERT TO t_rule"
    " DO INSTEAD SELECT {call}; INSERT INTO t_rule VALUES (1)",
    "join": "SELECT * FROM (SELECT 1 AS x) a JOIN (SELECT {call} AS pid OFFSET 0) b ON true",
    "where": "SELECT 1 WHERE {call} > 0",
    "cte": "WITH l AS (SELECT {call} AS pid) SELECT * FROM l",
    "lateral": "SELECT l.pid FROM generate_series(1, 1) i,"
    " LATERAL pg_background_launch_v2({job}) l",
    "insert_select": "CREATE TEMP TABLE t_select (pid int); INSERT INTO t_select SELECT {call}",
    "returning": "CREATE TEMP TABLE t_returning (x int);"
    " INSERT INTO t_returning VALUES (1) RETURNING {call}",
    "default": "CREATE TEMP TABLE t_default (x int, pid int DEFAULT {call});"
    " INSERT INTO t_default (x) VALUES (1)",
    "create_table_as": "CREATE TEMP TABLE t_as AS SELECT {call} AS pid",
    "values": "VALUES ({call})",
    "union": "SELECT 1 UNION ALL SELECT {call}",
    "cursor": "BEGIN; DECLARE c CURSOR FOR SELECT {call} AS pid OFFSET 0; FETCH c; COMMIT",
    "prepare": "PREPARE p_prepare AS WITH q AS (SELECT {call} AS pid) SELECT * FROM q;"
    " EXECUTE p_prepare",
    "explain": "EXPLAIN ANALYZE SELECT {call}",
    "case": "WITH q AS (SELECT CASE WHEN true THEN {call} ELSE 1/0 END AS x) SELECT * FROM q",
    "copy": "COPY (SELECT {call}) TO STDOUT",
    "order_by": "SELECT 1 ORDER BY {call}",
    "psql_file": "SELECT count(*) FROM (SELECT {call} FROM generate_series(1, 1)) s",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_call_from(proxy: Proxy, scratch: str, observer: Connection, place: str) -> None:
    if place == "procedure" and observer.info.server_version < 110000:
        pytest.skip("procedures came with 11")
    job = JOB.format(place=place)
    script = PLACES[place].format(call=f"pg_background_launch({job})", job=job)
    done = psql(proxy.port, "-v", "ON_ERROR_STOP=1", input=script, dbname=scratch)
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr
    count = "SELECT count(*) FROM done WHERE place = %s"
    wait_until(lambda: one(observer, count, [place]))
    assert one(observer, count, [place]) == 1


@pytest.mark.parametrize("prepare", [False, True])
def test_a_call_in_the_extended_protocol(conn: Connection, prepare: bool) -> None:
    query = "WITH q AS (SELECT pg_background_launch(%s) AS pid) SELECT pid FROM q"
    for number in range(3):
        row = conn.execute(query, [f"SELECT {number}"], prepare=prepare).fetchone()
        assert row is not None
        assert background.result(conn, row[0], "n int") == [(number,)]


def test_calls_in_a_pipeline(conn: Connection) -> None:
    query = "WITH q AS (SELECT pg_background_launch('SELECT 1') AS pid) SELECT pid FROM q"
    with conn.pipeline():
        cursors = [conn.execute(query) for _ in range(5)]
    for cursor in cursors:
        [(pid,)] = cursor.fetchall()
        assert background.result(conn, pid, "n int") == [(1,)]


def test_a_branch_that_is_not_taken_calls_nothing(conn: Connection) -> None:
    before = launched(conn)
    conn.execute("WITH q AS (SELECT CASE WHEN false THEN pg_background_launch('x') END) TABLE q")
    conn.execute("WITH q AS (SELECT pg_background_launch(NULL)) TABLE q")
    assert launched(conn) == before


def test_direct_and_inside_see_the_same_jobs(conn: Connection) -> None:
    pid = launch(conn, "SELECT 7 AS n")
    assert background.result(conn, pid) == [(7,)]
    pid = background.launch(conn, "SELECT 8 AS n")
    assert inside(conn, f"n FROM pg_background_result({pid}) AS (n int)") == "8"


def test_inside_the_argument_of_a_direct_call(conn: Connection) -> None:
    # The batch is served message by message, and the server calls in the middle of it.
    conn.execute(
        "CREATE OR REPLACE FUNCTION made_sql() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " RETURN 'SELECT ' || pg_background_launch('SELECT 1'); END $$"
    )
    row = conn.execute("SELECT pg_background_launch(made_sql())").fetchone()
    assert row is not None
    [(inner,)] = background.result(conn, row[0], "pid int")
    assert background.result(conn, inner, "n int") == [(1,)]


def test_the_audit_row_outlives_the_rollback(conn: Connection, observer: Connection) -> None:
    conn.execute("CREATE TABLE audit_log (at timestamptz, event text)")
    conn.execute(
        "CREATE FUNCTION log_audit(e text) RETURNS void LANGUAGE plpgsql AS $$"
        " DECLARE h pg_background_handle; BEGIN h := pg_background_submit_v2(format("
        "'INSERT INTO audit_log VALUES (now(), %L)', e));"
        " PERFORM pg_background_detach_v2(h.pid, h.cookie); END $$"
    )
    with conn.transaction(force_rollback=True):
        conn.execute("SELECT log_audit('it''s ünique')")
    wait_until(lambda: one(observer, "SELECT count(*) FROM audit_log"))
    assert one(observer, "SELECT event FROM audit_log") == "it's ünique"


def test_fan_out(conn: Connection) -> None:
    conn.execute("CREATE TEMP TABLE sums (n int)")
    conn.execute(
        "DO $$ DECLARE pids int[]; p int; BEGIN"
        " FOR i IN 1..8 LOOP pids[i] := pg_background_launch(format('SELECT %s', i)); END LOOP;"
        " FOREACH p IN ARRAY pids LOOP"
        " INSERT INTO sums SELECT n FROM pg_background_result(p) AS (n int); END LOOP; END $$"
    )
    assert one(conn, "SELECT sum(n) FROM sums") == 36


# --- every function --------------------------------------------------------------------------


def test_every_function(conn: Connection) -> None:
    pid, cookie = handle(conn, "SELECT 1 UNION SELECT 2")
    at = f"{pid}, {cookie}"
    assert inside(conn, f"pg_background_wait({at})") == "true"
    assert inside(conn, f"pg_background_wait_v2({at})") == ""
    assert inside(conn, f"pg_background_wait_v2_timeout({at}, 0)") == "true"
    assert inside(conn, f"pg_background_full_sql({at})") == "SELECT 1 UNION SELECT 2"
    assert inside(conn, f"(pg_background_outcome({at})).state") == "stopped"
    assert inside(conn, "(pg_background_outcome_v2(1, 2)).state IS NULL") == "true"
    assert inside(conn, f"pg_background_status_v2({at}) ->> 'row_count'") == "2"
    assert inside(conn, f"(pg_background_result_info({at})).command_tag") == "SELECT"
    assert inside(conn, f"(pg_background_result_info_v2({at})).row_count") == "2"
    assert inside(conn, f"(pg_background_error_info({at})) IS NULL") == "true"
    assert inside(conn, f"(pg_background_get_progress({at})).progress_pct IS NULL") == "true"
    assert inside(conn, f"state FROM pg_background_list WHERE pid = {pid}") == "stopped"
    assert inside(conn, f"pgbg_state FROM pg_background_activity WHERE pid = {pid}") == "stopped"
    assert inside(conn, f"count(*) FROM pg_background_result_v2({at}) AS (n int)") == "2"
    assert int(inside(conn, "(pg_background_stats()).workers_launched")) == 1
    assert inside(conn, "(pg_background_stats_v2()).max_workers") == "16"
    assert inside(conn, "(pg_background_run_v2('SELECT 1', 0, 0, 'lab')).label") == "lab"
    assert inside(conn, "n FROM pg_background_run_query('SELECT 5', 0, 0) AS (n int)") == "5"
    drained = "array_agg(state) FROM pg_background_drain(ARRAY[{0}, {0}])"
    launch_one = "pg_background_submit('SELECT 1')"
    assert inside(conn, drained.format(launch_one)) == "{stopped,stopped}"
    assert inside(conn, f"(pg_background_wait_any(ARRAY[{launch_one}])).pid > 0") == "true"
    sleeps = "pg_background_launch_v2('SELECT pg_sleep(60)', 0, 'sleeper')"
    assert int(inside(conn, f"({sleeps}).pid")) > 0
    assert inside(conn, "pg_background_cancel_by_label('sleep%', 5000)") == "1"
    assert int(inside(conn, f"({sleeps}).pid")) > 0
    assert inside(conn, "pg_background_cancel_all()") == "1"
    wait_until(lambda: inside(conn, "(pg_background_stats()).workers_active") == "0")
    assert int(inside(conn, "pg_background_purge()")) > 0
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    assert inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)") == ""
    assert inside(conn, f"(pg_background_error_info_v2({pid}, {cookie})).sqlstate") == "57014"
    assert inside(conn, f"pg_background_detach({pid}, {cookie})") == ""
    assert inside(conn, "pg_background_detach_all()") == "0"


def test_the_list_with_nine_columns_and_with_ten(conn: Connection) -> None:
    pid, _ = handle(conn, "SELECT 1")
    nine = (
        "pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4,"
        " state text, sql_preview text, last_error text, consumed bool"
    )
    for columns in (nine, f"{nine}, label text"):
        listed = f"sql_preview FROM pg_background_list_v2() AS ({columns}) WHERE pid = {pid}"
        assert inside(conn, listed) == "SELECT 1"


# --- results ---------------------------------------------------------------------------------


def test_results_of_many_types(conn: Connection) -> None:
    job = (
        "SELECT 1::int2, 2::int8, 1.5::numeric, 'NaN'::float8, true, 'a b'::text, ''::text,"
        " NULL::text, 'NULL'::text, E'q\"u\\\\o,t{e}'::text, '\\x00ff'::bytea, ARRAY[1,NULL,3],"
        " ARRAY['x y', NULL, 'NULL'], '{\"a\": [1]}'::jsonb, DATE '2026-02-01',"
        " interval '1 day -2 hours', 'abc'::bpchar(5), 'x'::\"char\", point(1,2), box '(1,2),(3,4)'"
    )
    columns = (
        "a int2, b int8, c numeric, d float8, e bool, f text, g text, h text, i text, j text,"
        ' k bytea, l int[], m text[], n jsonb, o date, p interval, q bpchar, r "char", s point,'
        " t box"
    )
    [row] = rows(conn, job, columns)
    expected = conn.execute(job.encode()).fetchone()
    assert row == expected or str(row) == str(expected)


def test_a_result_has_the_types_of_its_column_definition_list(conn: Connection) -> None:
    mismatch = (
        "42804",
        "remote query result rowtype does not match the specified FROM clause rowtype",
    )
    no_rows = (
        "42804",
        "remote query did not return a result set, but result rowtype is not a single text column",
    )
    query = (
        "WITH l AS (SELECT pg_background_launch($j${}$j$) AS pid)"
        " SELECT r.* FROM l, pg_background_result(l.pid) AS r({})"
    )
    for job, columns, error in (
        ("SELECT 1", "a int8", mismatch),
        ("SELECT 1", "a text", mismatch),
        ("SELECT 1, 2", "a int", mismatch),
        ("SELECT 1", "a int, b int", mismatch),
        ("SELECT", "a int", mismatch),
        ("SELECT 1 WHERE false", "a text", mismatch),
        ("CREATE TEMP TABLE x ()", "a int", no_rows),
        ("CREATE TEMP TABLE x ()", "a text, b text", no_rows),
    ):
        assert message(failure(conn, query.format(job, columns).encode())) == error, job
    assert rows(conn, "SELECT 1 WHERE false", "a int") == []
    assert rows(conn, "CREATE TEMP TABLE x (); CREATE TEMP TABLE y ()", "a text") == [
        ("CREATE TABLE",),
        ("CREATE TABLE",),
    ]
    assert rows(conn, "", "a text") == []
    assert rows(conn, "SELECT '=r/postgres'::aclitem", "a text") == [("=r/postgres",)]
    found = rows(conn, "SELECT 'abcdef'::varchar(20), 1.5", "a varchar(10), b numeric(5,2)")
    assert [(a, str(b)) for a, b in found] == [("abcdef", "1.50")]


def test_a_result_is_read_with_the_styles_that_its_job_had(conn: Connection) -> None:
    conn.execute("SET datestyle = 'SQL, DMY'; SET intervalstyle = 'sql_standard'")
    pid = launch(conn, "SELECT DATE '2026-02-01', interval '-1 2:03:00'")
    conn.execute("SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres'")
    query = f"r::text FROM pg_background_result({pid}) AS r(a date, b interval)"
    assert inside(conn, query) == '(2026-02-01,"-1 days -02:03:00")'
    assert one(conn, "SHOW datestyle") == "ISO, MDY"


def test_the_styles_of_a_job_that_has_not_ended(conn: Connection) -> None:
    """Only the end of a batch brings a report of them."""
    conn.execute("SET datestyle = 'SQL, DMY'")
    pid = launch(conn, "SELECT DATE '2026-02-01' FROM generate_series(1, 20000)")
    conn.execute("SET datestyle = 'ISO, MDY'")
    query = f"min(a) || ' ' || max(a) FROM pg_background_result({pid}) AS r(a date)"
    assert inside(conn, query) == "2026-02-01 2026-02-01"


@pytest.mark.parametrize("rows", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_rows(proxy: Proxy, conn: Connection, rows: int) -> None:
    job = f"SELECT i, md5(i::text) FROM generate_series(1, {rows}) i"
    query = (
        "SELECT count(*), sum(i), md5(string_agg(t, '')) FROM"
        " (SELECT pg_background_launch({}) AS pid OFFSET 0) l,"
        " LATERAL pg_background_result(l.pid) AS r(i int, t text)"
    )
    direct = "SELECT count(*), sum(i), md5(string_agg(md5, '')) FROM ({}) s"
    memory = background_memory(proxy)
    found = conn.execute(sql.SQL(query).format(job)).fetchone()
    assert found == conn.execute(direct.format(job).encode()).fetchone()
    assert background_memory(proxy) - memory < 20_000_000


def background_memory(proxy: Proxy) -> int:
    """The proxy's memory in bytes."""
    return int(psutil.Process(proxy.pid).memory_info().rss)


def test_a_result_is_there_once(conn: Connection) -> None:
    pid = launch(conn, "SELECT 1")
    query = f"DO $$ BEGIN PERFORM * FROM pg_background_result({pid}) AS (n int); END $$"
    conn.execute(query.encode())
    error = failure(conn, query.encode())
    assert message(error) == ("42704", f"PID {pid} is not attached to this session")


def test_notices_of_a_job_come_with_its_result(conn: Connection) -> None:
    job = "DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$"
    with notices(conn) as heard:
        assert rows(conn, job, "a text") == [("DO",)]
    assert [(n["severity"], n["message_primary"]) for n in heard] == [
        ("NOTICE", "one"),
        ("WARNING", "two"),
    ]
    assert all("background worker, pid" in str(n["context"]) for n in heard)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sqlstate", "text"),
    [
        (
            "* FROM pg_background_result(999999) AS (n int)",
            "42704",
            "PID 999999 is not attached to this session",
        ),
        ("pg_background_detach(999999)", "42704", "PID 999999 is not attached to this session"),
        ("pg_background_launch('x', 1)", "22023", "queue size must be at least 64 bytes"),
        ("pg_background_launch_v2(NULL, 0, 'x')", "22004", "sql must not be null"),
        ("pg_background_cancel_by_label('x\\')", "22025", None),
        (
            "pg_background_progress(1)",
            "0A000",
            "pg_background_progress can only be called from a background worker",
        ),
        (
            "* FROM pg_background_run_query('COMMIT', 0, 0) AS (a text)",
            "0A000",
            "transaction control statements are not allowed in pg_background",
        ),
        ("* FROM pg_background_run_query('SELECT 1/0', 0, 0) AS (a int)", "22012", None),
    ],
)
def test_errors_can_be_caught(conn: Connection, call: str, sqlstate: str, text: str | None) -> None:
    if "by_label" in call:
        # The server's LIKE sees the end of the pattern only if text is left.
        conn.execute("SELECT pg_background_launch_v2('SELECT pg_sleep(1)', 0, 'xy')")
    block = (
        "DO $d$ BEGIN PERFORM {}; EXCEPTION WHEN SQLSTATE '{}' THEN"
        " RAISE NOTICE '%: %', SQLSTATE, SQLERRM; END $d$"
    )
    with notices(conn) as heard:
        conn.execute(block.format(call, sqlstate).encode())
    [notice] = heard
    words = str(notice["message_primary"])
    assert words.startswith(f"{sqlstate}: ")
    assert text is None or words == f"{sqlstate}: {text}"
    error = failure(conn, f"DO $d$ BEGIN PERFORM {call}; END $d$".encode())
    assert error.sqlstate == sqlstate
    assert "_pg_background_" not in str(error.diag.context)


def test_an_error_of_a_job_keeps_its_fields(conn: Connection) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS keyed (n int CONSTRAINT keyed_once UNIQUE)")
    job = "INSERT INTO keyed VALUES (1), (1)"
    error = failure(
        conn,
        f"DO $$ BEGIN PERFORM r FROM pg_background_run_query('{job}') AS (r text); END $$".encode(),
    )
    assert error.sqlstate == "23505"
    diag = error.diag
    assert (diag.schema_name, diag.table_name, diag.constraint_name) == (
        "public",
        "keyed",
        "keyed_once",
    )
    assert diag.message_detail == "Key (n)=(1) already exists."
    assert diag.column_name is None
    assert str(diag.context).startswith("background worker, pid ")


def test_savepoints(conn: Connection) -> None:
    with conn.transaction():
        pid = launch(conn, "SELECT 1")
        with pytest.raises(psycopg.errors.UndefinedObject), conn.transaction():
            inside(conn, "pg_background_detach(999999)")
        # The job is not undone by a rollback, as nothing of it is in this transaction.
        with conn.transaction(force_rollback=True):
            second = launch(conn, "SELECT 2")
        assert background.result(conn, pid, "n int") == [(1,)]
        assert background.result(conn, second, "n int") == [(2,)]


def test_in_a_failed_transaction(conn: Connection) -> None:
    conn.execute("BEGIN")
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("SELECT 1/0")
    assert failure(conn, "WITH q AS (SELECT pg_background_launch('x')) TABLE q").sqlstate == "25P02"
    conn.execute("ROLLBACK")


# --- transactions ----------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["READ WRITE", "READ ONLY"])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_isolation_levels(conn: Connection, level: str, access: str) -> None:
    conn.execute(f"BEGIN ISOLATION LEVEL {level} {access}".encode())
    conn.execute("SELECT count(*) FROM done")  # the snapshot is taken
    pid, cookie = handle(conn, "SELECT i, repeat('x', 50) FROM generate_series(1, 100) i")
    assert inside(conn, f"pg_background_wait({pid}, {cookie})") == "true"
    assert inside(conn, f"(pg_background_outcome({pid}, {cookie})).state") == "stopped"
    fetched = f"sum(i) FROM pg_background_result({pid}, {cookie}) AS (i int, t text)"
    assert inside(conn, fetched) == "5050"
    pid, cookie = handle(conn, "SELECT pg_sleep(60)")
    assert inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)") == ""
    assert inside(conn, f"pg_background_detach({pid}, {cookie})") == ""
    assert inside(conn, "(pg_background_submit('SELECT 1')).pid > 0") == "true"
    conn.execute("COMMIT")


# --- the session's role and settings ----------------------------------------------------------


def test_settings_that_hold_in_a_function(conn: Connection) -> None:
    conn.execute("SET my.custom = 'from the session'")
    conn.execute(
        "CREATE OR REPLACE FUNCTION with_settings() RETURNS int LANGUAGE plpgsql"
        " SET search_path = pg_catalog SET work_mem = '77MB' AS $$ BEGIN"
        " PERFORM set_config('my.custom', 'from the function', true);"
        " RETURN public.pg_background_launch('SELECT current_setting(''search_path''),"
        " current_setting(''work_mem''), current_setting(''my.custom'', true)'); END $$"
    )
    pid = one(conn, "SELECT with_settings()")
    assert background.result(conn, pid) == [("pg_catalog", "77MB", "from the function")]


@pytest.fixture
def roles(observer: Connection, scratch: str) -> Iterator[tuple[str, str, str]]:
    """Three roles: one that logs in, one that it may become, one that it may not. The last two may
    call the functions."""
    n = next(_number)
    names = (f"login_{n}", f"member_{n}", f"stranger_{n}")
    login, member, stranger = names
    observer.execute(
        f"CREATE ROLE {login} LOGIN NOINHERIT; CREATE ROLE {member}; CREATE ROLE {stranger}"
    )
    observer.execute(f"GRANT {member} TO {login}; GRANT pgbackground_role TO {member}, {stranger}")
    yield names
    query = "SELECT 1 FROM pg_stat_activity WHERE usename = %s"
    wait_until(lambda: not observer.execute(query, [login]).fetchone())
    observer.execute(f"DROP OWNED BY {', '.join(names)} CASCADE")
    observer.execute(f"DROP ROLE {', '.join(names)}")


WHO = "pg_background_launch('SELECT current_user::text, session_user::text')"


def test_a_job_runs_as_the_current_role(
    proxy: Proxy, scratch: str, roles: tuple[str, str, str]
) -> None:
    login, member, _ = roles
    with proxy.connect(dbname=scratch, user=login) as conn:
        conn.execute(f"SET ROLE {member}")
        pid = int(inside(conn, WHO))
        assert background.result(conn, pid) == [(member, login)]
        # Its result is more than what application_name can show to other roles.
        assert len(rows(conn, "SELECT repeat('x', 5000)", "t text")[0][0]) == 5000


def test_security_definer(
    proxy: Proxy, scratch: str, roles: tuple[str, str, str], observer: Connection
) -> None:
    """Code of another owner speaks for its owner, and never for the role that logged in."""
    login, member, stranger = roles
    for owner in (member, stranger):
        observer.execute(
            f"CREATE FUNCTION as_{owner}() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER AS"
            " $$ SELECT a || ' ' || b FROM pg_background_result(pg_background_launch("
            "'SELECT current_user::text, session_user::text; ')) r(a text, b text) $$;"
            f" ALTER FUNCTION as_{owner}() OWNER TO {owner}"
        )
    observer.execute(f"ALTER ROLE {stranger} LOGIN".encode())
    with proxy.connect(dbname=scratch, user=login) as conn:
        assert one(conn, f"SELECT as_{stranger}()") == f"{stranger} {stranger}"
        conn.execute(f"SET ROLE {member}".encode())
        assert one(conn, f"SELECT as_{stranger}()") == f"{stranger} {stranger}"
        for role in ("none", member):
            conn.execute(f"SET ROLE {role}".encode())
            error = failure(conn, f"SELECT as_{member}()")
            assert message(error) == (
                "42501",
                f'cannot start a background worker as role "{member}"',
            )
            assert "not permitted to log in" in (error.diag.message_detail or "")
            hint = error.diag.message_hint or ""
            for place in (f'"{member}"', "passfile", "auth_file", "auth_query"):
                assert place in hint


def test_execute_is_what_counts(
    proxy: Proxy, scratch: str, roles: tuple[str, str, str], observer: Connection
) -> None:
    login, _, _ = roles
    with proxy.connect(dbname=scratch, user=login) as conn:
        error = failure(conn, f"WITH q AS (SELECT {WHO}) TABLE q")
        assert message(error) == ("42501", "permission denied for function pg_background_launch")
        observer.execute(f"GRANT EXECUTE ON FUNCTION pg_background_launch(text, int) TO {login}")
        observer.execute(f"GRANT EXECUTE ON FUNCTION pg_background_result(int) TO {login}")
        assert rows(conn, "SELECT 1", "n int") == [(1,)]
        assert failure(conn, "WITH q AS (SELECT pg_background_purge()) TABLE q").sqlstate == "42501"


def test_a_revoked_right_holds_at_once(
    proxy: Proxy, scratch: str, roles: tuple[str, str, str], observer: Connection
) -> None:
    """Though the channel shows the word for the next call since the last one. The server checks the
    right for the function; what that calls is for everybody, and there the proxy does."""
    login, _, _ = roles
    function = "FUNCTION pg_background_detach_all()"
    call = (
        "DO $$ BEGIN PERFORM _pg_background_answer(_pg_background_ask("
        "'pg_background_detach_all() integer', CAST(ARRAY[] AS text[])), NULL); END $$"
    )
    denied = ("42501", "permission denied for function pg_background_detach_all")
    with proxy.connect(dbname=scratch, user=login) as conn:
        for _ in range(2):
            observer.execute(f"GRANT EXECUTE ON {function} TO {login}".encode())
            for _ in range(3):
                conn.execute(call.encode())
            observer.execute(f"REVOKE EXECUTE ON {function} FROM {login}".encode())
            assert message(failure(conn, call.encode())) == denied


def test_a_proof_is_good_for_one_question(conn: Connection) -> None:
    """Whatever was said in the session is worth nothing when it is said again."""
    launch(conn, "SELECT 1")
    before = launched(conn)
    conn.execute(
        "DO $$ DECLARE asked text[]; said text[]; BEGIN"
        " asked := _pg_background_ask('pg_background_launch(sql, queue_size) integer',"
        "  ARRAY['SELECT 1', '0']);"
        " said := ARRAY[current_setting('pg_background_proxy.message')];"
        " PERFORM _pg_background_answer(asked, ARRAY['work_mem', '64kB']);"
        " said := said || current_setting('pg_background_proxy.message');"
        " IF split_part(said[1], ' ', 3) <> 'ask' OR said[1] LIKE '% -'"
        "  OR split_part(said[2], ' ', 3) <> 'settings' THEN RAISE EXCEPTION '%', said; END IF;"
        " FOR i IN 0..5 LOOP"
        "  PERFORM set_config('pg_background_proxy.message', said[i % 2 + 1], true);"
        "  PERFORM _pg_background_say(); PERFORM pg_sleep(0.05); END LOOP;"
        " PERFORM pg_background_launch('SELECT 1'); END $$"
    )
    assert launched(conn) == before + 2


# The words of a call, as the functions of the extension say it.
FORGED = """
DO $$ DECLARE session text := current_setting('pg_background_proxy.session'); words text;
BEGIN
  SELECT string_agg(coalesce(translate(encode(convert_to(w, 'UTF8'), 'base64'), chr(10), ''), '-'),
    ' ' ORDER BY n) INTO words FROM unnest(ARRAY[{words}]) WITH ORDINALITY u(w, n);
  RAISE INFO '% % {verb} %', left(session, 32), md5(random()::text), words;
  PERFORM pg_sleep(0.3);
END $$
"""


def test_forged_messages(
    proxy: Proxy, scratch: str, roles: tuple[str, str, str], observer: Connection
) -> None:
    login, _member, stranger = roles
    place = f"forged_{login}"
    job = f"$j$INSERT INTO done VALUES ('{place}')$j$"
    function = "'pg_background_launch(sql, queue_size) integer', 'UTF8'"
    with proxy.connect(dbname=scratch, user=login) as conn, notices(conn) as heard:
        for role, verb in itertools.product(
            (login, stranger, "postgres", "nobody"), ("call", "ask", "settings")
        ):
            words = f"{function}, '{role}', '{role}', '16', '64kB', '0', '2', {job}, '0'"
            conn.execute(FORGED.format(verb=verb, words=words).encode())
            words = f"{function}, '{role}', '{login}', '16', '64kB', '0', '2', {job}, '0'"
            conn.execute(FORGED.format(verb=verb, words=words).encode())
        for words in ("'x'", f"{function}, 'x'", "NULL", f"{function}, NULL, '', '', '', '', '-1'"):
            conn.execute(FORGED.format(verb="call", words=words).encode())
        assert conn.execute("SELECT 1").fetchone() == (1,)
        # Nothing that others say is a call.
        assert len(heard) == 28
        heard.clear()
        # A message that no function of the extension would send is not a call.
        said = ("next x", "narrow 1234567890", "call AA==", "call =", "custom", "", "other")
        for words in said:
            conn.execute(
                "DO $$ BEGIN RAISE INFO '% % %', left(current_setting("
                f"'pg_background_proxy.session'), 32), md5('x'), '{words}'; END $$".encode()
            )
        conn.execute("DO $$ BEGIN PERFORM pg_sleep(0.1); END $$")
        assert len(heard) == len(said)
    assert one(observer, "SELECT count(*) FROM done WHERE place = %s", [place]) == 0


SPEAK = {
    "itself": "RAISE INFO '%', message;",
    "by the last helper": "PERFORM set_config('pg_background_proxy.message', message, true);"
    " PERFORM public._pg_background_say();",
    "by the first": "PERFORM public._pg_background_ask(words[1], words[7:]);",
    "and by the next": "PERFORM public._pg_background_answer("
    "public._pg_background_ask(words[1], words[7:]), ARRAY['work_mem', '64kB']);",
}


@pytest.mark.parametrize("how", SPEAK)
def test_code_of_others_does_not_speak_for_the_session(
    conn: Connection, roles: tuple[str, str, str], observer: Connection, how: str
) -> None:
    """A superuser reindexes a table whose owner has a function in the index."""
    _login, _member, stranger = roles
    observer.execute(f"CREATE SCHEMA of_{stranger} AUTHORIZATION {stranger}".encode())
    observer.execute(f"SET ROLE {stranger}; SET search_path = of_{stranger}".encode())
    observer.execute(
        f"""CREATE FUNCTION f(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $f$
        DECLARE words text[] := ARRAY['pg_background_launch(sql, queue_size) integer', 'UTF8',
            '16', '64kB', '0', '2', $j$INSERT INTO done VALUES ('{stranger}')$j$, '0'];
          message text;
        BEGIN
          SELECT concat_ws(' ', left(current_setting('pg_background_proxy.session'), 32),
              md5(random()::text), 'call', string_agg(translate(encode(
                convert_to(w, 'UTF8'), 'base64'), chr(10), ''), ' ' ORDER BY n))
            INTO message FROM unnest(words || ARRAY['postgres', 'postgres'])
            WITH ORDINALITY u(w, n);
          {SPEAK[how]}
          PERFORM pg_sleep(0.3);
          RETURN 1;
        EXCEPTION WHEN OTHERS THEN
          RETURN 2;
        END $f$; CREATE TABLE t AS SELECT 1 AS a; CREATE INDEX ON t (f(a))""".encode()
    )
    observer.execute("RESET ROLE; RESET search_path")
    conn.execute(f"REINDEX TABLE of_{stranger}.t".encode())
    assert one(observer, "SELECT count(*) FROM done WHERE place = %s", [stranger]) == 0
    assert one(conn, "SELECT workers_launched FROM pg_background_stats()") == 0


def test_a_message_with_another_sessions_token_is_no_call(
    proxy: Proxy, scratch: str, conn: Connection
) -> None:
    with proxy.connect(dbname=scratch) as other:
        session = one(other, "SHOW pg_background_proxy.session")
        with notices(conn) as heard:
            conn.execute(
                f"DO $$ BEGIN RAISE INFO '{session[:32]} {'0' * 32} call x'; END $$".encode()
            )
        assert len(heard) == 1
        assert session != one(conn, "SHOW pg_background_proxy.session")


# --- without the proxy ------------------------------------------------------------------------


def test_a_direct_connection_is_told_at_once(observer: Connection) -> None:
    begin = time.monotonic()
    for query in (
        "SELECT pg_background_launch('SELECT 1')",
        "SELECT * FROM pg_background_result(1) AS (n int)",
        "SELECT * FROM pg_background_list",
        "DO $$ BEGIN PERFORM pg_background_stats(); END $$",
    ):
        error = failure(observer, query.encode())
        assert message(error) == (
            "55000",
            "this session does not go through pg-background-proxy",
        )
        assert "pg-background-proxy" in str(error.diag.message_hint)
    assert time.monotonic() - begin < 10


# --- in jobs -----------------------------------------------------------------------------------


def test_a_job_that_launches_jobs(conn: Connection, observer: Connection) -> None:
    pid = background.launch(
        conn, "SELECT pg_background_launch('INSERT INTO done VALUES (''sub'')')"
    )
    [(inner,)] = background.result(conn, pid)
    count = "SELECT count(*) FROM done WHERE place = 'sub'"
    wait_until(lambda: one(observer, count) == 1)
    # It was the job's own.
    error = failure(conn, "SELECT pg_background_detach(%s)", [inner])
    assert message(error) == ("42704", f"PID {inner} is not attached to this session")
    nested = "SELECT n + 1 FROM pg_background_run_query('SELECT 41', 0, 0) AS (n int)"
    assert rows(conn, nested, "n int") == [(42,)]
    deeper = f"SELECT n * 2 FROM pg_background_run_query($q${nested}$q$, 0, 0) AS (n int)"
    assert rows(conn, deeper, "n int") == [(84,)]
    error = failure(
        conn,
        "SELECT * FROM pg_background_result(%s)",
        [launch(conn, "SELECT pg_background_detach(1)")],
    )
    assert message(error) == ("42704", "PID 1 is not attached to this session")


def test_a_job_that_waits_is_canceled(conn: Connection, observer: Connection) -> None:
    job = "SELECT pg_background_run('SELECT pg_sleep(62)')"
    pid, cookie = handle(conn, job)
    runs = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(62)'"
    wait_until(lambda: one(observer, runs) == 1)
    assert inside(conn, f"pg_background_cancel({pid}, {cookie}, 5000)") == ""
    assert inside(conn, f"(pg_background_outcome({pid}, {cookie})).state") == "canceled"
    wait_until(lambda: one(observer, runs) == 0)


def test_a_trigger_in_a_job(conn: Connection, observer: Connection) -> None:
    conn.execute(
        "CREATE TABLE watched (n int); CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ DECLARE h pg_background_handle; BEGIN h := pg_background_submit_v2(format("
        "'INSERT INTO done VALUES (''watched %s'')', NEW.n));"
        " PERFORM pg_background_detach_v2(h.pid, h.cookie); RETURN NEW; END $$;"
        " CREATE TRIGGER watch BEFORE INSERT ON watched FOR EACH ROW EXECUTE PROCEDURE watch()"
    )
    job = "INSERT INTO watched SELECT generate_series(1, 3)"
    assert rows(conn, job, "tag text") == [("INSERT 0 3",)]
    count = "SELECT count(*) FROM done WHERE place LIKE 'watched %'"
    wait_until(lambda: one(observer, count) == 3)


# --- sessions that are not as usual --------------------------------------------------------------

HOSTILE = """
SET search_path = evil, pg_catalog; SET array_nulls = off;
SET transform_null_equals = on; SET bytea_output = 'escape'; SET datestyle = 'German, DMY';
SET intervalstyle = 'sql_standard'; SET extra_float_digits = -15; SET client_min_messages = error;
SET lock_timeout = '1ms'; SET backslash_quote = off; SET timezone = 'Asia/Kathmandu';
SET plpgsql.extra_errors = 'all'; SET plpgsql.variable_conflict = 'use_column';
SET quote_all_identifiers = on; SET default_transaction_isolation = 'serializable'
"""


def test_a_session_with_hostile_settings(conn: Connection) -> None:
    conn.execute(
        "CREATE SCHEMA evil; CREATE DOMAIN evil.int4 AS text CHECK (false);"
        " CREATE FUNCTION evil.fail(text, text) RETURNS bool LANGUAGE sql AS 'SELECT 1/0 > 0';"
        " CREATE FUNCTION evil.fail(int, int) RETURNS bool LANGUAGE sql AS 'SELECT 1/0 > 0';"
        " CREATE OPERATOR evil.= (PROCEDURE = evil.fail, LEFTARG = text, RIGHTARG = text);"
        " CREATE OPERATOR evil.<> (PROCEDURE = evil.fail, LEFTARG = text, RIGHTARG = text);"
        " CREATE OPERATOR evil.> (PROCEDURE = evil.fail, LEFTARG = int, RIGHTARG = int);"
        " CREATE FUNCTION evil.cardinality(text[]) RETURNS int LANGUAGE sql AS 'SELECT 1/0';"
        " CREATE FUNCTION evil.unnest(text[]) RETURNS SETOF text LANGUAGE sql AS"
        " 'SELECT (1/0)::text';"
        " CREATE FUNCTION evil.format(text, text) RETURNS text LANGUAGE sql AS"
        " 'SELECT (1/0)::text'"
    )
    conn.execute(HOSTILE)
    if conn.info.server_version < 190000:  # since then it cannot be set to off
        conn.execute("SET standard_conforming_strings = off")
    run = (
        "DO $d$ DECLARE h public.pg_background_handle; r record; BEGIN"
        " h := public.pg_background_launch_v2($j$SELECT 1, NULL::text, 'NULL'::text, DATE"
        " '2026-02-01', E'a\\\\b'::text, 0.1::float8, interval '-1 2:03' $j$);"
        " PERFORM public.pg_background_wait(h.pid, h.cookie);"
        " PERFORM state FROM public.pg_background_list WHERE pid = h.pid;"
        " SELECT * INTO r FROM public.pg_background_result(h.pid, h.cookie) AS"
        " (a pg_catalog.int4, b text, c text, d date, e text, f float8, g interval);"
        " IF r.b IS NOT NULL OR r.c IS NULL OR r.d IS DISTINCT FROM DATE '2026-02-01' THEN"
        " RAISE EXCEPTION '%', r; END IF;"
        " RAISE INFO '% % %', r.a, r.e, pg_catalog.to_char(r.d, 'YYYY-MM-DD'); END $d$"
    )
    with notices(conn) as heard:
        conn.execute(run.encode())
    assert [n["message_primary"] for n in heard] == ["1 a\\b 2026-02-01"]


def test_a_session_that_was_reset(conn: Connection) -> None:
    launch(conn, "SELECT 1")
    for reset in ("RESET ALL", "DISCARD ALL", "SET SESSION AUTHORIZATION DEFAULT"):
        conn.execute(reset.encode())
        assert rows(conn, "SELECT 1", "n int") == [(1,)]


def test_a_superusers_session_as_somebody_else(
    conn: Connection, roles: tuple[str, str, str]
) -> None:
    """Its job is as the session is, and what the job runs could undo it, as the session could."""
    login, member, _ = roles
    conn.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {login}".encode())
    conn.execute(f"SET SESSION AUTHORIZATION {login}".encode())
    assert rows(conn, "SELECT current_user, session_user", "a name, b name") == [(login, login)]
    conn.execute(f"SET ROLE {member}".encode())
    assert rows(conn, "SELECT current_user, session_user", "a name, b name") == [(member, login)]
    conn.execute("RESET SESSION AUTHORIZATION")
    conn.execute(f"SET ROLE {member}".encode())
    who = "SELECT current_user, session_user, (SELECT rolsuper FROM pg_roles WHERE rolname ="
    who += " session_user)"
    assert rows(conn, who, "a name, b name, c bool")[0][::2] == (member, True)
    conn.execute("RESET ROLE")


@pytest.mark.parametrize(
    "commands",
    [
        "SET SESSION AUTHORIZATION {login}",
        "SET SESSION AUTHORIZATION {login}; SET ROLE {member}",
        "SET ROLE {member}; SET SESSION AUTHORIZATION {login}",
        "SET LOCAL SESSION AUTHORIZATION {login}; SET LOCAL ROLE {member}",
        "SET ROLE {member}",
    ],
)
def test_a_call_leaves_the_session_its_roles(
    conn: Connection, roles: tuple[str, str, str], commands: str
) -> None:
    """Its functions set other roles to prove which one calls, and undo that."""
    login, member, _ = roles
    conn.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {login}, {member}".encode())
    state = (
        "SELECT current_user, session_user, current_setting('role'),"
        " current_setting('session_authorization')"
    )
    untouched = conn.execute(state).fetchall()
    with conn.transaction(force_rollback=True):
        conn.execute(commands.format(login=login, member=member).encode())
        before = conn.execute(state).fetchall()
        assert rows(conn, "SELECT 1", "a int") == [(1,)]
        assert conn.execute(state).fetchall() == before
    assert conn.execute(state).fetchall() == untouched
