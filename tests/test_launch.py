"""pg_background_launch: how it is called, what it starts, and what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.conftest import StartProxy
from tests.support.background import (
    failure,
    has_ended,
    job_failure,
    launch,
    message,
    result,
    run,
    value,
    wait_until,
    wait_until_ended,
)
from tests.support.servers import Connection, Proxy, psql

pytestmark = pytest.mark.every_server

EXHAUSTIVE = [pytest.mark.exhaustive]

LOCK = 4711


@pytest.fixture
def lock(observer: Connection) -> str:
    """SQL of a job that waits until the test says unlock()."""
    observer.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    return f"SELECT pg_advisory_xact_lock_shared({LOCK})"


def unlock(observer: Connection) -> None:
    observer.execute("SELECT pg_advisory_unlock_all()")


# --- what comes back ---


def test_launch_returns_one_int4_named_after_the_function(conn: Connection) -> None:
    cursor = conn.execute("SELECT pg_background_launch('SELECT 1')")
    assert cursor.description is not None
    [column] = cursor.description
    assert (column.name, column.type_code) == ("pg_background_launch", 23)
    [[pid]] = cursor.fetchall()
    assert result(conn, pid) == [(1,)]


def test_pid_is_a_real_backend_of_the_same_role_and_database(
    conn: Connection, observer: Connection, lock: str, scratch: str
) -> None:
    job = f"{lock} /* watched */"
    pid = launch(conn, job)
    wait_until(
        lambda: observer.execute(
            "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active' AND query = %s",
            [pid, job],
        ).fetchone()
    )
    row = observer.execute(
        "SELECT usename, datname, application_name FROM pg_stat_activity WHERE pid = %s", [pid]
    ).fetchone()
    assert row == ("postgres", scratch, "pg_background")
    assert pid != conn.info.backend_pid
    unlock(observer)
    assert len(result(conn, pid)) == 1
    wait_until_ended(observer, pid)


def test_launch_comes_back_before_the_job_ends(
    conn: Connection, observer: Connection, lock: str
) -> None:
    pids = [launch(conn, lock) for _ in range(3)]
    unlock(observer)
    for pid in pids:
        assert len(result(conn, pid)) == 1


def test_every_launch_is_a_new_backend_and_the_old_one_goes(
    conn: Connection, observer: Connection
) -> None:
    pids = [launch(conn, "SELECT 1") for _ in range(4)]
    assert len(set(pids)) == 4
    assert [result(conn, pid) for pid in pids] == [[(1,)]] * 4
    for pid in pids:
        wait_until_ended(observer, pid)


def test_null_in_null_out_and_nothing_is_launched(conn: Connection, scratch: str) -> None:
    for arguments in (
        "NULL",
        "NULL, 65536",
        "'INSERT INTO no_such VALUES (1)', NULL",
        "sql => NULL",
        "(SELECT rolname::text FROM pg_roles WHERE false)",
    ):
        assert conn.execute(f"SELECT pg_background_launch({arguments})").fetchall() == [(None,)]
    for parameters in ([None, 0], ["SELECT 1", None]):
        row = conn.execute("SELECT pg_background_launch(%s, %s)", parameters).fetchone()
        assert row == (None,)


# --- how it is written ---


CALLS = [
    "pg_background_launch('SELECT 7')",
    "PG_Background_LAUNCH('SELECT 7')",
    "pg_background_launch/* here */ ('SELECT 7' -- it is\n)",
    "\"pg_background_launch\"('SELECT 7')",
    "public.pg_background_launch('SELECT 7')",
    '"Some Schema"."pg_background_launch"(\'SELECT 7\')',
    "pg_background_launch('SELECT 7', 65536)",
    "pg_background_launch(sql => 'SELECT 7')",
    "pg_background_launch(sql := 'SELECT 7')",
    "pg_background_launch('SELECT 7', queue_size => 1024)",
    "pg_background_launch(queue_size => 1024, sql => 'SELECT 7')",
    'pg_background_launch("sql" => \'SELECT 7\', "queue_size" := 1 + 1023)',
    "pg_background_launch(E'SELECT\\x207')",
    "pg_background_launch($$SELECT 7$$)",
    "pg_background_launch('SELECT 7'::varchar)",
    "pg_background_launch('SELECT ' || 3 + 4)",
    "pg_background_launch(format('SELECT %s', (SELECT 7)))",
    "pg_background_launch(CASE WHEN true THEN 'SELECT 7' ELSE 'SELECT 8' END)",
    "pg_background_launch((((('SELECT 7')))))",
    "pg_background_launch('SELECT 7', 1024::smallint)",
    "pg_background_launch('SELECT 7', '1024')",
]
FRAMES = [
    "SELECT {}",
    "SELECT {} AS pid",
    'select {} "the pid" ;',
    "SELECT ALL {} pid",
    "SELECT * FROM {}",
    "SELECT pid FROM {} AS pid",
    "SELECT p.pid FROM {} p (pid)",
    "SELECT {} WHERE true",
    "WITH a AS (SELECT 1) SELECT {} FROM a",
    "-- first\nSELECT {} /* last */",
]


@pytest.mark.parametrize(
    ("call", "frame"),
    [
        # Each call and each frame once; all pairs by `pytest -m ''`.
        pytest.param(
            call, frame, marks=[] if call == CALLS[0] or frame == FRAMES[0] else EXHAUSTIVE
        )
        for call in CALLS
        for frame in FRAMES
    ],
)
def test_launch_is_written_in_many_ways(conn: Connection, call: str, frame: str) -> None:
    sql = frame.format(call)
    [[simple]] = conn.execute(sql).fetchall()
    [[binary]] = conn.cursor(binary=True).execute(sql).fetchall()
    [[prepared]] = conn.execute(sql, prepare=True).fetchall()
    assert [value_of(conn, pid) for pid in (simple, binary, prepared)] == [7, 7, 7]


def value_of(conn: Connection, pid: int) -> Any:
    [[found]] = result(conn, pid)
    return found


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT pg_background_launch('SELECT 1') AS pid", ["pid"]),
        ("SELECT pg_background_launch('SELECT 1') \"The Pid\"", ["The Pid"]),
        ("SELECT * FROM pg_background_launch('SELECT 1')", ["pg_background_launch"]),
        ("SELECT * FROM pg_background_launch('SELECT 1') AS pid", ["pid"]),
        ("SELECT x AS y FROM pg_background_launch('SELECT 1') AS t(x)", ["y"]),
        (
            "SELECT 1 AS a, pg_background_launch('SELECT 1'), 'b' AS c,"
            " pg_background_launch('SELECT 1') AS d",
            ["a", "pg_background_launch", "c", "d"],
        ),
    ],
)
def test_columns_are_named_as_the_server_would(
    conn: Connection, sql: str, names: list[str]
) -> None:
    cursor = conn.execute(sql)
    assert cursor.description is not None
    assert [column.name for column in cursor.description] == names


def test_several_calls_in_one_select_list(conn: Connection) -> None:
    row = (
        conn.cursor(row_factory=dict_row)
        .execute(
            "SELECT pg_background_launch('SELECT 1') AS a, upper('x') AS u,"
            " pg_background_launch(sql => %s, queue_size => %s) AS b,"
            " pg_background_launch(NULL) AS n, pg_background_launch('SELECT 3') AS c",
            ["SELECT 2", 64],
        )
        .fetchone()
    )
    assert row is not None
    assert (row["u"], row["n"]) == ("X", None)
    assert [value_of(conn, row[name]) for name in "abc"] == [1, 2, 3]


def test_launch_for_each_row_of_a_table(conn: Connection) -> None:
    conn.execute("CREATE TABLE per_row (n int, name text)")
    conn.execute("INSERT INTO per_row VALUES (1, 'a'), (2, 'b'), (3, NULL), (4, 'd'), (5, 'e')")
    rows = conn.execute(
        "SELECT n, pg_background_launch(format('SELECT %L', name || '!')) AS pid, t.*"
        " FROM per_row t WHERE n < 5 ORDER BY n DESC LIMIT 3",
        binary=True,
    ).fetchall()
    assert [row[0] for row in rows] == [4, 3, 2]
    assert [row[2:] for row in rows] == [(4, "d"), (3, None), (2, "b")]
    assert [value_of(conn, row[1]) for row in rows] == ["d!", None, "b!"]


def test_no_row_no_launch(conn: Connection) -> None:
    cursor = conn.execute("SELECT pg_background_launch('SELECT 1') FROM pg_class WHERE false")
    assert cursor.fetchall() == []
    assert cursor.statusmessage == "SELECT 0"


async def test_launch_and_result_through_an_async_connection(proxy: Proxy, scratch: str) -> None:
    async with await psycopg.AsyncConnection.connect(
        proxy.dsn(dbname=scratch), autocommit=True
    ) as conn:
        cursor = await conn.execute("SELECT pg_background_launch(%s)", ["SELECT 1 AS one"])
        row = await cursor.fetchone()
        assert row is not None
        cursor = await conn.execute(
            "SELECT * FROM pg_background_result(%s) AS (one int)", [row[0]], binary=True
        )
        assert await cursor.fetchall() == [(1,)]


def test_launch_through_client_side_binding(proxy: Proxy, scratch: str) -> None:
    with psycopg.connect(
        proxy.dsn(dbname=scratch), autocommit=True, cursor_factory=psycopg.ClientCursor
    ) as conn:
        job = "SELECT 'it''s \\ here' -- '"
        [[pid]] = conn.execute("SELECT pg_background_launch(%s)", [job]).fetchall()
        [[found]] = conn.execute("SELECT pg_background_result(%s)", [pid]).fetchall()
        assert found == "it's \\ here"


@pytest.mark.parametrize(
    ("sql", "sqlstate", "text"),
    [
        (
            "SELECT pg_background_launch(1)",
            "42883",
            "function pg_background_launch(integer) does not exist",
        ),
        (
            "SELECT pg_background_launch('SELECT 1', 1.5)",
            "42883",
            "function pg_background_launch(text, numeric) does not exist",
        ),
        ("SELECT pg_background_launch('SELECT 1', 'x')", "22P02", None),
        ("SELECT pg_background_launch('SELECT ' || 1/0)", "22012", "division by zero"),
        ("SELECT pg_background_launch(no_such)", "42703", 'column "no_such" does not exist'),
        ("SELECT pg_background_launch(n) FROM no_such", "42P01", None),
        ("SELECT pg_background_launch('a') FROM pg_class ORDER BY no_such", "42703", None),
        ("SELECT pg_background_launch('a', 3000000000)", "42883", None),
    ],
)
def test_errors_in_arguments_are_the_servers_own(
    conn: Connection, sql: str, sqlstate: str, text: str | None
) -> None:
    for prepare in (None, True):
        with pytest.raises(psycopg.Error) as caught:
            conn.execute(sql, prepare=prepare)
        assert caught.value.sqlstate == sqlstate
        assert text is None or caught.value.diag.message_primary == text


def test_position_of_an_error_is_that_of_the_clients_own_text(conn: Connection) -> None:
    sql = "SELECT 'äöü€', pg_background_launch('SELECT 1') AS a, no_such FROM pg_class"
    position = sql.index("no_such") + 1
    assert failure(conn, sql).diag.statement_position == str(position)
    assert failure(conn, "SELECT 1; " + sql).diag.statement_position == str(10 + position)
    sql = "SELECT 'ä', pg_background_launch('x' || no_such)"
    assert failure(conn, sql).diag.statement_position == str(sql.index("no_such") + 1)


# --- where it cannot be served ---


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_background_launch('SELECT 1') + 1",
        "SELECT 1 WHERE pg_background_launch('SELECT 1') > 0",
        "SELECT coalesce(pg_background_launch('SELECT 1'), 0)",
        "SELECT (SELECT pg_background_launch('SELECT 1'))",
        "SELECT DISTINCT pg_background_launch('SELECT 1')",
        "SELECT pg_background_launch('SELECT 1') UNION ALL SELECT 1",
        "SELECT pg_background_launch('SELECT 1')::text",
        "SELECT count(*), pg_background_launch('SELECT 1') FROM pg_class GROUP BY 2",
        "SELECT * FROM pg_class, pg_background_launch('SELECT 1')",
        "SELECT * FROM pg_class c, LATERAL pg_background_launch(c.relname::text) l",
        "WITH l AS (SELECT pg_background_launch('SELECT 1') AS pid) SELECT pid FROM l",
        "INSERT INTO unserved SELECT pg_background_launch('SELECT 1')",
        "INSERT INTO unserved VALUES (pg_background_launch('SELECT 1'))",
        "UPDATE unserved SET n = pg_background_launch('SELECT 1')",
        "CREATE TABLE unserved_2 AS SELECT pg_background_launch('SELECT 1')",
        "CREATE VIEW unserved_3 AS SELECT pg_background_launch('SELECT 1')",
        "DO $$ BEGIN PERFORM pg_background_launch('SELECT 1'); END $$",
        "PREPARE unserved_4 AS SELECT pg_background_launch('SELECT 1')",
        "EXPLAIN SELECT pg_background_launch('SELECT 1')",
        "DECLARE unserved_5 CURSOR WITH HOLD FOR SELECT pg_background_launch('SELECT 1')",
        "COPY (SELECT pg_background_launch('SELECT 1')) TO STDOUT",
        "VALUES (pg_background_launch('SELECT 1'))",
        "SELECT pg_background_launch('SELECT 1') ORDER BY 1",
        "SELECT pg_background_launch('SELECT 1') AS pid FOR UPDATE",
        "SELECT pg_background_detach(1 + pg_background_launch('SELECT 1'))",
        "SELECT pg_background_detach(NULL) UNION SELECT NULL",
        "SELECT * FROM pg_background_result(1) AS (n int) WHERE n > 1",
        "SELECT count(*) FROM pg_background_result(1) AS (n int)",
        "SELECT n + 1 FROM pg_background_result(1) AS (n int)",
        "SELECT * FROM pg_background_result(1) AS (n int), pg_class",
        "SELECT n FROM pg_class LEFT JOIN pg_background_result(1) AS r (n int) ON true",
        "INSERT INTO unserved SELECT * FROM pg_background_result(1) AS (n int)",
        "SELECT 1, pg_background_result(1)",
        "SELECT bool_and(grant_pg_background_privileges(rolname::text)) FROM pg_roles",
    ],
)
def test_call_in_a_place_that_is_not_served_is_refused_with_a_hint(
    conn: Connection, sql: str
) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS unserved AS SELECT 0 AS n")
    for prepare in (None, True):
        if prepare and sql.startswith("COPY"):
            continue
        with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
            conn.execute(sql, prepare=prepare)
        assert "pg_background_" in str(caught.value)
        assert caught.value.diag.message_hint
    assert conn.execute("SELECT n FROM unserved").fetchall() == [(0,)]


def test_refused_call_aborts_the_transaction(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        failure(conn, "SELECT pg_background_launch('SELECT 1') + 1")
        assert failure(conn, "SELECT 1").sqlstate == "25P02"
        conn.rollback()
        assert value(conn, "SELECT 1") == 1


def test_mention_that_is_no_call_passes(conn: Connection) -> None:
    conn.execute("CREATE TABLE mention (pg_background_launch int)")
    conn.execute("INSERT INTO mention VALUES (1)")
    for sql, rows in {
        "SELECT pg_background_launch FROM mention": [(1,)],
        "SELECT 'pg_background_launch(''x'')'": [("pg_background_launch('x')",)],
        "SELECT 1 /* pg_background_launch('x') */": [(1,)],
        "SELECT 1 -- pg_background_result(1)": [(1,)],
        "SELECT $$pg_background_result(1)$$ AS pg_background_launch": [
            ("pg_background_result(1)",)
        ],
    }.items():
        assert conn.execute(sql).fetchall() == rows


# --- in transactions ---


def test_job_does_not_see_what_the_caller_has_not_committed(
    proxy: Proxy, scratch: str, observer: Connection
) -> None:
    observer.execute("CREATE TABLE uncommitted (n int)")
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        conn.execute("INSERT INTO uncommitted VALUES (1)")
        assert value(conn, "SELECT count(*) FROM uncommitted") == 0
        assert conn.execute("SELECT count(*) FROM uncommitted").fetchone() == (1,)
        conn.commit()
        assert value(conn, "SELECT count(*) FROM uncommitted") == 1


def test_commit_of_a_job_survives_the_rollback_of_its_caller(
    proxy: Proxy, scratch: str, observer: Connection
) -> None:
    observer.execute("CREATE TABLE audit (what text)")
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        conn.execute("INSERT INTO audit VALUES ('caller')")
        assert run(conn, "INSERT INTO audit VALUES ('job')") == [("INSERT 0 1",)]
        conn.rollback()
    assert observer.execute("SELECT what FROM audit").fetchall() == [("job",)]


def test_launch_does_not_end_the_transaction_block(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        begun = conn.execute("SELECT now()").fetchone()
        result(conn, launch(conn, "SELECT 1"))
        assert conn.execute("SELECT now()").fetchone() == begun
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


@pytest.mark.parametrize("args", [[], [["SELECT 1"]]], ids=["simple", "extended"])
def test_call_in_an_aborted_transaction_is_refused(
    proxy: Proxy, scratch: str, args: list[Any]
) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        failure(conn, "SELECT 1/0")
        argument = "%s" if args else "'SELECT 1'"
        for call in (
            f"SELECT pg_background_launch({argument})",
            f"SELECT * FROM pg_background_launch({argument})",
        ):
            assert message(failure(conn, call, *args)) == (
                "25P02",
                "current transaction is aborted, commands ignored until end of transaction block",
            )
        query = "SELECT * FROM pg_background_result(1) AS (n int)"
        assert failure(conn, query).sqlstate == "25P02"
        conn.rollback()


def test_savepoint_undoes_a_failed_call(proxy: Proxy, scratch: str) -> None:
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        conn.execute("CREATE TEMP TABLE kept (n int)")
        with pytest.raises(psycopg.errors.InvalidParameterValue), conn.transaction():
            launch(conn, "SELECT 1", 1)
        assert value(conn, "SELECT 5") == 5
        assert conn.execute("SELECT count(*) FROM kept").fetchone() == (0,)


# --- what a job may run ---


def test_job_is_one_transaction(conn: Connection) -> None:
    conn.execute("CREATE TABLE one_transaction (n int)")
    error = job_failure(conn, "INSERT INTO one_transaction VALUES (1); SELECT 1/0")
    assert error.sqlstate == "22012"
    assert conn.execute("SELECT count(*) FROM one_transaction").fetchone() == (0,)
    run(conn, "INSERT INTO one_transaction SELECT 1; INSERT INTO one_transaction SELECT 2")
    query = "SELECT count(DISTINCT xmin::text), count(*) FROM one_transaction"
    assert conn.execute(query).fetchone() == (1, 2)


def test_syntax_error_in_a_job_is_its_result(conn: Connection) -> None:
    error = job_failure(conn, "SELEC 1")
    assert message(error) == ("42601", 'syntax error at or near "SELEC"')
    assert job_failure(conn, "SELECT 'unterminated").sqlstate == "42601"


@pytest.mark.parametrize("job", ["", "   ", "-- nothing", ";", " ; ; /* */ "])
def test_empty_job_gives_no_rows(conn: Connection, job: str) -> None:
    assert run(conn, job) == []
    assert run(conn, job, "result text") == []


@pytest.mark.parametrize("columns", [None, "result text"])
@pytest.mark.parametrize("in_block", [False, True])
def test_statements_that_refuse_transaction_blocks(
    conn: Connection, columns: str | None, in_block: bool
) -> None:
    conn.execute("DROP TABLE IF EXISTS maintained")
    conn.execute("CREATE TABLE maintained (n int)")
    with conn.transaction() if in_block else contextlib.nullcontext():
        assert run(conn, "VACUUM maintained", columns) == [("VACUUM",)]
        assert run(conn, "vacuum (analyze) maintained;", columns) == [("VACUUM",)]
    error = job_failure(conn, "SELECT 1; VACUUM maintained")
    assert error.sqlstate == "25001"


@pytest.mark.parametrize(
    "fetch",
    [
        "SELECT pg_background_result({})",
        "SELECT * FROM pg_background_result({})",
        "SELECT * FROM pg_background_result({}) AS (result text)",
    ],
)
@pytest.mark.parametrize("prepare", [None, True])
def test_index_is_built_concurrently_while_its_caller_waits(
    conn: Connection, fetch: str, prepare: bool | None
) -> None:
    conn.execute("DROP TABLE IF EXISTS indexed")
    conn.execute("CREATE TABLE indexed (n int)")
    pid = launch(conn, "CREATE INDEX CONCURRENTLY indexed_n ON indexed (n)")
    assert conn.execute(fetch.format(pid), prepare=prepare).fetchall() == [("CREATE INDEX",)]


@pytest.mark.parametrize(
    "statement",
    [
        "BEGIN",
        "begin work",
        "START TRANSACTION",
        "COMMIT",
        "END",
        "ROLLBACK",
        "ABORT",
        "SAVEPOINT a",
        "RELEASE a",
        "ROLLBACK TO a",
        "PREPARE TRANSACTION 'x'",
        "COMMIT PREPARED 'x'",
        "ROLLBACK PREPARED 'x'",
        "COMMIT AND CHAIN",
        "/* comment */ Commit -- work",
    ],
)
def test_transaction_control_is_refused_and_nothing_runs(conn: Connection, statement: str) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS controlled (n int)")
    insert = "INSERT INTO controlled VALUES (1)"
    for job in (statement, f"{insert}; {statement}", f"{insert};{statement};{insert}"):
        assert message(job_failure(conn, job)) == (
            "0A000",
            "transaction control statements are not allowed in pg_background",
        )
    assert conn.execute("SELECT count(*) FROM controlled").fetchone() == (0,)


@pytest.mark.parametrize(
    "job",
    [
        "COPY copied TO STDOUT",
        "COPY copied FROM STDIN",
        "copy (SELECT 1) to stdout with (format csv)",
        'COPY "copied" (n) FROM stdin',
        "INSERT INTO copied VALUES (1); COPY copied TO STDOUT",
        "COPY copied FROM STDIN; INSERT INTO copied VALUES (1)",
    ],
)
def test_copy_to_or_from_the_client_is_refused_and_nothing_runs(conn: Connection, job: str) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS copied (n int)")
    error = job_failure(conn, job)
    assert message(error) == ("0A000", "COPY protocol not allowed in pg_background")
    assert conn.execute("SELECT count(*) FROM copied").fetchone() == (0,)


@pytest.mark.parametrize(
    ("job", "rows"),
    [
        ('SELECT 1 AS begin, 2 AS "commit"', [(1, 2)]),
        ("SELECT 'COMMIT; ROLLBACK'", [("COMMIT; ROLLBACK",)]),
        ("SELECT $$ ; COMMIT; $$ -- ; COMMIT", [(" ; COMMIT; ",)]),
        ("DO $$ BEGIN PERFORM 1; END $$", [("DO",)]),
        ("SET LOCAL work_mem = '1MB'; SHOW work_mem", [("1MB",)]),
        ("PREPARE p AS SELECT 4; EXECUTE p", [(4,)]),
        ("PREPARE p AS SELECT 4", [("PREPARE",)]),
        ("EXPLAIN (COSTS OFF) SELECT 1", [("Result",)]),
        ("VALUES (1), (2)", [(1,), (2,)]),
        ("TABLE one_row", [(1,)]),
        ("UPDATE one_row SET n = 1 RETURNING n", [(1,)]),
        ("UPDATE one_row SET n = 1", [("UPDATE 1",)]),
        ("DECLARE c CURSOR FOR SELECT 1; FETCH ALL FROM c", [(1,)]),
        ("LISTEN something", [("LISTEN",)]),
        ("NOTIFY something", [("NOTIFY",)]),
        ("CHECKPOINT", [("CHECKPOINT",)]),
        ("SELECT 1 INTO TEMP t", [("SELECT 1",)]),
        ("COPY one_row FROM PROGRAM 'true'", [("COPY 0",)]),
        ("SELECT", [()]),
        ("SELECT FROM generate_series(1, 3)", [(), (), ()]),
    ],
)
def test_what_else_a_job_runs(conn: Connection, job: str, rows: list[Any]) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS one_row AS SELECT 1 AS n")
    assert run(conn, job) == rows


def test_function_with_a_sql_body_is_one_statement(conn: Connection) -> None:
    if conn.info.server_version < 140000:
        pytest.skip("BEGIN ATOMIC came with 14")
    body = "BEGIN ATOMIC SELECT 1; SELECT 2; END"
    assert value(conn, f"CREATE FUNCTION atomic() RETURNS int {body}; SELECT atomic()") == 2


# --- limits ---


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "queue size must be at least 64 bytes"),
        (63, "queue size must be at least 64 bytes"),
        (268435457, "queue size must not exceed 268435456 bytes"),
        (2147483647, "queue size must not exceed 268435456 bytes"),
    ],
)
def test_queue_size_has_limits(conn: Connection, size: int, text: str) -> None:
    query = "SELECT pg_background_launch(%s, %s)"
    assert message(failure(conn, query, ["SELECT 1", size])) == ("22023", text)
    sql = f"SELECT pg_background_launch('SELECT 1', queue_size => {size})"
    assert message(failure(conn, sql)) == ("22023", text)


@pytest.mark.parametrize("size", [-2147483648, -1, 0, 64, 100, 65536, 268435456])
def test_queue_size_within_its_limits(conn: Connection, size: int) -> None:
    pid = launch(conn, "SELECT repeat('x', 1000) FROM generate_series(1, 20)", size)
    assert result(conn, pid) == [("x" * 1000,)] * 20


def test_full_queue_makes_the_job_wait_and_detach_lets_it_go_on(
    conn: Connection, observer: Connection
) -> None:
    if observer.info.server_version < 100000:
        pytest.skip("ClientWrite came with 10")
    observer.execute("CREATE SEQUENCE produced")
    job = "SELECT nextval('produced'), repeat('x', 10000) FROM generate_series(1, 3000)"
    pid = launch(conn, job, 64)
    wait_until(
        lambda: observer.execute(
            "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'ClientWrite'", [pid]
        ).fetchone()
    )
    conn.execute("SELECT pg_background_detach(%s)", [pid])
    wait_until_ended(observer, pid)
    assert observer.execute("SELECT last_value FROM produced").fetchone() == (3000,)


def test_default_queue_size_is_a_setting(conn: Connection) -> None:
    assert conn.execute("SHOW pg_background.default_queue_size").fetchone() == ("64kB",)
    for size in ("4kB", "4096", "1MB", "256MB"):
        conn.execute(f"SET pg_background.default_queue_size = '{size}'")
        assert value(conn, "SELECT 1") == 1
    for size in ("4095", "257MB", "big"):
        error = failure(conn, f"SET pg_background.default_queue_size = '{size}'")
        assert error.sqlstate == "22023"
        assert "pg_background.default_queue_size" in str(error)
    conn.execute("RESET pg_background.default_queue_size")
    assert conn.execute("SHOW pg_background.default_queue_size").fetchone() == ("64kB",)
    assert value(conn, "SELECT 1") == 1


def test_max_workers_limits_the_running_jobs_of_one_session(
    conn: Connection, observer: Connection, lock: str, proxy: Proxy, scratch: str
) -> None:
    conn.execute("SET pg_background.max_workers = 2")
    assert conn.execute("SHOW pg_background.max_workers").fetchone() == ("2",)
    pids = [launch(conn, lock) for _ in range(2)]
    error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
    assert message(error) == ("53400", "too many background workers")
    assert "2" in (error.diag.message_detail or "")
    assert "pg_background.max_workers" in (error.diag.message_hint or "")
    with proxy.connect(dbname=scratch) as other:  # has a limit of its own
        assert value(other, "SELECT 1") == 1
    with conn.transaction():
        conn.execute("SET LOCAL pg_background.max_workers = 3")
        pids.append(launch(conn, lock))
    assert failure(conn, "SELECT pg_background_launch('SELECT 1')").sqlstate == "53400"
    conn.execute("RESET pg_background.max_workers")
    assert conn.execute("SHOW pg_background.max_workers").fetchone() == ("16",)
    pids.append(launch(conn, lock))
    unlock(observer)
    for pid in pids:
        result(conn, pid)
    conn.execute("SET pg_background.max_workers = 1")
    assert [value(conn, "SELECT 1") for _ in range(3)] == [1, 1, 1]


def test_more_calls_than_workers_in_one_statement(
    conn: Connection, observer: Connection, lock: str
) -> None:
    conn.execute("SET pg_background.max_workers = 2")
    query = "SELECT pg_background_launch(%s) FROM generate_series(1, 3)"
    assert failure(conn, query, [lock]).sqlstate == "53400"
    unlock(observer)


@pytest.mark.parametrize("text", ["0", "1001", "many", "-1", "1.5GB"])
def test_invalid_max_workers_is_refused_at_the_next_launch(conn: Connection, text: str) -> None:
    conn.execute("SELECT set_config('pg_background.max_workers', %s, false)", [text])
    error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
    assert error.sqlstate == "22023"
    assert "pg_background.max_workers" in str(error)


def test_settings_come_from_the_startup_packet_too(proxy: Proxy, scratch: str) -> None:
    options = "-c pg_background.max_workers=1 -c pg_background.worker_timeout=5min"
    with proxy.connect(dbname=scratch, options=options) as conn:
        assert conn.execute("SHOW pg_background.max_workers").fetchone() == ("1",)
        assert conn.execute("SHOW pg_background.worker_timeout").fetchone() == ("5min",)
        pid = launch(conn, "SELECT pg_sleep(60)")
        assert failure(conn, "SELECT pg_background_launch('SELECT 1')").sqlstate == "53400"
        conn.execute("SELECT pg_cancel_backend(%s)", [pid])
        failure(conn, "SELECT * FROM pg_background_result(%s)", [pid])


def test_proxy_that_allows_fewer_workers(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy("--max-workers", "1")
    with proxy.connect(dbname=scratch) as conn:
        assert conn.execute("SHOW pg_background.max_workers").fetchone() == ("1",)


@pytest.mark.parametrize("setting", ["pg_background.worker_timeout", "statement_timeout"])
@pytest.mark.parametrize("timeout", ["50", "50ms"])
def test_job_that_takes_too_long_is_cancelled(conn: Connection, setting: str, timeout: str) -> None:
    conn.execute(f"SET {setting} = '{timeout}'")
    pid = launch(conn, "SELECT pg_sleep(60)")
    conn.execute("SET statement_timeout = 0")
    error = failure(conn, "SELECT * FROM pg_background_result(%s)", [pid])
    assert message(error) == ("57014", "canceling statement due to statement timeout")
    assert f"background worker, pid {pid}" in (error.diag.context or "")


def test_worker_timeout_wins_over_statement_timeout(conn: Connection) -> None:
    conn.execute("SET statement_timeout = '1h'")
    conn.execute("SET pg_background.worker_timeout = '2h'")
    assert conn.execute("SHOW pg_background.worker_timeout").fetchone() == ("2h",)
    assert value(conn, "SHOW statement_timeout") == "2h"
    conn.execute("SET pg_background.worker_timeout = 0")
    assert value(conn, "SHOW statement_timeout") == "1h"
    conn.execute("RESET statement_timeout")
    assert value(conn, "SHOW statement_timeout") == "0"


def test_no_connection_left_is_said_with_the_servers_reason(
    proxy: Proxy, scratch: str, observer: Connection
) -> None:
    observer.execute("CREATE ROLE one_connection LOGIN CONNECTION LIMIT 1")
    try:
        with proxy.connect(dbname=scratch) as admin:
            admin.execute("SELECT grant_pg_background_privileges('one_connection')")
        with proxy.connect(dbname=scratch, user="one_connection") as conn:
            error = failure(conn, "SELECT pg_background_launch('SELECT 1')")
            assert error.sqlstate is not None
            assert error.sqlstate.startswith("53")
            assert "one_connection" in (error.diag.message_detail or "")
            assert error.diag.message_hint
            observer.execute("ALTER ROLE one_connection CONNECTION LIMIT 2")
            assert value(conn, "SELECT 1") == 1
    finally:
        query = "SELECT 1 FROM pg_stat_activity WHERE usename = 'one_connection'"
        wait_until(lambda: not observer.execute(query).fetchone())
        observer.execute("DROP ROLE one_connection")


# --- the end of the session ---


def test_job_runs_on_when_its_session_ends(
    proxy: Proxy, scratch: str, observer: Connection, lock: str
) -> None:
    observer.execute("CREATE TABLE runs_on (n int)")
    with proxy.connect(dbname=scratch) as conn:
        pid = launch(conn, f"{lock}; INSERT INTO runs_on VALUES (1)")
        session = conn.info.backend_pid
    wait_until_ended(observer, session)
    assert not has_ended(observer, pid)
    unlock(observer)
    wait_until_ended(observer, pid)
    assert observer.execute("SELECT count(*) FROM runs_on").fetchone() == (1,)


# --- psql ---


def psql_c(proxy: Proxy, scratch: str, *statements: str) -> tuple[int, list[str], str]:
    """Gives psql -c "a; b; c": its exit code, the lines of its output, and its errors."""
    sql = "; ".join(statements)
    done = psql(proxy.port, "-At", "-v", "VERBOSITY=verbose", "-c", sql, dbname=scratch)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_psql_string_of_several_statements_runs_in_order(
    proxy: Proxy, scratch: str, observer: Connection
) -> None:
    observer.execute("CREATE TABLE psql_order (n int)")
    call = "SELECT pg_background_result(pg_background_launch('INSERT INTO psql_order VALUES (1)'))"
    count = "SELECT count(*) FROM psql_order"
    code, lines, errors = psql_c(proxy, scratch, count, call, count, call, count)
    assert (code, lines) == (0, ["0", "INSERT 0 1", "1", "INSERT 0 1", "2"]), errors


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("SELECT pg_background_launch('SELECT 1') > 0", "ERROR:  0A000: pg_background_launch "),
        ("SELECT pg_background_detach(0)", "ERROR:  42704: PID 0 is not attached to this session"),
        (
            "SELECT pg_background_result(pg_background_launch('SELECT 1/0'))",
            "ERROR:  22012: division by zero",
        ),
    ],
)
def test_psql_string_of_several_statements_is_one_transaction(
    proxy: Proxy, scratch: str, observer: Connection, call: str, error: str
) -> None:
    create = "CREATE TABLE psql_one (n int)"
    code, lines, errors = psql_c(proxy, scratch, create, call, "SELECT 'not reached'")
    assert code == 1
    assert error in errors
    assert "not reached" not in lines
    assert observer.execute("SELECT to_regclass('psql_one')::text").fetchone() == (None,)


def test_psql_gset_and_gexec(proxy: Proxy, scratch: str) -> None:
    script = r"""
        SELECT pg_background_launch('SELECT 40 + 2 AS answer') AS pid \gset
        SELECT * FROM pg_background_result(:pid) AS (answer int);
        SELECT pg_background_launch('SELECT 1') AS a, pg_background_launch('SELECT 2') AS b \gset j_
        SELECT pg_background_result(:j_b) AS second \gset
        SELECT * FROM pg_background_result(:j_a);
        \echo second :second
        SELECT format('SELECT pg_background_result(pg_background_launch(%L))', 'SELECT ' || n)
            FROM generate_series(5, 7) n \gexec
    """
    done = psql(proxy.port, "-At", "-v", "ON_ERROR_STOP=1", input=script, dbname=scratch)
    assert done.stdout.splitlines() == ["42", "1", "second 2", "5", "6", "7"], done.stderr
    assert done.returncode == 0


def test_psql_on_error_stop_stops_at_a_failed_job(proxy: Proxy, scratch: str) -> None:
    script = "SELECT pg_background_result(pg_background_launch('SELECT 1/0'));\n\\echo went on\n"
    done = psql(proxy.port, "-At", "-v", "ON_ERROR_STOP=1", input=script, dbname=scratch)
    assert done.returncode == 3
    assert "went on" not in done.stdout
    assert "ERROR:  division by zero\nCONTEXT:  background worker, pid " in done.stderr
    done = psql(proxy.port, "-At", input=script, dbname=scratch)
    assert done.returncode == 0
    assert "went on" in done.stdout
