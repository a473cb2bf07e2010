"""Looking at jobs without touching them: lists, views, info, outcome, statistics, progress."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from protocol.messages import Bind, Execute, Parse, Sync
from tests.support.api_clients import Client, Gate, Refused
from tests.support.background import failure, message, run, wait_until
from tests.support.servers import Connection, Proxy, psql
from tests.support.wire import Wire, error_of

NINE: Final = (
    "pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4, state text,"
    " sql_preview text, last_error text, consumed bool"
)
TEN: Final = f"{NINE}, label text"
COLUMNS: Final = [
    *("pid", "cookie", "launched_at", "user_id", "queue_size", "state", "sql_preview"),
    *("last_error", "consumed", "label"),
]
OUTCOME: Final = [
    *("pid", "cookie", "state", "consumed", "completed", "has_error", "row_count"),
    *("command_tag", "sqlstate", "error_message", "label", "launched_at"),
]
SOURCES: Final = (
    "pg_background_list_v2()",
    "pg_background_list()",
    "pg_background_list_v2() AS l",
    f"pg_background_list_v2() AS ({TEN})",
    f"pg_background_list() AS l ({TEN})",
    "pg_background_list",
    "public.pg_background_list AS l",
)


def names(conn: Connection, sql: str) -> list[str]:
    description = conn.execute(sql).description
    assert description is not None
    return [column.name for column in description]


# --- lists ---


@pytest.mark.parametrize("source", SOURCES)
def test_list(client: Client, gate: Gate, source: str) -> None:
    owner = client.one("SELECT oid FROM pg_roles WHERE rolname = current_user")
    running = client.launch(gate.sql, "first")
    stopped = client.ended("SELECT 1")
    failed = client.ended("SELECT 1/0")
    canceled = client.launch(gate.sql)
    client.call("cancel", canceled.sql, 20000)
    rows = client.texts(f"SELECT * FROM {source}")
    expected = [
        (running, "running", gate.sql, None, "first"),
        (stopped, "stopped", "SELECT 1", None, None),
        (failed, "error", "SELECT 1/0", "division by zero", None),
        (canceled, "canceled", gate.sql, "canceling statement due to user request", None),
    ]
    assert [row[:2] + row[3:] for row in rows] == [
        (str(handle.pid), str(handle.cookie), owner, "65536", state, sql, error, "f", label)
        for handle, state, sql, error, label in expected
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_columns_of_the_list(conn: Connection, source: str) -> None:
    for binary in (False, True):
        description = conn.execute(f"SELECT * FROM {source}", binary=binary).description
        assert description is not None
        assert [column.name for column in description] == COLUMNS
        types = [column.type_code for column in description]
        assert types == [23, 20, 1184, 26, 23, 25, 25, 25, 16, 25]


def test_list_with_nine_columns_has_no_label(client: Client) -> None:
    handle = client.ended("SELECT 1", "hidden")
    for name in ("list_v2", "list"):
        [row] = client.texts(f"SELECT * FROM pg_background_{name}() AS ({NINE})")
        assert len(row) == 9
        assert row[0] == str(handle.pid)


def test_columns_of_the_list_renamed_and_chosen(client: Client) -> None:
    handle = client.ended("SELECT 1", "x")
    pid, cookie = map(str, handle)
    assert client.texts("SELECT l.label AS a, pid FROM pg_background_list() l") == [("x", pid)]
    defined = TEN.replace("pid", "p", 1).replace("label", "called")
    sql = f"SELECT called, cookie, p FROM pg_background_list() AS l ({defined})"
    assert client.texts(sql) == [("x", cookie, pid)]
    assert client.texts("SELECT state, cookie FROM pg_background_list") == [("stopped", cookie)]


@pytest.mark.parametrize(
    "definition",
    [
        NINE.replace("pid int4", "pid int8"),
        NINE.rpartition(",")[0],
        f"{TEN}, extra text",
        TEN.replace("label text", "label int"),
        TEN.replace("user_id oid", "user_id int4"),
    ],
)
def test_list_with_another_definition(client: Client, definition: str) -> None:
    refused = Refused("42804", "function return row and query-specified return row do not match")
    for name in ("list_v2", "list", "list_all"):
        assert client.error(f"SELECT * FROM pg_background_{name}() AS ({definition})") == refused


def test_list_of_nothing(client: Client) -> None:
    for source in (*SOURCES, "pg_background_activity"):
        assert client.rows(f"SELECT * FROM {source}") == []


def test_consumed_shows_while_a_result_is_being_fetched(proxy: Proxy, scratch: str) -> None:
    with Wire((proxy.host, proxy.port), database=scratch) as wire:
        wire.query("BEGIN")
        pid = wire.launch("SELECT generate_series(1, 9)")
        sql = b"SELECT * FROM pg_background_result(%d) AS (n int)" % pid
        wire.send(
            Parse(b"s", sql, ()).serialize()
            + Bind(b"p", b"s", (), (), ()).serialize()
            + Execute(b"p", 3).serialize()
            + Sync().serialize()
        )
        assert [kind for kind, _ in wire.until_ready()] == ["1", "2", "D", "D", "D", "s", "Z"]
        answer = wire.query("SELECT consumed FROM pg_background_list")
        assert [body[6:] for kind, body in answer if kind == "D"] == [b"t"]
        error = error_of(wire.query(sql.decode()))
        expected = f"results for PID {pid} have already been consumed"
        assert (error.sqlstate, error.message.decode()) == ("42704", expected)


def test_preview_is_120_characters(client: Client) -> None:
    sql = "SELECT '" + "ä" * 200 + "'"
    client.ended(sql)
    assert client.one("SELECT sql_preview FROM pg_background_list") == sql[:120]


def test_activity(client: Client, observer: Connection, gate: Gate) -> None:
    running = client.launch(gate.sql, "watched")
    gate.wait_for(running)
    ended = client.ended("SELECT 1")
    rows = client.texts("SELECT * FROM pg_background_activity")
    assert [(*row[:2], row[5], row[9]) for row in rows] == [
        (str(running.pid), str(running.cookie), "running", "watched"),
        (str(ended.pid), str(ended.cookie), "stopped", None),
    ]
    assert (rows[0][10], rows[0][11], rows[0][12], rows[0][16]) == (
        *("active", "Lock", "advisory"),
        gate.sql,
    )
    assert None not in rows[0][13:16]
    assert rows[1][10:] == (None,) * 7
    chosen = client.texts("SELECT backend_state AS s, pid FROM pg_background_activity a")
    assert chosen == [("active", str(running.pid)), (None, str(ended.pid))]


def test_columns_of_activity(conn: Connection) -> None:
    assert names(conn, "SELECT * FROM pg_background_activity") == [
        *("pid", "cookie", "launched_at", "user_id", "queue_size", "pgbg_state", "sql_preview"),
        *("last_error", "consumed", "label", "backend_state", "wait_event_type", "wait_event"),
        *("xact_start", "query_start", "backend_start", "query"),
    ]


# --- info ---


@pytest.mark.parametrize(
    ("job", "count", "tag", "error"),
    [
        ("SELECT generate_series(1, 5)", "5", "SELECT", "f"),
        ("CREATE TEMP TABLE i (n int); INSERT INTO i VALUES (1), (2)", "2", "INSERT", "f"),
        ("CREATE TEMP TABLE i (n int)", None, "CREATE TABLE", "f"),
        ("SELECT 1; SELECT 1/0", "1", "SELECT", "t"),
        ("SELECT 1/0", None, None, "t"),
        ("", None, None, "f"),
    ],
)
def test_result_info(
    client: Client, job: str, count: str | None, tag: str | None, error: str
) -> None:
    handle = client.ended(job)
    expected = (count, tag, "t", error)
    for name in ("result_info_v2", "result_info"):
        [row] = client.texts(f"SELECT * FROM pg_background_{name}({handle.sql})")
        assert row[:4] == expected
        assert len(row) == (4 if name == "result_info_v2" else 6)
        one = client.one(f"SELECT (pg_background_{name}({handle.sql})).row_count")
        assert one == count
    printed = client.call("result_info_v2", handle.sql)
    assert printed == "(" + ",".join(_quoted(part) for part in expected) + ")"


def _quoted(part: str | None) -> str:
    return f'"{part}"' if part and " " in part else part or ""


def test_result_info_of_a_running_job(client: Client, gate: Gate) -> None:
    handle = client.launch(f"CREATE TEMP TABLE i (n int); {gate.sql}; SELECT 1")
    gate.wait_for(handle)
    [row] = client.texts(f"SELECT * FROM pg_background_result_info({handle.sql})")
    assert row[2:4] == ("f", "f")
    assert row[4] is not None
    assert row[5] is None


def test_result_info_consumes_nothing(client: Client) -> None:
    handle = client.ended("SELECT 5")
    client.call("result_info", handle.sql)
    client.call("outcome", handle.sql)
    sql = f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)"
    assert client.one(sql) == "5"
    assert client.call("result_info_v2", handle.sql) == "(1,SELECT,t,f)"


FAILING: Final = (
    "CREATE TEMP TABLE parent (n int CONSTRAINT odd CHECK (n % 2 = 1));"
    " INSERT INTO parent VALUES (2)"
)


def test_error_info(client: Client) -> None:
    handle = client.ended(FAILING)
    for name, count in (("error_info_v2", 5), ("error_info", 9)):
        [row] = client.texts(f"SELECT * FROM pg_background_{name}({handle.sql})")
        assert len(row) == count
        assert row[:4] == (
            "23514",
            'new row for relation "parent" violates check constraint "odd"',
            "Failing row contains (2).",
            None,
        )
        assert row[4] == f"background worker, pid {handle.pid}"
    assert row[6:] == ("parent", None, "odd")
    assert row[5] is not None
    assert row[5].startswith("pg_temp")
    sql = (
        f"SELECT (e).sqlstate, (e).message FROM (SELECT pg_background_error_info({handle.sql}) e) x"
    )
    assert client.texts(sql)[0][0] == "23514"


def test_error_info_with_a_hint(client: Client) -> None:
    handle = client.ended(
        "DO $$ BEGIN RAISE 'it''s, \"so\"' USING HINT = 'h', DETAIL = 'd'; END $$"
    )
    call = f"pg_background_error_info_v2({handle.sql})"
    rows = client.texts(f"SELECT sqlstate, message, detail, hint FROM {call}")
    assert rows == [("P0001", 'it\'s, "so"', "d", "h")]


def test_context_of_an_error_ends_in_the_worker(conn: Connection) -> None:
    job = "DO $$ BEGIN RAISE 'x'; END $$"
    handle = conn.execute("SELECT (pg_background_submit(%s)).*", [job]).fetchone()
    assert handle is not None
    conn.execute("SELECT pg_background_wait(%s, %s)", handle)
    row = conn.execute("SELECT context FROM pg_background_error_info(%s, %s)", handle).fetchone()
    lines = ["PL/pgSQL function inline_code_block line 1 at RAISE"]
    assert row == ("\n".join([*lines, f"background worker, pid {handle[0]}"]),)


def test_error_info_without_an_error(client: Client, gate: Gate) -> None:
    for handle in (client.ended("SELECT 1"), client.launch(gate.sql)):
        for name, count in (("error_info_v2", 5), ("error_info", 9)):
            assert client.call(name, handle.sql) is None
            sql = f"SELECT * FROM pg_background_{name}({handle.sql})"
            assert client.texts(sql) == [(None,) * count]
            assert client.one(f"SELECT (pg_background_{name}({handle.sql})).message") is None


# --- outcome ---


@pytest.mark.parametrize("name", ["outcome_v2", "outcome"])
def test_outcome(client: Client, gate: Gate, name: str) -> None:
    cases = [
        (
            client.ended("SELECT generate_series(1, 3)", "x"),
            ("stopped", "f", "t", "f", "3", "SELECT", None, None, "x"),
        ),
        (
            client.ended("SELECT 1/0"),
            ("error", "f", "t", "t", None, None, "22012", "division by zero", None),
        ),
        (
            client.launch(gate.sql, ""),
            ("running", "f", "f", "f", None, None, None, None, ""),
        ),
    ]
    for handle, expected in cases:
        [row] = client.texts(f"SELECT * FROM pg_background_{name}({handle.sql})")
        assert row[:2] == (str(handle.pid), str(handle.cookie))
        assert row[2:-1] == expected
        assert row[-1] is not None
        [row] = client.texts(f"SELECT (pg_background_{name}({handle.sql})).*")
        assert row[2:-1] == expected


def test_outcome_of_a_result_that_was_fetched(client: Client) -> None:
    handle = client.launch("SELECT 1")
    client.rows(f"SELECT * FROM pg_background_result({handle.sql}) AS (n int)")
    sql = f"SELECT state, consumed, row_count FROM pg_background_outcome({handle.sql})"
    assert client.texts(sql) == [("stopped", "t", "1")]


def test_outcome_never_raises(client: Client) -> None:
    handle = client.ended("SELECT 1")
    for pid, cookie in ((999999, 1), (handle.pid, 17)):
        for name in ("outcome_v2", "outcome"):
            sql = f"SELECT * FROM pg_background_{name}({pid}, {cookie})"
            [row] = client.texts(sql)
            assert row == (str(pid), str(cookie), None, "f", "f", "f", *[None] * 6)
    assert client.call("outcome", "NULL", 1) == "(,1,,f,f,f,,,,,,)"
    assert client.call("outcome", "NULL", "NULL") is None
    assert client.texts("SELECT * FROM pg_background_outcome(1, NULL)") == [(None,) * 12]


def test_columns_of_an_outcome(conn: Connection) -> None:
    for call in ("outcome_v2(1, 1)", "outcome(1, 1)"):
        assert names(conn, f"SELECT * FROM pg_background_{call}") == OUTCOME
        assert names(conn, f"SELECT (pg_background_{call}).*") == OUTCOME


def test_status_is_the_outcome_as_jsonb(client: Client) -> None:
    handle = client.ended("SELECT 1/0", 'it\'s "x" ä')
    printed = client.call("status_v2", handle.sql)
    assert printed is not None
    status = json.loads(printed)
    assert sorted(status) == sorted(OUTCOME)
    expected = {
        "pid": handle.pid,
        "cookie": handle.cookie,
        "state": "error",
        "consumed": False,
        "completed": True,
        "has_error": True,
        "row_count": None,
        "sqlstate": "22012",
        "error_message": "division by zero",
        "label": 'it\'s "x" ä',
    }
    assert {name: status[name] for name in expected} == expected
    assert datetime.fromisoformat(status["launched_at"]).tzinfo is not None


def test_status_has_the_type_jsonb(conn: Connection) -> None:
    for binary in (False, True):
        cursor = conn.execute("SELECT pg_background_status_v2(1, 2)", binary=binary)
        assert cursor.description is not None
        assert cursor.description[0].type_code == 3802
        [[status]] = cursor.fetchall()
        assert status["pid"] == 1
        assert status["state"] is None


# --- statistics ---


def test_stats(client: Client, gate: Gate) -> None:
    client.rows("SET pg_background.max_workers = 7")
    [row] = client.texts("SELECT * FROM pg_background_stats_v2()")
    assert row[:5] + row[6:] == (*["0"] * 5, "7")
    assert float(row[5] or -1) == 0
    client.ended("SELECT 1")
    client.ended("SELECT 1/0")
    client.call("cancel", client.launch(gate.sql).sql, 20000)
    client.rows("SELECT * FROM pg_background_run('SELECT pg_sleep(60)', 0, 20)")
    client.launch(gate.sql)
    [row] = client.texts("SELECT * FROM pg_background_stats_v2()")
    assert row[:5] == ("5", "1", "1", "2", "1")
    assert row[6] == "7"
    assert float(row[5] or 0) >= 0
    [row] = client.texts("SELECT * FROM pg_background_stats()")
    assert row[:6] == ("5", "1", "1", "2", "1", "1")
    assert client.one("SELECT (pg_background_stats()).workers_timed_out") == "1"


def test_columns_of_the_stats(conn: Connection) -> None:
    counts = ["workers_launched", "workers_completed", "workers_failed", "workers_canceled"]
    rest = ["workers_active", "avg_execution_ms", "max_workers"]
    assert names(conn, "SELECT * FROM pg_background_stats_v2()") == [*counts, *rest]
    assert names(conn, "SELECT * FROM pg_background_stats()") == [
        *counts,
        "workers_timed_out",
        *rest,
    ]
    description = conn.execute("SELECT (pg_background_stats_v2()).*").description
    assert description is not None
    assert [column.type_code for column in description] == [20, 20, 20, 20, 23, 701, 23]


def test_stats_are_the_sessions_own(proxy: Proxy, scratch: str, conn: Connection) -> None:
    run(conn, "SELECT 1")
    with proxy.connect(dbname=scratch) as other:
        row = other.execute("SELECT workers_launched FROM pg_background_stats()").fetchone()
        assert row == (0,)


# --- progress ---


@pytest.mark.parametrize("report", ["progress", "report_progress"])
@pytest.mark.parametrize("name", ["get_progress_v2", "get_progress"])
def test_progress_is_seen_before_the_job_commits(
    client: Client, gate: Gate, report: str, name: str
) -> None:
    handle = client.launch(
        f"SELECT 1; SELECT pg_background_{report}(40, 'half of it, \"nearly\"'); {gate.sql};"
        f" SELECT pg_background_{report}(100)"
    )
    gate.wait_for(handle)
    columns = f"SELECT progress_pct, progress_msg FROM pg_background_{name}({handle.sql})"
    expected = [("40", 'half of it, "nearly"')]
    wait_until(lambda: client.texts(columns) == expected)
    assert client.texts(f"SELECT (pg_background_{name}({handle.sql})).*") == expected
    gate.open()
    assert client.call("wait", handle.sql) == "t"
    assert client.texts(columns) == [("100", None)]


def test_progress_before_the_first_report(client: Client, gate: Gate) -> None:
    handle = client.launch(gate.sql)
    for name in ("get_progress_v2", "get_progress"):
        assert client.call(name, handle.sql) == "(,)"
        assert client.texts(f"SELECT * FROM pg_background_{name}({handle.sql})") == [(None, None)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-5", ("0", None)),
        ("101, ''", ("100", "")),
        ("50, NULL", ("50", None)),
        ("NULL, 'x'", (None, "x")),
        ("msg => 'm', pct => 7", ("7", "m")),
        ("(SELECT count(*)::int FROM generate_series(1, 33)), 'n=' || 33", ("33", "n=33")),
        ("5, E'a\\nb ä'", ("5", "a\nb ä")),
    ],
)
def test_progress_is_clamped_and_exact(
    conn: Connection, arguments: str, expected: tuple[str | None, str | None]
) -> None:
    handle = conn.execute(
        "SELECT (pg_background_launch_v2(%s)).*", [f"SELECT pg_background_progress({arguments})"]
    ).fetchone()
    assert handle is not None
    assert conn.execute("SELECT pg_background_wait(%s, %s)", handle).fetchone() == (True,)
    row = conn.execute("SELECT * FROM pg_background_get_progress(%s, %s)", handle).fetchone()
    assert row is not None
    assert tuple(None if part is None else str(part) for part in row) == expected


def test_progress_outside_of_a_job(client: Client) -> None:
    refused = Refused("0A000", "pg_background_progress can only be called from a background worker")
    for name in ("progress", "report_progress"):
        for arguments in ("5", "5, 'x'", "NULL"):
            assert client.error(f"SELECT pg_background_{name}({arguments})") == refused


# --- SQL ---


def test_full_sql(client: Client) -> None:
    sql = "SELECT '" + "ä" * 300 + "' -- it''s all"
    handle = client.ended(sql)
    for name in ("full_sql_v2", "full_sql"):
        assert client.call(name, handle.sql) == sql
    assert client.call("full_sql", "NULL", "NULL") is None


def test_full_sql_is_cut_at_64_kib(conn: Connection) -> None:
    for filling in ("x" * 70000, "ä" * 40000):
        sql = f"SELECT 1 --{filling}"
        handle = conn.execute("SELECT (pg_background_submit(%s)).*", [sql]).fetchone()
        assert handle is not None
        row = conn.execute("SELECT pg_background_full_sql(%s, %s)", handle).fetchone()
        assert row is not None
        assert row[0].endswith("[...]")
        assert sql.startswith(row[0].removesuffix("[...]"))
        assert 65530 < len(row[0].removesuffix("[...]").encode()) <= 65536


# --- time zones ---


@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Etc/GMT+12"]
)
def test_timestamps_are_those_of_the_server(
    conn: Connection, observer: Connection, zone: str
) -> None:
    """In text as the server prints it, in this zone; the same moment in binary."""
    handle = conn.execute("SELECT (pg_background_submit('SELECT 1')).*").fetchone()
    for session in (conn, observer):
        session.execute("SELECT set_config('TimeZone', %s, false)", [zone])
    sql = "SELECT launched_at FROM pg_background_outcome(%s, %s)"
    cursor = conn.execute(sql, handle)
    assert cursor.pgresult is not None
    printed = (cursor.pgresult.get_value(0, 0) or b"").decode()
    [[moment]] = cursor.fetchall()
    assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)
    [[binary]] = conn.execute(sql, handle, binary=True).fetchall()
    assert binary == moment
    row = observer.execute("SELECT %s::timestamptz::text", [printed]).fetchone()
    assert row == (printed,)


def test_time_zone_set_in_psql(proxy: Proxy, scratch: str) -> None:
    script = """
        SELECT (pg_background_submit('SELECT 1')).* \\gset
        SELECT pg_background_wait(:pid, :cookie);
        SET TimeZone = 'Asia/Kathmandu';
        SELECT launched_at FROM pg_background_list;
        SELECT started_at, finished_at FROM pg_background_result_info(:pid, :cookie);
        SET TimeZone = 'UTC';
        SELECT launched_at FROM pg_background_list();
    """
    done = psql(proxy.port, "-qAt", input=script, dbname=scratch)
    assert done.stderr == ""
    _, first, both, last = done.stdout.split("\n")[:4]
    assert first.endswith("+05:45")
    assert both.count("+05:45") == 2
    assert last.endswith("+00")
    assert datetime.fromisoformat(first) == datetime.fromisoformat(last)


def test_zone_that_is_no_name(conn: Connection) -> None:
    """The moment is right, if not the zone."""
    handle: Any = conn.execute("SELECT (pg_background_submit('SELECT 1')).*").fetchone()
    for zone in ("<+03>-3", "-7.5", "EST5EDT"):
        conn.execute("SELECT set_config('TimeZone', %s, false)", [zone])
        sql = "SELECT launched_at FROM pg_background_outcome(%s, %s)"
        [[binary]] = conn.execute(sql, handle, binary=True).fetchall()
        assert abs(datetime.now(UTC) - binary.astimezone(UTC)) < timedelta(minutes=1)


def test_looking_at_a_job_of_a_wrong_kind_of_handle(conn: Connection) -> None:
    error = failure(conn, "SELECT * FROM pg_background_outcome('x', 1)")
    assert error.sqlstate == "22P02"
    error = failure(conn, "SELECT * FROM pg_background_result_info(1)")
    assert message(error)[0] in ("42883", "0A000")


@pytest.mark.parametrize("view", ["pg_background_list", "public.pg_background_activity"])
def test_a_view_in_another_place_says_so(conn: Connection, view: str) -> None:
    error = failure(conn, f"SELECT count(*) FROM {view} WHERE pid > 0".encode())
    name = view.rpartition(".")[2]
    assert message(error) == ("0A000", f"{name} cannot be selected from in this place")
    assert error.diag.message_hint
