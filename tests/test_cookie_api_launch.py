"""Launching and submitting with a handle: arguments, overloads, shapes, labels."""

from __future__ import annotations

import pytest

from tests.conftest import StartProxy
from tests.support.api_clients import Client, Gate, Handle, Refused, handles_sql
from tests.support.background import failure, launch, message, run, wait_until, wait_until_ended
from tests.support.servers import Connection, Proxy, psql

NO_ROWS = "results are disabled for PID {} (submitted via submit_v2)"


@pytest.mark.parametrize("name", ["launch_v2", "submit_v2", "submit"])
def test_handle_is_a_record_of_pid_and_cookie(
    client: Client, observer: Connection, gate: Gate, name: str
) -> None:
    printed = client.call(name, f"'{gate.sql}'")
    assert printed is not None
    pid, cookie = map(int, printed.strip("()").split(","))
    assert -(2**63) <= cookie < 2**63
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    assert observer.execute(query, [pid]).fetchone() == (1,)
    assert client.one(f"SELECT state FROM pg_background_outcome({pid}, {cookie})") == "running"
    gate.open()
    assert client.call("wait", pid, cookie) == "t"


@pytest.mark.parametrize(
    "arguments",
    [
        "'SELECT 7'",
        "'SELECT 7', 0",
        "'SELECT 7', 65536",
        "sql => 'SELECT 7'",
        "queue_size => 64, sql => 'SELECT 7'",
        "'SELECT 7', 0, 'a label'",
        "'SELECT 7', NULL, NULL",
        "'SELECT 7', NULL, 'x'",
        "'SELECT 7', label => 'x', queue_size => 128",
        "sql := 'SELECT ' || 3 + 4, label := NULL, queue_size := NULL",
    ],
)
def test_arguments_choose_the_overload(client: Client, arguments: str) -> None:
    for name in ("launch_v2", "submit_v2", "submit"):
        call = f"pg_background_{name}({arguments})"
        [[pid, cookie]] = client.texts(f"SELECT (h).* FROM (SELECT {call} AS h) s")
        assert client.call("wait", pid, cookie) == "t"
        if name == "launch_v2":
            result = f"SELECT * FROM pg_background_result_v2({pid}, {cookie}) AS (n int)"
            assert client.one(result) == "7"
        else:
            assert client.call("detach", pid, cookie) in (None, "")


def test_plain_launch_with_a_label_returns_a_handle(client: Client) -> None:
    handle = client.launch("SELECT 1", "x", by="launch")
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "1"


@pytest.mark.parametrize(
    "shape",
    [
        "SELECT (h).pid AS p, (h).cookie AS c FROM (SELECT {} AS h) s",
        "SELECT (s.h).pid, (s.h).cookie FROM (SELECT {} AS h) AS s",
        "SELECT (h).* FROM (SELECT {} AS h) s",
        "SELECT ({}).*",
        "SELECT * FROM {}",
        "SELECT * FROM {} AS h",
        "SELECT h.pid, h.cookie FROM {} AS h",
        "SELECT a, b FROM {} AS h (a, b)",
        "SELECT (h).pid, (h).cookie FROM {} AS h",
    ],
)
def test_handle_in_every_shape_is_one_launch(
    client: Client, observer: Connection, shape: str
) -> None:
    observer.execute("DROP TABLE IF EXISTS once; CREATE TABLE once (n int)")
    call = "pg_background_launch_v2('INSERT INTO once VALUES (1) RETURNING 7')"
    [[pid, cookie]] = client.texts(shape.format(call))
    assert client.one(f"SELECT * FROM pg_background_result({pid}, {cookie}) AS (n int)") == "7"
    assert observer.execute("SELECT count(*) FROM once").fetchone() == (1,)


def test_one_field_of_a_handle(client: Client, observer: Connection) -> None:
    pid = client.one("SELECT (pg_background_submit_v2('SELECT 1')).pid")
    assert pid is not None
    wait_until_ended(observer, int(pid))


def test_columns_of_a_handle_are_named_and_typed(conn: Connection) -> None:
    for sql, names, types in (
        ("SELECT pg_background_launch_v2('')", ["pg_background_launch_v2"], [2249]),
        ("SELECT pg_background_launch_v2('') AS h", ["h"], [2249]),
        ("SELECT (pg_background_launch_v2('')).*", ["pid", "cookie"], [23, 20]),
        ("SELECT 1 AS a, (pg_background_launch_v2('')).cookie", ["a", "cookie"], [23, 20]),
        ("SELECT * FROM pg_background_launch_v2('')", ["pid", "cookie"], [23, 20]),
    ):
        for prepare in (None, True):
            description = conn.execute(sql, prepare=prepare).description
            assert description is not None
            assert [column.name for column in description] == names
            assert [column.type_code for column in description] == types


def test_cookies_are_random(conn: Connection) -> None:
    rows = conn.execute(
        "SELECT (pg_background_submit_v2('')).cookie FROM generate_series(1, 10)"
    ).fetchall()
    cookies = [row[0] for row in rows]
    assert len(set(cookies)) == 10
    assert max(cookies) - min(cookies) > 2**56


def test_null_sql(client: Client) -> None:
    for name in ("launch_v2", "submit_v2", "submit"):
        assert client.call(name, "NULL") is None
        assert client.call(name, "NULL", "0") is None
        assert client.call(name, "'SELECT 1'", "NULL") is None
        refused = Refused("22004", "sql must not be null")
        assert client.error(f"SELECT pg_background_{name}(NULL, 0, 'x')") == refused
    assert client.texts("SELECT * FROM pg_background_launch_v2(NULL)") == [(None, None)]
    assert client.texts("SELECT (pg_background_launch_v2(NULL)).*") == [(None, None)]


@pytest.mark.parametrize(
    ("call", "refused"),
    [
        ("launch_v2('', 63)", Refused("22023", "queue size must be at least 64 bytes")),
        (
            "submit('', 268435457)",
            Refused("22023", "queue size must not exceed 268435456 bytes"),
        ),
        ("launch_v2('', 1, 'x')", Refused("22023", "queue size must be at least 64 bytes")),
    ],
)
def test_queue_size_out_of_range(client: Client, call: str, refused: Refused) -> None:
    assert client.error(f"SELECT pg_background_{call}") == refused


def test_wrong_types_are_the_servers_complaint(conn: Connection) -> None:
    for call, complaint in (
        ("launch_v2(1)", "pg_background_launch_v2(integer)"),
        ("launch_v2('', 0, 5)", "pg_background_launch_v2(text, integer, integer)"),
        ("submit('', 2.5)", "pg_background_submit(text, numeric)"),
        ("wait_v2('a'::text, 1)", "pg_background_wait_v2(text, bigint)"),
        ("detach(1, 2.5)", "pg_background_detach(integer, numeric)"),
        ("cancel(3000000000, 1)", "pg_background_cancel(bigint, bigint)"),
    ):
        error = failure(conn, f"SELECT pg_background_{call}")
        assert message(error) == ("42883", f"function {complaint} does not exist")


def test_too_many_arguments_are_refused(conn: Connection) -> None:
    for call in ("launch_v2('', 0, 'x', 1)", "wait_v2(1)", "detach_v2(1)", "list_v2(1)"):
        assert failure(conn, f"SELECT pg_background_{call}").sqlstate in ("42883", "0A000")


def test_result_of_a_handle(client: Client) -> None:
    for name in ("result_v2", "result"):
        handle = client.launch("SELECT 1 AS a, 'x'::text AS b")
        call = f"pg_background_{name}({handle.sql})"
        assert client.texts(f"SELECT * FROM {call} AS (a int, b text)") == [("1", "x")]
        refused = Refused("42704", f"PID {handle.pid} is not attached to this session")
        assert client.error(f"SELECT * FROM {call} AS (a int, b text)") == refused


def test_result_with_a_wrong_cookie(client: Client) -> None:
    handle = client.launch("SELECT 1")
    for name in ("result_v2", "result"):
        wrong = f"SELECT * FROM pg_background_{name}({handle.pid}, 1) AS (n int)"
        assert client.error(wrong) == Refused(
            "42704", f"PID {handle.pid} is not attached to this session (cookie mismatch)"
        )
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "1"


def test_result_of_a_handle_by_its_pid_alone(client: Client) -> None:
    handle = client.launch("SELECT 1")
    assert client.one(f"SELECT * FROM pg_background_result({handle.pid}) AS (n int)") == "1"


def test_handle_of_nulls_has_no_rows(client: Client) -> None:
    assert client.rows("SELECT * FROM pg_background_result_v2(NULL, NULL) AS (n int)") == []
    assert client.rows("SELECT * FROM pg_background_result(1, NULL) AS (n int)") == []


def test_submitted_job_has_no_result(client: Client) -> None:
    for name in ("submit_v2", "submit"):
        handle = client.launch("SELECT 1", by=name)
        refused = Refused("0A000", NO_ROWS.format(handle.pid))
        for call in (f"result_v2({handle.sql})", f"result({handle.pid})"):
            sql = f"SELECT * FROM pg_background_{call} AS (n int)"
            assert client.error(sql) == refused
        assert client.call("detach", handle.sql) in (None, "")


def test_submit_never_blocks_its_backend_with_a_huge_result(
    client: Client, observer: Connection
) -> None:
    observer.execute("DROP TABLE IF EXISTS huge; CREATE TABLE huge (n int)")
    handle = client.launch(
        "INSERT INTO huge VALUES (1); SELECT repeat('x', 1000) FROM generate_series(1, 50000)",
        by="submit",
    )
    assert client.call("wait", handle.sql, 20000) == "t"
    assert observer.execute("SELECT count(*) FROM huge").fetchone() == (1,)
    info = f"SELECT row_count, command_tag FROM pg_background_result_info({handle.sql})"
    assert client.texts(info) == [("50000", "SELECT")]


def test_result_of_a_handle_of_another_session(proxy: Proxy, scratch: str, client: Client) -> None:
    handle = client.launch("SELECT 1")
    with proxy.connect(dbname=scratch) as other:
        sql = f"SELECT * FROM pg_background_result_v2({handle.sql}) AS (n int)"
        expected = ("42704", f"PID {handle.pid} is not attached to this session")
        assert message(failure(other, sql)) == expected
    assert client.one(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)") == "1"


# --- labels ---


def test_label_shows_in_application_name(client: Client, observer: Connection, gate: Gate) -> None:
    launcher = client.one("SELECT pg_backend_pid()")
    query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
    for name in ("launch_v2", "launch", "submit_v2", "submit"):
        handle = client.launch(gate.sql, "nightly job", by=name)
        row = observer.execute(query, [handle.pid]).fetchone()
        assert row == (f"pg_background:nightly job:{launcher}",)
        assert client.one(f"SELECT label FROM pg_background_outcome({handle.sql})") == "nightly job"
    plain = client.launch(gate.sql)
    assert observer.execute(query, [plain.pid]).fetchone() == ("pg_background",)


@pytest.mark.parametrize("label", ["", "a:b", 'it\'s \\ "x"', "näht", "x" * 100, "a b\tc"])
def test_any_label_is_given_back(conn: Connection, label: str) -> None:
    row = conn.execute(
        "SELECT (h).pid, (h).cookie FROM (SELECT pg_background_launch_v2('SELECT 1', 0, %s) h) s",
        [label],
    ).fetchone()
    query = "SELECT label FROM pg_background_outcome_v2(%s, %s)"
    assert conn.execute(query, row).fetchone() == (label,)
    assert (row or [0])[0] in [r[0] for r in conn.execute("SELECT * FROM pg_background_list")]


# --- api_version ---


def test_api_version_2_gives_launch_a_handle(start_proxy: StartProxy, scratch: str) -> None:
    proxy = start_proxy("--api-version", "2")
    with proxy.connect(dbname=scratch) as conn:
        for binary in (False, True):
            cursor = conn.cursor(binary=binary)
            row = cursor.execute("SELECT (pg_background_launch('SELECT 1')).*").fetchone()
            assert row is not None
            query = "SELECT * FROM pg_background_result(%s, %s) AS (n int)"
            assert cursor.execute(query, row).fetchone() == (1,)
            row = cursor.execute("SELECT * FROM pg_background_launch('', 64)").fetchone()
            wait = cursor.execute("SELECT pg_background_wait_v2(%s, %s)", row)
            assert wait.fetchone() == (True,)
            assert wait.description is not None
            assert wait.description[0].type_code == 16
        assert conn.execute("SELECT pg_background_launch(NULL)").fetchone() == (None,)
        # The names of version 1 that 2.0 did not take are what they were.
        row = conn.execute("SELECT (pg_background_launch_v2('SELECT 2')).pid").fetchone()
        assert row is not None
        query = "SELECT * FROM pg_background_result(%s) AS (n int)"
        assert conn.execute(query, row).fetchone() == (2,)


def test_api_version_1_gives_launch_a_pid(start_proxy: StartProxy, scratch: str) -> None:
    with start_proxy("--api-version", "1").connect(dbname=scratch) as conn:
        assert run(conn, "SELECT 1") == [(1,)]
        row = conn.execute("SELECT * FROM pg_background_launch_v2('')").fetchone()
        cursor = conn.execute("SELECT pg_background_wait_v2(%s, %s)", row)
        assert cursor.description is not None
        assert cursor.description[0].type_code == 2278


# --- what callers really write ---


def test_what_callers_really_write(proxy: Proxy, scratch: str) -> None:
    script = """
        CREATE TABLE written (n int);
        SELECT (h).pid AS p, (h).cookie AS c
          FROM (SELECT pg_background_launch_v2('SELECT 1', 65536) AS h) s \\gset
        SELECT * FROM pg_background_result_v2(:p, :c) AS (n int);
        SELECT (pg_background_launch_v2('VACUUM written', 0, 'nightly')).* \\gset h_
        SELECT pg_background_wait(:h_pid, :h_cookie);
        SELECT command_tag, label FROM pg_background_outcome_v2(:h_pid, :h_cookie);
        SELECT * FROM pg_background_result(pg_background_launch('SELECT count(*) FROM written'))
            AS (n bigint);
        SELECT pg_background_detach(pg_background_launch('INSERT INTO written VALUES (1)'));
    """
    done = psql(proxy.port, "-qAt", "-v", "ON_ERROR_STOP=1", input=script, dbname=scratch)
    assert (done.stdout, done.stderr) == ("1\nt\nVACUUM|nightly\n0\n\n", "")


def test_vacuum_of_every_table(conn: Connection) -> None:
    for number in range(3):
        conn.execute(f'CREATE TABLE IF NOT EXISTS "Vacuumed {number}" (n int)')
    rows = conn.execute(
        "SELECT tablename, pg_background_launch(format('VACUUM (ANALYZE) %I', tablename)) AS pid"
        " FROM pg_tables WHERE schemaname = 'public' AND tablename LIKE 'Vacuumed%' ORDER BY 1"
    ).fetchall()
    assert len(rows) == 3
    for _, pid in rows:
        found = conn.execute("SELECT * FROM pg_background_result(%s)", [pid]).fetchall()
        assert found == [("VACUUM",)]


def test_launch_for_each_row_and_drain_them(client: Client) -> None:
    rows = client.texts(
        "SELECT n, (pg_background_launch_v2(format('SELECT %s', n), 0, 'n-' || n)).*"
        " FROM generate_series(1, 3) n"
    )
    assert [row[0] for row in rows] == ["1", "2", "3"]
    array = handles_sql(Handle(int(pid or 0), int(cookie or 0)) for _, pid, cookie in rows)
    drained = client.texts(f"SELECT label, row_count FROM pg_background_drain({array})")
    assert drained == [("n-1", "1"), ("n-2", "1"), ("n-3", "1")]


def test_audit_row_outlives_the_rollback(proxy: Proxy, scratch: str, observer: Connection) -> None:
    observer.execute("DROP TABLE IF EXISTS audit_log")
    observer.execute("CREATE TABLE audit_log (at timestamptz, what text)")
    with proxy.connect(autocommit=False, dbname=scratch) as conn:
        conn.execute(
            "SELECT pg_background_submit_v2(format('INSERT INTO audit_log VALUES (now(), %%L)',"
            " %s::text))",
            ["tried it's"],
        )
        conn.rollback()
    wait_until(lambda: observer.execute("SELECT 1 FROM audit_log").fetchone())
    assert observer.execute("SELECT what FROM audit_log").fetchall() == [("tried it's",)]


def test_limit_on_workers(proxy: Proxy, scratch: str, gate: Gate) -> None:
    with proxy.connect(dbname=scratch) as conn:
        conn.execute("SET pg_background.max_workers = 2")
        launch(conn, gate.sql)
        conn.execute("SELECT pg_background_submit(%s)", [gate.sql])
        for call in ("launch_v2('')", "submit('')", "run('')"):
            error = failure(conn, f"SELECT pg_background_{call}")
            assert message(error) == ("53400", "too many background workers")
            assert error.diag.message_detail
            assert error.diag.message_hint
